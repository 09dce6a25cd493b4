"""Label maps for pictures that have none: a class at every pixel, by its brightness."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from leakjax.arguments import array, whole
from leakjax.errors import InputError

_LUMINANCE = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601)."""


def luminance_maps(images: Shaped[Any, "N H W C"], classes: int = 2) -> Int[np.ndarray, "N H W"]:
    """Classes 0 .. K - 1 by luminance: class k lies between the quantiles k / K and (k + 1) / K of its own image.

        map = #{k in 1 .. K - 1: luminance >= quantile(luminance, k / K)}

    Arguments: `images` (N, H, W, C), of any range, red, green and blue or any other number of channels, which are then
    averaged; `classes` K.

    Raises `InputError` for arrays of another shape or fewer than two classes.
    """
    found = array("images", images, "buif", "images (N, H, W, C)").astype(float)
    if found.ndim != 4:
        raise InputError(f"images must have shape (N, H, W, C), got {found.shape}")
    count = whole("classes", classes, 2, 255)
    shares = np.arange(1, count) / count
    return np.stack([_map(_luminance(image), shares) for image in found])


def _luminance(image: Float[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W"]:
    return image @ np.asarray(_LUMINANCE) if image.shape[-1] == 3 else image.mean(axis=-1)


def _map(light: Float[np.ndarray, "H W"], shares: Float[np.ndarray, " k"]) -> Int[np.ndarray, "H W"]:
    return np.digitize(light, np.quantile(light, shares)).astype(np.int64)
