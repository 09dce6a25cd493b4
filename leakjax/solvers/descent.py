"""First-order descent by any Optax transformation, that ends at its best finite iterate whatever happens."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

STATES = (
    "converged: the value no longer falls",
    "out of steps: allow more, or accept the best so far",
    "diverged: value or gradient is not finite; lower the learning rate, or start elsewhere",
)
CONVERGED, OUT_OF_STEPS, DIVERGED = range(3)


class Descent(NamedTuple):
    """The best finite iterate, its value, steps taken, and an index into `STATES`.

    Where not even the start has a finite value, x is the start and `value` is infinite.
    """

    x: PyTree[Float[Array, "..."]]
    value: Float[Array, ""]
    steps: Int[Array, ""]
    state: Int[Array, ""]


class _State(NamedTuple):
    x: PyTree[Float[Array, "..."]]
    optimizer: Any
    best: PyTree[Float[Array, "..."]]
    value: Float[Array, ""]
    mark: Float[Array, ""]
    idle: Int[Array, ""]
    steps: Int[Array, ""]
    finite: Bool[Array, ""]


def descend(
    objective: Callable[[PyTree[Float[Array, "..."]]], Float[Array, ""]],
    start: PyTree[Float[Array, "..."]],
    optimizer: optax.GradientTransformation,
    *,
    steps: int | Int[Array, ""],
    tolerance: float = 1e-6,
    patience: int | Int[Array, ""] = 20,
) -> Descent:
    """min objective(x) from `start`, under `jit` and `vmap` too.

    `optimizer` may search along lines (`optax.lbfgs`): what its search knows of the value is used again. Stops after
    `steps`, where `patience` steps lowered the best value by less than `tolerance` of it, or at the first value or
    gradient that is not finite.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    first = optimizer.init(start)
    searches = optax.tree.get(first, "grad") is not None
    evaluate = optax.value_and_grad_from_state(objective) if searches else jax.value_and_grad(objective)

    def step(s: _State) -> _State:
        value, grad = evaluate(s.x, state=s.optimizer) if searches else evaluate(s.x)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(grad))
        better = finite & (value < s.value)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), s.x, s.best)
        lowest = jnp.where(better, value, s.value)
        gained = s.mark - lowest > tolerance * jnp.abs(lowest)
        updates, state = optimizer.update(grad, s.optimizer, s.x, value=value, grad=grad, value_fn=objective)
        idle, mark = jnp.where(gained, 0, s.idle + 1), jnp.where(gained, lowest, s.mark)
        x: Any = optax.apply_updates(s.x, updates)
        return _State(
            x=x, optimizer=state, best=best, value=lowest, mark=mark, idle=idle, steps=s.steps + 1, finite=finite
        )

    def going(s: _State) -> Bool[Array, ""]:
        return s.finite & (s.steps <= steps) & (s.idle < patience)

    zero, unknown = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, jax.tree.leaves(start)[0].dtype)
    end = jax.lax.while_loop(
        going,
        step,
        _State(
            x=start,
            optimizer=first,
            best=start,
            value=unknown,
            mark=unknown,
            idle=zero,
            steps=zero,
            finite=jnp.ones((), bool),
        ),
    )
    state = jnp.where(end.idle >= patience, CONVERGED, OUT_OF_STEPS)
    return Descent(end.best, end.value, jnp.maximum(end.steps - 1, 0), jnp.where(end.finite, state, DIVERGED))


OPTIMIZERS: Mapping[str, optax.GradientTransformation] = {
    "lbfgs": optax.lbfgs(memory_size=20),
    "adam": optax.adam(1e-2),
}
"""Names that stand for a transformation; any other `optax.GradientTransformation` serves as well."""


DEFAULT_OPTIMIZER = "lbfgs"
