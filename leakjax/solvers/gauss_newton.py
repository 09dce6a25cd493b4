"""Levenberg-Marquardt without matrices, and with continuation for kinked residuals.

Every step solves min ||J s + r||^2 + lambda ||s||^2 by LSMR, J and its transpose from automatic differentiation
(Levenberg 1944, Marquardt 1963; inexact steps as in Eisenstat & Walker, SIAM J. Sci. Comput. 17, 1996).

Why not `optimistix.LevenbergMarquardt(linear_solver=lineax.LSMR)`: its inner solves have one tolerance, where an
inexact Newton method ties it to the residual. On r(x) = W_2 tanh(3 W_1 x) - y, started 20 dB from x, with 200 and 768
unknowns, this ends at 292 and 283 dB; optimistix at 226 and 36 dB with LSMR to 1e-13, at 88 and 69 dB to 1e-6, and at
295 and 283 dB with QR, which needs the dense Jacobian that a layer of 200,000 unknowns has no room for.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from leakjax.solvers.lsmr import lsmr

_STALLED = 4  # steps in a row that gained next to nothing
_SHARPEN = 0.5
_SETTLED = 0.85


class NewtonSolution(NamedTuple):
    """x, ||r(x)|| / size, outer steps, and the LSMR steps inside them."""

    x: Float[Array, "..."]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    inner_steps: Int[Array, ""]


def gauss_newton_step(
    residual: Callable[[Float[Array, "*shape"]], PyTree[Float[Array, "..."]]],
    x: Float[Array, "*shape"],
    *,
    size: Float[Array, ""],
    damping: Float[Array, ""] | None,
    forcing: float,
    max_inner: int,
) -> tuple[Float[Array, "*shape"], PyTree[Float[Array, "..."]], Int[Array, ""]]:
    """(s, r + J s, LSMR steps) of min_s ||J s + r||^2 + damping ||s||^2 at x; no rows are added without damping.

    The tolerance of the LSMR solve is `forcing` times ||r|| / size.
    """
    r, tangent = jax.linearize(residual, x)
    struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
    against = jax.tree.map(jnp.negative, r)
    if damping is None:
        operator, vector = lx.FunctionLinearOperator(tangent, struct), against
    else:
        root = jnp.sqrt(damping)
        operator = lx.FunctionLinearOperator(lambda v: (tangent(v), root * v), struct)
        vector = (against, jnp.zeros_like(x))
    tolerance = jnp.clip(forcing * optax.tree.norm(r) / size, 10 * jnp.finfo(x.dtype).eps, 1e-4)
    inner = lsmr(operator, vector, tolerance=tolerance, max_steps=max_inner)
    return inner.x, optax.tree.add(r, tangent(inner.x)), inner.steps


class _State(NamedTuple):
    x: Float[Array, "..."]
    cost: Float[Array, ""]
    damping: Float[Array, ""]
    smoothing: Float[Array, ""]
    stalled: Int[Array, ""]
    steps: Int[Array, ""]
    inner_steps: Int[Array, ""]


def levenberg_marquardt(
    residual: Callable[[Float[Array, "..."]], PyTree[Float[Array, "..."]]],
    x: Float[Array, "..."],
    *,
    size: Float[Array, ""],
    tolerance: float,
    max_steps: int,
    max_inner: int,
    forcing: float = 1e-2,
) -> NewtonSolution:
    """min ||residual(x)||^2 from x.

    Stops when ||r|| <= tolerance * size, after `max_steps`, or where it no longer falls. `forcing` times the relative
    residual is the tolerance of the LSMR solve inside a step, which takes `max_inner` steps at most.
    """
    return _minimize(
        lambda x, smoothing: residual(x), x, None, size, tolerance, max_steps, max_inner, forcing, 1e-2, 0.0
    )


def continuation(
    residual: Callable[[Float[Array, "..."], Float[Array, ""] | None], PyTree[Float[Array, "..."]]],
    x: Float[Array, "..."],
    *,
    smoothing: float,
    sharpest: float,
    size: Float[Array, ""],
    tolerance: float,
    max_steps: int,
    max_inner: int,
    forcing: float = 1e-4,
) -> NewtonSolution:
    """`levenberg_marquardt` on residual(x, smoothing) with a smoothing that halves whenever a step gains little.

    Ends when the smoothed residual is at `tolerance`, or at the smoothing `sharpest`. What is left of the smoothing is
    for a plain `levenberg_marquardt` to remove.
    """
    return _minimize(residual, x, smoothing, size, tolerance, max_steps, max_inner, forcing, 1e-6, sharpest)


def _minimize(
    residual: Callable[[Float[Array, "..."], Float[Array, ""] | None], PyTree[Float[Array, "..."]]],
    x: Float[Array, "..."],
    smoothing: float | None,
    size: Float[Array, ""],
    tolerance: float,
    max_steps: int,
    max_inner: int,
    forcing: float,
    damping: float,
    sharpest: float,
) -> NewtonSolution:
    smooth = smoothing is not None

    def rows(x: Float[Array, "..."], s: Float[Array, ""]) -> PyTree[Float[Array, "..."]]:
        return residual(x, s if smooth else None)

    def cost_at(x: Float[Array, "..."], s: Float[Array, ""]) -> Float[Array, ""]:
        return 0.5 * optax.tree.norm(rows(x, s)) ** 2

    def step(s: _State) -> _State:
        move, left, inner_steps = gauss_newton_step(
            lambda x: rows(x, s.smoothing), s.x, size=size, damping=s.damping, forcing=forcing, max_inner=max_inner
        )
        trial = s.x + move
        cost = cost_at(trial, s.smoothing)
        predicted = s.cost - 0.5 * optax.tree.norm(left) ** 2
        gain = (s.cost - cost) / jnp.where(predicted > 0, predicted, 1.0)
        better = cost < s.cost  # False for a trial that is not finite
        factor = jnp.where(better, jnp.where(gain > 0.75, 0.1, jnp.where(gain > 0.25, 0.5, 2.0)), 10.0)
        new_x, new_cost = jnp.where(better, trial, s.x), jnp.where(better, cost, s.cost)
        new_damping = jnp.maximum(s.damping * factor, 1e-20)
        idle = new_cost > (_SETTLED if smooth else 0.98) * s.cost
        stalled = jnp.where(idle, s.stalled + 1, 0)
        sharper = s.smoothing
        if smooth:
            settled = idle & (better | (stalled >= _STALLED))
            sharper = jnp.where(settled, _SHARPEN * s.smoothing, s.smoothing)
            new_cost = jnp.where(settled, cost_at(new_x, sharper), new_cost)
            new_damping = jnp.where(settled, jnp.minimum(new_damping, damping), new_damping)
            stalled = jnp.where(settled, 0, stalled)
        return _State(
            x=new_x,
            cost=new_cost,
            damping=new_damping,
            smoothing=sharper,
            stalled=stalled,
            steps=s.steps + 1,
            inner_steps=s.inner_steps + inner_steps,
        )

    def going(s: _State) -> Bool[Array, ""]:
        short = jnp.sqrt(2 * s.cost) > tolerance * size
        alive = s.smoothing > sharpest if smooth else s.stalled < 3 * _STALLED
        return short & alive & (s.steps < max_steps)

    zero = jnp.zeros((), jnp.int32)
    level = jnp.asarray(smoothing if smooth else 0.0, x.dtype)
    start = _State(
        x=x,
        cost=cost_at(x, level),
        damping=jnp.asarray(damping, x.dtype),
        smoothing=level,
        stalled=zero,
        steps=zero,
        inner_steps=zero,
    )
    end = jax.lax.while_loop(going, step, start)
    return NewtonSolution(end.x, jnp.sqrt(2 * end.cost) / size, end.steps, end.inner_steps)
