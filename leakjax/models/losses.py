"""Losses of one example on its logits, by Optax's names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Label = int | Int[Any, ""] | Float[Any, " K"]
"""A class, or what the logits are compared with."""

Loss = Callable[[Float[Array, " K"], Label], Float[Array, ""]]


def target(label: Label, outputs: int, dtype: jnp.dtype) -> Float[Array, " K"]:
    """What the logits are compared with: the label itself for one output (0 or 1), else its one-hot vector.

    A label that is a vector already (a soft label) is the target.
    """
    if jnp.ndim(label) == 1:
        return jnp.asarray(label)
    if outputs == 1:
        return jnp.asarray(label, dtype)[None]
    return jax.nn.one_hot(label, outputs, dtype=dtype)


def softmax_cross_entropy(logits: Float[Array, " K"], label: Label) -> Float[Array, ""]:
    """-log softmax(logits)[label]."""
    return optax.softmax_cross_entropy(logits, target(label, logits.size, logits.dtype))


def sigmoid_binary_cross_entropy(logits: Float[Array, " K"], label: Label) -> Float[Array, ""]:
    """sum_k -y_k log s(z_k) - (1 - y_k) log(1 - s(z_k)), s the logistic function, y the `target`."""
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, target(label, logits.size, logits.dtype)))


def squared_error(logits: Float[Array, " K"], label: Label) -> Float[Array, ""]:
    """mean_k (z_k - y_k)^2, y the `target`."""
    return jnp.mean(optax.squared_error(logits, target(label, logits.size, logits.dtype)))


LOSSES: Mapping[str, Loss] = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "sigmoid_binary_cross_entropy": sigmoid_binary_cross_entropy,
    "squared_error": squared_error,
}
"""Losses by name; a gradient is that of the mean over the examples of a batch."""


def labels_of(outputs: int) -> int:
    """How many labels a model with so many outputs tells apart: two for one logit, else one an output."""
    return 2 if outputs == 1 else outputs
