"""How close a reconstruction is to the truth. Only reports use this; no attack does."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import dm_pix
import jax
import numpy as np
from jaxtyping import Float, Shaped

PSNR_CAP = 350.0

Image = Float[Any, "H W C"]
Pixels = Shaped[Any, "..."]


def mse(truth: Pixels, image: Pixels) -> float:
    """Mean squared error of pixels on a [0, 1] scale, unclipped."""
    return float(np.mean((np.asarray(truth, float) - np.asarray(image, float)) ** 2))


def psnr(truth: Pixels, image: Pixels, mask: Pixels | None = None) -> float | None:
    """Peak signal-to-noise ratio in dB, peak 1, unclipped, capped at 350; over `mask`'s entries where given.

    None where the mask selects nothing.
    """
    error = (np.asarray(truth, float) - np.asarray(image, float)) ** 2
    if mask is not None:
        error = error[mask]
    if not error.size:
        return None
    value = float(np.mean(error))
    return PSNR_CAP if value == 0 else min(PSNR_CAP, -10.0 * float(np.log10(value)))


_ssim = jax.jit(dm_pix.ssim)


def ssim(truth: Image, image: Image) -> float | None:
    """Structural similarity (Wang et al. 2004), window 11, data range 1; None for images under 11 pixels."""
    if min(truth.shape[:2]) < 11:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (np.asarray(v, np.float32) for v in (truth, image))
        return float(_ssim(a, b))


METRICS: Mapping[str, Callable[[Image, Image], float | None]] = {"psnr": psnr, "ssim": ssim, "mse": mse}
"""Metrics by name, as reports list them; images on a [0, 1] scale."""
