"""Examples to train on, from arrays or data sources, checked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, Shaped

from leakjax.arguments import array, interval
from leakjax.datasets import stack
from leakjax.errors import InputError


class Examples(NamedTuple):
    """Images (N, H, W, C), uint8 or floating in `input_range`, and labels (N,)."""

    images: Shaped[np.ndarray, "N ..."]
    labels: Integer[np.ndarray, " N"]
    input_range: tuple[float, float]

    def scaled(self, images: Any, dtype: Any) -> Any:
        """A batch of `images` on `input_range`: low + images / 255 (high - low) where they are uint8."""
        if images.dtype != jnp.uint8:
            return jnp.asarray(images, dtype)
        low, high = self.input_range
        return low + jnp.asarray(images, dtype) * ((high - low) / 255)


def examples_of(data: Any, name: str, input_range: tuple[float, float]) -> Examples:
    """The pair (images, labels), or the data source of records {"image", "label"}, that argument `name` is.

    Raises `InputError` for anything else, shapes that do not go together, or images outside `input_range`.
    """
    low, high = interval("input_range", input_range)
    pair = data if isinstance(data, tuple) and len(data) == 2 else _records(data, name)
    images, labels = (array(f"{name}: images and labels", part, "biufc", "arrays of numbers") for part in pair)
    if images.ndim < 2 or not images.size or images.dtype.kind not in "uf":
        raise InputError(f"{name}: images must be uint8 or floating (N, H, W, C), got {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{name}: labels must be {len(images)} integers, got {labels.dtype} {labels.shape}")
    if images.dtype != np.uint8 and not (images.min() >= low - 1e-6 and images.max() <= high + 1e-6):
        raise InputError(
            f"{name}: images lie in [{images.min():.4g}, {images.max():.4g}], outside input_range [{low:g}, {high:g}]"
        )
    return Examples(images, labels.astype(np.int32), (low, high))


def _records(data: Any, name: str) -> Sequence[Any]:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, np.ndarray | dict | str):
        raise InputError(f"{name} must be a pair (images, labels) or a data source of records with image and label")
    return stack(data, name)
