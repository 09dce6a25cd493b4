"""Additive noise: every entry of what is sent moves by an independent draw."""

from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array


class KeyState(NamedTuple):
    """The random key of the next update."""

    key: Array


def randomized(key: Array, draw: Any) -> optax.GradientTransformation:
    """g_p -> draw(key_p, g_p) for every parameter p, with a key of its own, and new ones in every update."""

    def init(params: Any) -> KeyState:
        del params
        return KeyState(key)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, KeyState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        following, *keys = jax.random.split(state.key, len(leaves) + 1)
        drawn = [draw(k, g) for k, g in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn), KeyState(following)

    return optax.GradientTransformation(init, update)


def gaussian(key: Array, sigma: float) -> optax.GradientTransformation:
    """g + sigma n, n standard normal; `optax.add_noise` without decay."""
    return optax.add_noise(eta=sigma**2, gamma=0.0, key=key)


def laplace(key: Array, scale: float) -> optax.GradientTransformation:
    """g + scale l, l of density exp(-|l|) / 2: the standard deviation is sqrt(2) scale."""
    return randomized(key, lambda k, g: g + scale * jax.random.laplace(k, g.shape, g.dtype))
