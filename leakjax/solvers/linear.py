"""Minimum-norm least-squares solutions of linear operators: matrix-free LSMR, and a dense singular value decomposition.

Both also answer how much of x the operator sees: its rank and condition where they are cheap to know.
"""

from collections.abc import Callable
from types import EllipsisType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from leakjax.solvers.lsmr import Lsmr, extreme_singular_values, lsmr

_SMALL = 800
_POWER = 5  # steps of the power iteration: a condition is told by its order of magnitude
_INVERSE_POWER = 6  # steps of the inverse one, which tells well-conditioned layers from others
_SEEN = 1e-6  # of a random x: how near it must come back
PROBE_LOSS = 3 * _SEEN
"""Share `lost` of a random probe up to which a system has no null space. A solve that ended because it was near enough
lost `_SEEN`; a single direction among n unknowns loses sqrt(1 / n) on average, 1e-3 of a million."""


class LsmrSolution(NamedTuple):
    """x = A^+ b, and what a second, random right-hand side A r tells about A.

    - `residual`: ||A x - b|| / ||b||;
    - `lost`: ||A^+ A r - r|| / ||r||: 0 but for rounding where A has no null space, else near sqrt(k / n) for a null
      space of dimension k among n unknowns;
    - `steps`, `alphas`, `betas`: of the first right-hand side.
    """

    x: Float[Array, "..."]
    residual: Float[Array, ""]
    lost: Float[Array, ""]
    steps: Int[Array, ""]
    alphas: Float[Array, " max_steps"]
    betas: Float[Array, " max_steps"]


def solve_side(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Float[Array, "..."]],
    random: Bool[Array, ""],
    *,
    tolerance: float | Float[Array, ""],
    max_steps: int,
    rounds: int = 1,
) -> LsmrSolution:
    """A^+ b, or A^+ A r where `random` (`lost` is meant for the latter); `rounds` > 1 refines: x += A^+ (b - A x).

    The random side is solved until its known answer is met to six digits, or to ten digits of its residual: enough to
    tell a null space from none.
    """
    struct = operator.in_structure()
    probe = jax.random.normal(jax.random.key(0), struct.shape, struct.dtype)
    size = jnp.linalg.norm(probe)
    side = jax.tree.map(lambda a, b: jnp.where(random, b, a), vector, operator.mv(probe))
    loose = max(1e-10, 50 * float(jnp.finfo(struct.dtype).eps))
    tolerance = jnp.where(random, loose, jnp.asarray(tolerance, struct.dtype))

    def solve(side: PyTree[Float[Array, "..."]], answer: Float[Array, "..."]) -> Lsmr:
        def enough(x: Float[Array, "..."]) -> Bool[Array, ""]:
            return random & (jnp.linalg.norm(x - answer) <= _SEEN * size)

        return lsmr(operator, side, tolerance=tolerance, max_steps=max_steps, enough=enough)

    first = solve(side, probe)
    x, steps = first.x, first.steps
    for _ in range(rounds - 1):
        correction = solve(optax.tree.sub(side, operator.mv(x)), probe - x)
        x, steps = x + correction.x, steps + correction.steps
    lost = jnp.linalg.norm(x - probe) / size
    return LsmrSolution(
        x=x,
        residual=relative_residual(operator, side, x),
        lost=lost,
        steps=steps,
        alphas=first.alphas,
        betas=first.betas,
    )


def solve_lsmr(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Float[Array, "..."]],
    *,
    tolerance: float | Float[Array, ""],
    max_steps: int,
    rounds: int = 1,
) -> LsmrSolution:
    """Minimum-norm least squares without building the matrix, by `solve_side` on both sides."""

    def solve(random: Bool[Array, ""]) -> LsmrSolution:
        return solve_side(operator, vector, random, tolerance=tolerance, max_steps=max_steps, rounds=rounds)

    both = jax.lax.map(solve, jnp.array([False, True]))
    return jax.tree.map(lambda a: a[0], both)._replace(lost=both.lost[1])


def lsmr_condition(solution: LsmrSolution, index: int | EllipsisType = ...) -> float:
    """Largest over smallest non-zero singular value, as the bidiagonalization of one solve (of many) found them."""
    alphas, betas = np.asarray(solution.alphas)[index], np.asarray(solution.betas)[index]
    low, high = extreme_singular_values(alphas, betas, int(np.count_nonzero(betas)))
    return high / low if low > 0 else float("inf")


class DenseSolution(NamedTuple):
    """x = A^+ b by singular values, with A's rank, its condition (on that rank) and the seen share of each unknown.

    `seen` is the diagonal of the projector onto A's row space: 1 where an unknown is determined, 0 where A never
    sees it.
    """

    x: Float[np.ndarray, " n"]
    residual: float
    rank: int
    condition: float
    seen: Float[np.ndarray, " n"]


def dense_bytes(rows: int, columns: int) -> int:
    """Memory that `solve_dense` takes at its peak: the matrix in float64, its copy, and its singular vectors."""
    small = min(rows, columns)
    return 8 * (2 * rows * columns + small * (rows + columns) + 4 * small**2)


def solve_dense(
    matrix: Float[np.ndarray, "m n"], vector: Float[np.ndarray, " m"], *, tolerance: float
) -> DenseSolution:
    """Minimum-norm least squares of a matrix; singular values below `tolerance` times the largest count as 0.

    Above `_SMALL` rows and columns the singular values come from the smaller Gram matrix (several times as fast) where
    it shows a clear gap between 1e-5 and 1e-7 of the largest.
    """
    matrix, vector = np.asarray(matrix, np.float64), np.asarray(vector, np.float64)
    if not np.all(np.isfinite(matrix)) or not np.all(np.isfinite(vector)):
        return DenseSolution(
            x=np.zeros(matrix.shape[1]),
            residual=float("inf"),
            rank=0,
            condition=float("inf"),
            seen=np.zeros(matrix.shape[1]),
        )
    if not np.any(matrix):
        return DenseSolution(
            x=np.zeros(matrix.shape[1]),
            residual=float(np.any(vector)),
            rank=0,
            condition=1.0,
            seen=np.zeros(matrix.shape[1]),
        )
    u, s, vt = _gram_svd(matrix) if min(matrix.shape) > _SMALL else np.linalg.svd(matrix, full_matrices=False)
    if min(matrix.shape) > _SMALL:
        if np.any((s > 1e-7 * s[0]) & (s < 1e-5 * s[0])):
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        else:
            tolerance = max(tolerance, 1e-6)
    kept = s > tolerance * s[0]
    u, s, vt = u[:, kept], s[kept], vt[kept]
    x = vt.T @ ((u.T @ vector) / s)
    x = x + vt.T @ ((u.T @ (vector - matrix @ x)) / s)  # one step of refinement
    size = float(np.linalg.norm(vector))
    residual = float(np.linalg.norm(matrix @ x - vector)) / (size if size > 0 else 1.0)
    seen = np.clip(np.sum(vt**2, axis=0), 0.0, 1.0)
    return DenseSolution(x=x, residual=residual, rank=len(s), condition=float(s[0] / s[-1]), seen=seen)


def _gram_svd(
    matrix: Float[np.ndarray, "m n"],
) -> tuple[Float[np.ndarray, "m k"], Float[np.ndarray, " k"], Float[np.ndarray, "k n"]]:
    """Singular triplets by the eigenvectors of the smaller Gram matrix; those below 1e-7 relative are rounding."""
    rows, columns = matrix.shape
    wide = rows <= columns
    values, vectors = np.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    s, vectors = np.sqrt(np.maximum(values[::-1], 0.0)), vectors[:, ::-1]
    other = (vectors.T @ matrix if wide else (matrix @ vectors).T) / np.where(s > 0, s, 1.0)[:, None]
    return (vectors, s, other) if wide else (other.T, s, vectors.T)


def materialize(
    operator: lx.AbstractLinearOperator, vector: PyTree[Float[Array, "..."]]
) -> tuple[Float[Array, "m n"], Float[Array, " m"]]:
    """The operator as a matrix (rows, columns) and its right-hand side as a vector."""
    x = operator.in_structure()
    size = int(np.prod(x.shape))

    def column(e: Float[Array, " n"]) -> Float[Array, " m"]:
        return ravel_pytree(operator.mv(e.reshape(x.shape)))[0]

    columns = jax.lax.map(column, jnp.eye(size, dtype=x.dtype), batch_size=128)
    return columns.T, ravel_pytree(vector)[0]


def relative_residual(
    operator: lx.AbstractLinearOperator, vector: PyTree[Float[Array, "..."]], x: Float[Array, "..."]
) -> Float[Array, ""]:
    """||A x - b|| / ||b|| (or ||A x|| where b = 0)."""
    size = optax.tree.norm(vector)
    error = optax.tree.norm(optax.tree.sub(operator.mv(x), vector))
    return error / jnp.where(size > 0, size, 1.0)


def largest_singular_value(
    product: Callable[[Float[Array, "..."]], PyTree[Float[Array, "..."]]], start: Float[Array, "..."]
) -> Float[Array, ""]:
    """||A||, from below and to some ten per cent, by a few steps of the power iteration on A^T A; A x = product(x)."""
    adjoint = jax.linear_transpose(product, start)

    def step(v: Float[Array, "..."], _: None) -> tuple[Float[Array, "..."], Float[Array, ""]]:
        image = product(v / jnp.maximum(jnp.linalg.norm(jnp.ravel(v)), jnp.finfo(v.dtype).tiny))
        return adjoint(image)[0], optax.tree.norm(image)

    return jax.lax.scan(step, start, None, length=_POWER)[1][-1]


def inverse_power(
    inverse: Callable[[Float[Array, "n 1"]], Float[Array, "n 1"]], start: Float[Array, "n 1"]
) -> Float[Array, ""]:
    """The least singular value of A, from above and to a few per cent; inverse(v) = (A^T A)^-1 v."""

    def step(v: Float[Array, "n 1"], _: None) -> tuple[Float[Array, "n 1"], Float[Array, ""]]:
        v = inverse(v / jnp.linalg.norm(v))
        return v, jnp.linalg.norm(v)

    return 1.0 / jnp.sqrt(jax.lax.scan(step, start, None, length=_INVERSE_POWER)[1][-1])
