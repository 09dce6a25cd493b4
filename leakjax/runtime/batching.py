"""`jax.vmap`, but for a single one: there it would only make loops run under masks, and be traced twice."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def vmap_several(function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """`jax.vmap(function, in_axes)` with axes 0 or None; the function itself, between a squeeze and an expansion, where
    the mapped axis has length 1.

    A batched `while_loop` selects, in every step, between old and new values of all it carries, since its members end
    at different steps; tracing it takes about twice as long.
    """

    def mapped(*arguments: Any) -> Any:
        sizes = {len(a) for x, axis in zip(arguments, in_axes, strict=True) if axis == 0 for a in jax.tree.leaves(x)}
        if sizes != {1}:
            return jax.vmap(function, tuple(in_axes))(*arguments)
        alone = (
            jax.tree.map(lambda a: jnp.squeeze(a, 0), x) if axis == 0 else x
            for x, axis in zip(arguments, in_axes, strict=True)
        )
        return jax.tree.map(lambda a: jnp.expand_dims(a, 0), function(*alone))

    return mapped
