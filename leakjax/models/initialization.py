"""Weight initializations by name, as the papers' PyTorch code draws them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Initializer = Callable[[Any, Sequence[int], Any], Any]


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of PyTorch's convolution and linear layers, biases included."""
    return _uniform(1.0 / math.sqrt(fan_in))


def half_uniform(fan_in: int) -> Initializer:
    """U(-0.5, 0.5): what DLG's and R-CONV's code use."""
    del fan_in
    return _uniform(0.5)


INITIALIZATIONS: Mapping[str, Callable[[int], Initializer]] = {"torch": torch_uniform, "uniform": half_uniform}
"""Initializations by name: each maps a layer's fan-in to an initializer of its kernel and bias."""
