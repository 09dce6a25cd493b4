"""Where the gradient constraints of a layer are one and the same small matrix for all input channels.

The gradient of a convolution's kernel, dW[k, c, o] = sum_p K1[(k, o), p] x[p, c], treats every input channel c alike:
its block is I (x) K1 with K1 (rows, positions). A dense layer is the case of one position.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Floats = Float[np.ndarray | Array, "..."]


class Channels(NamedTuple):
    """Which axis of a segment's input holds its channels, and which axis of each gradient follows them.

    `axis`: of x (B, ...), or None where all entries of an example are channels (a dense layer after a flattening);
    `rows`: (path, axis of its gradient) of the parameters whose gradients see x and follow its channels.
    """

    axis: int | None
    rows: tuple[tuple[str, int], ...] = ()

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """(positions, channels) of an x of `shape`."""
        channels = math.prod(shape[1:]) if self.axis is None else shape[self.axis]
        return math.prod(shape) // channels, channels

    def split(self, x: Floats) -> Any:
        """x as (positions, channels)."""
        if self.axis is None:
            return x.reshape(len(x), -1)
        return _with_last(x, self.axis).reshape(-1, x.shape[self.axis])

    def join(self, parts: Floats, shape: Sequence[int]) -> Any:
        """The x of `shape` that `split` makes of it."""
        if self.axis is None:
            return parts.reshape(*shape)
        outer = [s for k, s in enumerate(shape) if k != self.axis]
        order = list(range(len(outer)))
        order.insert(self.axis, len(outer))
        return parts.reshape(*outer, shape[self.axis]).transpose(order)

    def gather(self, gradient: Mapping[str, Floats]) -> Any:
        """The rows of a gradient as (rows, channels): K1 @ split(x)."""
        parts = [_with_last(gradient[path], axis).reshape(-1, gradient[path].shape[axis]) for path, axis in self.rows]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def impulses(positions: int, channels: int) -> Float[np.ndarray, "k p c"]:
    """Inputs (positions, channels) that together hold one 1 at every position, as many at a time as there are channels:
    what an I (x) K1 makes of them, channel after channel, are the columns of K1."""
    places = np.arange(positions)
    found = np.zeros((-(-positions // channels), positions, channels))
    found[places // channels, places, places % channels] = 1.0
    return found


def columns(answers: Floats, positions: int) -> Any:
    """K1 (m, positions) from the rows (k, m, channels) of `impulses`."""
    return _with_last(answers, 0).transpose(0, 2, 1).reshape(answers.shape[1], -1)[:, :positions]


def channel_matrix(
    channels: Channels,
    product: Callable[[Float[Array, "..."]], Mapping[str, Float[Array, "..."]]],
    shape: Sequence[int],
    dtype: Any,
) -> Float[Array, "m p"]:
    """K1, from a `product` x -> gradient rows."""
    positions, count = channels.sizes(shape)
    inputs = jnp.asarray(impulses(positions, count), dtype)
    return columns(jax.vmap(lambda parts: channels.gather(product(channels.join(parts, shape))))(inputs), positions)


def _with_last(a: Floats, axis: int) -> Any:
    """`a` with one axis moved to the end."""
    return a.transpose([k for k in range(a.ndim) if k != axis] + [axis])
