"""Full Gauss-Newton steps: for piecewise linear residuals, each step solves the linear piece that the last one reached.

Where Levenberg-Marquardt refuses every step that raises the residual, and so stalls at kinks and jumps, this goes on:
the pattern of pieces settles, and the step on the right one is exact. On smooth residuals it is Newton's speed without
its safeguards.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from leakjax.solvers.gauss_newton import NewtonSolution, gauss_newton_step

_PATIENCE = 8  # steps without a new best before it is given up


class _State(NamedTuple):
    x: Float[Array, "..."]
    best: Float[Array, "..."]
    least: Float[Array, ""]
    waited: Int[Array, ""]
    steps: Int[Array, ""]
    inner_steps: Int[Array, ""]


def full_steps(
    residual: Callable[[Float[Array, "..."]], PyTree[Float[Array, "..."]]],
    x: Float[Array, "..."],
    *,
    size: Float[Array, ""],
    tolerance: float,
    max_steps: int,
    max_inner: int,
    forcing: float = 1e-2,
) -> NewtonSolution:
    """x <- x - J^+ r from x, whatever becomes of ||r||; the best x met is returned.

    Arguments as for `levenberg_marquardt`. Stops at ||r|| <= tolerance * size, after `max_steps`, or after a few steps
    in a row without a new best.
    """

    def step(s: _State) -> _State:
        move, _, inner_steps = gauss_newton_step(
            residual, s.x, size=size, damping=None, forcing=forcing, max_inner=max_inner
        )
        new = s.x + move
        norm = optax.tree.norm(residual(new))
        better = norm < 0.9 * s.least
        return _State(
            x=new,
            best=jnp.where(norm < s.least, new, s.best),
            least=jnp.minimum(jnp.where(jnp.isnan(norm), jnp.inf, norm), s.least),
            waited=jnp.where(better, 0, s.waited + 1),
            steps=s.steps + 1,
            inner_steps=s.inner_steps + inner_steps,
        )

    def going(s: _State) -> Bool[Array, ""]:
        finite = jnp.all(jnp.isfinite(s.x))
        return (s.least > tolerance * size) & (s.waited < _PATIENCE) & (s.steps < max_steps) & finite

    zero = jnp.zeros((), jnp.int32)
    start = _State(x=x, best=x, least=optax.tree.norm(residual(x)), waited=zero, steps=zero, inner_steps=zero)
    end = jax.lax.while_loop(going, step, start)
    return NewtonSolution(end.best, end.least / size, end.steps, end.inner_steps)
