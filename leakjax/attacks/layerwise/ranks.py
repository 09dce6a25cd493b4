"""Ranks and seen shares by dense matrices, where these are small enough."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.layerwise.pull_back import Known, products
from leakjax.attacks.layerwise.system import LayerState, dense_system
from leakjax.attacks.problem import Problem
from leakjax.constraints.layer import segment_rows
from leakjax.runtime.memory import fits_in_memory
from leakjax.segments.chain import Segment
from leakjax.solvers.jacobian import rank_tolerance, row_space
from leakjax.solvers.linear import DenseSolution, dense_bytes, solve_dense
from leakjax.solvers.null_space import stacked_null_space

DENSE_SIDE = 4000


def head_rank(
    problem: Problem, head: Segment, dz: Float[np.ndarray, "..."]
) -> tuple[int | None, Float[np.ndarray, "..."] | None]:
    """Rank and seen share of the head's gradient block alone; None where its matrix is too large."""
    rows, columns = sum(problem.gradients[p][0].size for p in head.paths), int(np.prod(head.input.shape))
    if not fits_in_memory(dense_bytes(rows, columns)) or min(rows, columns) > DENSE_SIDE:
        return None, None

    def entries(x: Float[Array, "..."]) -> Float[Array, " m"]:
        g = segment_rows(head, problem.variables, jnp.asarray(dz), x)[1]
        return jnp.concatenate([jnp.ravel(g[p]) for p in head.paths])

    jacobian = jax.jacrev if rows < columns else jax.jacfwd
    matrix = np.asarray(jacobian(entries)(jnp.zeros(head.input.shape, problem.dtype))).reshape(rows, columns)
    solution = solve_dense(matrix, np.zeros(len(matrix)), tolerance=_tolerance(problem, matrix.shape))
    return solution.rank, solution.seen.reshape(head.input.shape)


def solve_layer_densely(
    problem: Problem, segment: Segment, state: LayerState, k: int, victim: int
) -> tuple[Float[np.ndarray, "..."], DenseSolution] | None:
    """(dz, solution) of path k's system by singular values; None where its matrix is too large."""
    rows, columns = matrix_shape(problem, segment)
    large = min(rows, columns) > DENSE_SIDE or not fits_in_memory(dense_bytes(rows, columns))
    if problem.solver == "lsmr" or (problem.solver == "auto" and large):
        return None
    dz, matrix, vector = dense_system(problem, segment, state, k, victim)
    used = np.any(matrix != 0, axis=1)
    return dz, solve_dense(matrix[used], vector[used], tolerance=_tolerance(problem, matrix.shape))


def layer_null_space(
    problem: Problem, segment: Segment, state: LayerState, k: int, victim: int, lost: float
) -> Float[np.ndarray, "n r"] | None:
    """Orthonormal basis (n, directions) of what path k's system does not see; None where its rank is not clear.

    `lost`: what a random probe lost, sqrt(directions / n).
    """
    _, matrix, _ = dense_system(problem, segment, state, k, victim)
    forward = int(np.prod(segment.output.shape))
    return stacked_null_space(matrix[forward:], matrix[:forward], round(matrix.shape[1] * lost**2))


def pulled_rank(
    problem: Problem, segments: Sequence[Segment], given: Known, x: Float[np.ndarray, "*input"]
) -> tuple[int | None, Float[np.ndarray, "*input"] | None, float]:
    """Rank of the pulled-back Jacobian at x, each entry's share in its row space, and its condition on that rank; None,
    None and 1 where it is too large."""
    single = np.dtype(problem.dtype) != np.float64  # squares of small singular values drown in its rounding
    if single or x.size > DENSE_SIDE or not fits_in_memory(4 * 8 * x.size**2):
        return None, None, 1.0
    rows = sum(matrix_shape(problem, segment)[0] for segment in segments)
    product, forward = products(problem, segments, given, x)
    space = row_space(product, rows, x.size, forward=forward)
    least = float(space.values[x.size - space.rank]) if space.rank else 0.0
    condition = float(np.sqrt(space.values[-1] / least)) if least > 0 else np.inf
    return space.rank, space.share.reshape(x.shape), condition


def matrix_shape(problem: Problem, segment: Segment) -> tuple[int, int]:
    """(rows, columns) of a segment's layer system."""
    rows = int(np.prod(segment.output.shape)) + sum(problem.gradients[p][0].size for p in segment.paths)
    return rows, int(np.prod(segment.input.shape))


def _tolerance(problem: Problem, shape: tuple[int, ...]) -> float:
    rows, columns = shape
    return max(rank_tolerance(rows, columns, problem.dtype), 10 * problem.noise)
