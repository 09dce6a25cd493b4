"""The derivative of an update by the images of its batch, as products with vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from leakjax.solvers.jacobian import inverse_norms

CHUNK = 16  # directions that go through the network together


class Derivative(NamedTuple):
    """J = du/dx of an update at one batch: `forward(d)` = J d (P,), `adjoint(c)` = J^T c (n,), `weights` (P,).

    `start` is the batch (n,), that of `examples` images of n / B pixels one after the other.
    """

    forward: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]
    weights: Float[Array, " P"]
    start: Float[Array, " n"]
    examples: int


def linearize_update(update: Callable[[Any], Any], images: Float[Array, "B ..."]) -> Derivative:
    """The derivative of `update(images)`, a pytree of P numbers; its weights are 1 / ||u_p|| of every array u_p.

    The rank of J is that of diag(weights) J, whose rows are of one size: early and late layers' gradients differ by
    orders of magnitude, and rounding in the larger would hide the smaller.
    """

    def flat(x: Array) -> Array:
        return _ravel(update(x.reshape(images.shape)), x.dtype)

    start = jnp.ravel(images)
    _, forward = jax.linearize(flat, start)
    transposed = jax.linear_transpose(forward, start)
    at_x = [a.astype(start.dtype) for a in jax.tree.leaves(update(images)) if _floating(a)]
    sizes = [jnp.broadcast_to(w, a.shape) for w, a in zip(inverse_norms(at_x), at_x, strict=True)]
    weights = _ravel(sizes, start.dtype)
    weights = jnp.where(jnp.isfinite(weights), weights, 1.0)
    return Derivative(
        forward=forward, adjoint=lambda c: transposed(c)[0], weights=weights, start=start, examples=images.shape[0]
    )


def each(function: Callable[[Array], Array], rows: Shaped[Array, "k ..."], passes: int = 1) -> Array:
    """The function, of so many `passes`, of every row. Few are written out: convolutions are slow in loops on CPUs."""
    if rows.shape[0] * passes <= CHUNK:
        return jnp.stack([function(row) for row in rows])
    return jax.lax.map(function, rows, batch_size=CHUNK)


def _floating(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _ravel(tree: Any, dtype: Any) -> Array:
    return jnp.concatenate([jnp.ravel(a).astype(dtype) for a in jax.tree.leaves(tree) if _floating(a)])
