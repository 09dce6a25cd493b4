"""A deficient layer's null space, closed by what the activation before it can give.

Layer i's system leaves x_i = x_0 + N c with c unknown (N, its null space). Where act_{i-1} is piecewise linear, two
facts about x_i = act_{i-1}(f_{i-1}(u)) are piecewise linear in c and need no u:

- x_i lies in the range of act_{i-1}: x_i >= 0 behind a ReLU, with about half its entries exactly at 0;
- where act_{i-1} is invertible, act_{i-1}^{-1}(x_i) lies in the range of f_{i-1}:  Q^T (act^{-1}(x_0 + N c) - f(0)) = 0
  for Q, the left null space of f_{i-1} (the constraint (I - W W^+)(...) = 0 of COPA, arXiv 2111.10178).
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.problem import Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.cores import ALONE
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.solvers.active_set import is_pinned, solve_pattern
from leakjax.solvers.linear import materialize
from leakjax.solvers.null_space import null_space

LARGEST = 8000
_RANK = 1e-9
_ONCE = threading.Lock()  # victims side by side share one left null space


class Closed(NamedTuple):
    """x_i, flat; the relative residual of what closed it, the condition, the systems solved; whether c is unique."""

    x: Float[np.ndarray, " n"]
    residual: float
    condition: float
    steps: int
    whole: bool


def applies(problem: Problem, before: Segment, segment: Segment, rows: int) -> bool:
    """Whether `before`'s activation is piecewise linear and the matrices of both segments are small enough."""
    n, inputs = int(np.prod(segment.input.shape)), int(np.prod(before.input.shape))
    small = max(n, inputs) <= LARGEST and fits_in_memory(8 * (2 * n * (n + rows) + 2 * n * (n + inputs)))
    return small and before.linear and before.activation.is_piecewise_linear(problem.variables, problem.dtype)


def close_null_space(
    problem: Problem, before: Segment, null: Float[np.ndarray, "n k"], x: Float[np.ndarray, " n"], noise: float
) -> Closed | None:
    """Find c from x, a solution of the layer's system, and `null`, its null space (n, k); `noise`: absolute, of x."""
    origin = x - null @ (null.T @ x)
    if null.shape[1] == x.size or not np.any(origin):  # a dead layer: nothing to begin with
        return None
    low, high = before.activation.reach(problem.variables, problem.dtype)
    if np.isfinite(low) or np.isfinite(high):
        return _by_range(origin, null, low, high, noise)
    if before.activation.has_masks:
        return None
    return _by_preimage(problem, before, origin, null)


def _by_range(
    origin: Float[np.ndarray, " n"], null: Float[np.ndarray, "n k"], low: float, high: float, noise: float
) -> Closed:
    def residual(c: Float[np.ndarray, " k"]) -> tuple[Float[np.ndarray, " m"], Callable[[], Float[np.ndarray, "m k"]]]:
        x = origin + null @ c
        beyond = np.minimum(0.0, x - low) + np.maximum(0.0, x - high)
        outside = np.flatnonzero(beyond)
        return beyond[outside], lambda: null[outside]

    size = float(np.linalg.norm(origin))
    found = solve_pattern(residual, np.zeros(null.shape[1]), tolerance=1e-15 * size)
    x = origin + null @ found.c
    at_low, at_high = np.abs(x - low) <= noise, np.abs(x - high) <= noise
    active = np.concatenate([null[at_low], -null[at_high]])
    whole = is_pinned(active)
    s = np.linalg.svd(active, compute_uv=False) if whole else np.ones(1)
    x = np.where(at_low, low, np.where(at_high, high, x))
    return Closed(x=x, residual=found.residual / size, condition=float(s[0] / s[-1]), steps=found.steps, whole=whole)


def _by_preimage(
    problem: Problem, before: Segment, origin: Float[np.ndarray, " n"], null: Float[np.ndarray, "n k"]
) -> Closed | None:
    with _ONCE:
        across, bias = _left_null_space(problem, before)
    if across is None or across.shape[1] == 0:
        return None
    invert = _preimage(before)

    def residual(c: Float[np.ndarray, " k"]) -> tuple[Float[np.ndarray, " m"], Callable[[], Float[np.ndarray, "m k"]]]:
        z, slope = map(np.asarray, invert(dict(problem.variables), to_device(origin + null @ c)))
        return across.T @ (z - bias), lambda: (across / slope[:, None]).T @ null

    c = np.zeros(null.shape[1])
    start, _ = residual(c)
    size = float(np.linalg.norm(start))
    found = solve_pattern(residual, c, tolerance=1e-15 * size)
    s = np.linalg.svd(found.jacobian, compute_uv=False)
    whole = len(across.T) >= len(c) and bool(s[-1] > _RANK * s[0])
    condition = float(s[0] / s[-1]) if whole else float("inf")
    return Closed(
        x=origin + null @ found.c, residual=found.residual / size, condition=condition, steps=found.steps, whole=whole
    )


@keep(32)
def _preimage(before: Segment) -> Callable[..., tuple[Float[Array, " n"], Float[Array, " n"]]]:
    def invert(variables: Arrays, x: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        preimage = before.activation.preimage(variables, x.reshape(before.output.shape), 0.0)
        return jnp.ravel(preimage.value), jnp.ravel(preimage.slope)

    return jax.jit(invert)


def _left_null_space(
    problem: Problem, segment: Segment
) -> tuple[Float[np.ndarray, "m r"] | None, Float[np.ndarray, " m"]]:
    """(Q, f(0)): orthonormal Q with Q^T (f(u) - f(0)) = 0 for every u; the same for all victims of a problem."""
    key = "left null space", segment
    if key not in problem.shared:
        with ALONE:
            bias, matrix = map(np.asarray, _affine_matrix(segment)(dict(problem.variables)))
        across = null_space(matrix.T, max(matrix.shape[0] - matrix.shape[1], 0))
        problem.shared[key] = across, np.ravel(bias)
    return problem.shared[key]


@keep(32)
def _affine_matrix(segment: Segment) -> Callable[..., tuple[Float[Array, "..."], Float[Array, "m n"]]]:
    def build(variables: Arrays) -> tuple[Float[Array, "..."], Float[Array, "m n"]]:
        zero = jnp.zeros(segment.input.shape, segment.input.dtype)
        bias, tangent = jax.linearize(lambda u: segment.function(variables, u), zero)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(zero.shape, zero.dtype))
        return bias, materialize(operator, bias)[0]

    return jax.jit(build)
