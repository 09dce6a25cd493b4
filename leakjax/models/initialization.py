"""Weight initializations by name, as the papers' PyTorch code draws them."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.runtime.programs import keep, quickly

Initializer = Callable[[Any, Sequence[int], Any], Any]


@keep(256)
def _drawn(shape: tuple[int, ...], dtype: Any) -> Any:
    """Numbers of [0, 1) by key. Run once for a shape: XLA takes 0.9 CPU seconds to optimize it, else 0.2."""
    return jax.jit(lambda key: jax.random.uniform(key, shape, dtype), compiler_options=quickly())


@functools.partial(jax.jit, static_argnames="bound")
def _between(u: Any, bound: float) -> Any:
    """u of [0, 1) in [-bound, bound), rounded as `jax.random.uniform` rounds it."""
    low, high = jnp.asarray(-bound, u.dtype), jnp.asarray(bound, u.dtype)
    return jnp.maximum(low, u * (high - low) + low)


def _uniform(bound: float) -> Initializer:
    def draw(key: Any, shape: Sequence[int], dtype: Any) -> Any:
        try:
            np.asarray(jax.random.key_data(key))
        except jax.errors.TracerArrayConversionError:  # inside another program, which has its own options
            return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)
        return _between(_drawn(tuple(shape), dtype)(key), bound)

    return draw


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of PyTorch's convolution and linear layers, biases included."""
    return _uniform(1.0 / math.sqrt(fan_in))


def half_uniform(fan_in: int) -> Initializer:
    """U(-0.5, 0.5): what DLG's and R-CONV's code use."""
    del fan_in
    return _uniform(0.5)


INITIALIZATIONS: Mapping[str, Callable[[int], Initializer]] = {"torch": torch_uniform, "uniform": half_uniform}
"""Initializations by name: each maps a layer's fan-in to an initializer of its kernel and bias."""
