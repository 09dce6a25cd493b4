"""Image priors by name: what is more likely of an image, where a gradient leaves directions open."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax.scipy.fft import dctn, idctn
from jaxtyping import Array, Float

Prior = Callable[[Float[Array, "*space C"]], Float[Array, ""]]

SMOOTH = 0.01  # differences below it, for pixels in [0, 1], count as squares
POWER = 2 / 3  # of first differences: edges are rare and large (Krishnan & Fergus, NIPS 2009)
CHROMA = 4.0  # edges of color are rarer than edges of lightness
CURVATURE = 1.0  # of second differences, beside first ones: shading is no stairs
BOX = 30.0
DEVIATION = 0.25  # of pixels in [0, 1]: the unit of the amplitudes u of `from_natural`
_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def total_variation(x: Float[Array, "*space C"]) -> Float[Array, ""]:
    """sum_p h_q(||(grad M x)_p||) + CURVATURE sum_axes sum_p h_1(||(d^2 M x / d axis^2)_p||), q = `POWER`.

    h_q(t) = (t^2 + s^2)^(q/2) - s^q with s = `SMOOTH`: t^q, but smooth at 0. Norms are over channels together. M turns
    three channels into lightness and two opponent colors, the latter times `CHROMA`; else it is the identity.
    """
    if x.shape[-1] == 3:
        x = x @ jnp.asarray((_OPPONENT * np.array([[1], [CHROMA], [CHROMA]])).T, x.dtype)
    squares, bent = jnp.zeros(x.shape[:-1], x.dtype), jnp.zeros((), x.dtype)
    for axis in range(x.ndim - 1):
        ends = [(0, int(k == axis)) for k in range(x.ndim)]
        squares += jnp.sum(jnp.pad(jnp.diff(x, axis=axis), ends) ** 2, axis=-1)
        bent += _smooth_power(jnp.sum(jnp.diff(x, n=2, axis=axis) ** 2, axis=-1), 1.0)
    return _smooth_power(squares, POWER) + CURVATURE * bent


def _smooth_power(squares: Float[Array, "..."], power: float) -> Float[Array, ""]:
    return jnp.sum((squares + SMOOTH**2) ** (0.5 * power) - SMOOTH**power)


def from_natural(u: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
    """sum_k s_k u_k phi_k, phi_k the cosines of each image, s_k ~ (1 + |k|^2)^(-1/2) with mean square 1.

    Amplitudes of natural images fall as 1 / frequency (Field, J. Opt. Soc. Am. A 4, 1987): coordinates u of equal size
    are an image as likely as any.
    """
    axes, weights = _natural(u)
    return idctn(weights * u, axes=axes, norm="ortho") if axes else u


def to_natural(x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
    """u with from_natural(u) = x."""
    axes, weights = _natural(x)
    return dctn(x, axes=axes, norm="ortho") / weights if axes else x


def _natural(u: Float[Array, "B *space C"]) -> tuple[tuple[int, ...], Float[Array, "1 *space 1"]]:
    axes = tuple(range(1, u.ndim - 1))
    frequencies = jnp.meshgrid(*(jnp.arange(u.shape[axis]) for axis in axes), indexing="ij")
    scale = (1.0 + sum((k.astype(u.dtype) ** 2 for k in frequencies), jnp.zeros(()))) ** -0.5
    return axes, (scale / jnp.sqrt(jnp.mean(scale**2))).reshape(1, *scale.shape, 1).astype(u.dtype)


def outside_box(
    x: Float[Array, "..."],
    low: int | float | Float[np.ndarray | Array, "..."] = 0.0,
    high: int | float | Float[np.ndarray | Array, "..."] = 1.0,
) -> Float[Array, ""]:
    """The squared distance of x from low <= x <= high."""
    return jnp.sum((x - jnp.clip(x, low, high)) ** 2)


def _smooth_in_box(x: Float[Array, "*space C"]) -> Float[Array, ""]:
    return total_variation(x) + BOX * outside_box(x)


PRIORS: Mapping[str, Prior | None] = {"tv": _smooth_in_box, "none": None}
"""Priors by name, of images scaled to [0, 1]: total variation with the box, and none (minimum norm)."""

DEFAULT_PRIOR = "tv"
