"""Maxima over windows as maxima of shifted slices: their derivatives are selections, many times as fast on CPUs."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def window_entries(
    x: Float[Array, "..."],
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
    **_: Any,
) -> Float[Array, "window ..."]:
    """The entries of every window, stacked in order, padding below all of x; x itself is not dilated."""
    assert all(d == 1 for d in base_dilation)
    low = jax.lax.stop_gradient(jnp.min(x)) - 1.0
    padded = jax.lax.pad(x, low, [(a, b, 0) for a, b in padding])
    spans = [(w - 1) * d + 1 for w, d in zip(window_dimensions, window_dilation, strict=True)]
    slices = []
    for offset in itertools.product(*map(range, window_dimensions)):
        start = [o * d for o, d in zip(offset, window_dilation, strict=True)]
        limit = [size - span + 1 + s for size, span, s in zip(padded.shape, spans, start, strict=True)]
        slices.append(jax.lax.slice(padded, start, limit, window_strides))
    return jnp.stack(slices)


def greatest(entries: Float[Array, "window ..."]) -> Float[Array, "..."]:
    """The maximum over the first axis, the derivative going to the first entry that attains it, as in XLA."""
    best = entries[0]
    for entry in entries[1:]:
        best = jnp.where(best >= entry, best, entry)
    return best


def window_max(x: Float[Array, "..."], *, base_dilation: Sequence[int], **params: Any) -> Float[Array, "..."]:
    """`lax.reduce_window` with max; with a dilated x by XLA itself."""
    if any(d != 1 for d in base_dilation):
        low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
        return jax.lax.reduce_window(x, low, jax.lax.max, base_dilation=base_dilation, **params)
    return greatest(window_entries(x, base_dilation=base_dilation, **params))
