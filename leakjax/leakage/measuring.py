"""The numeric part of an audit: layers, Jacobian and noise bounds at a batch of images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from leakjax.errors import InputError
from leakjax.leakage.estimates import estimate_spectrum
from leakjax.leakage.layers import LayerLeakage, layer_leakage
from leakjax.leakage.result import NoisePoint
from leakjax.leakage.spectrum import (
    PRIOR_DEVIATION,
    Leakage,
    dense_leakage,
    variance_with_prior,
    variances,
    with_natural_prior,
)
from leakjax.losses import LOSSES
from leakjax.memory import fits_in_memory
from leakjax.model import Model
from leakjax.network import batch_gradient, read_network
from leakjax.precision import compute_in
from leakjax.residuals import push_forward
from leakjax.segments import read_segments

LARGEST = 6000  # unknowns up to which the Jacobian's Gram matrix is dense

Tell = Callable[[str], None]


class Measured(NamedTuple):
    """By layer what its constraints tell, the Jacobian's `leakage`, noise `points`, singular values, and a `remark`:
    None, or empty, where it was not asked for or is too large."""

    layers: Sequence[LayerLeakage] = ()
    leakage: Leakage | None = None
    points: tuple[NoisePoint, ...] | None = None
    spectrum: tuple[float, ...] | None = None
    remark: str | None = None


def measure(
    model: Model,
    x: np.ndarray,
    y: np.ndarray,
    *,
    readable: bool,
    loss: str,
    scale: float,
    noise: Sequence[float],
    seed: int,
    tell: Tell,
) -> Measured:
    """Look at images x (B, *shape) with labels y (B,), `scale` being the width of their range.

    Arguments: `readable`, whether the model has layers; these are looked at for the first image alone.
    """
    n, shape = x.size, x.shape[1:]
    with compute_in("float64"):
        wide = model.astype("float64")
        gradient = batch_gradient(read_network(wide, shape, len(x), jnp.float64).logits, loss, tuple(wide.params))
        arrays = dict(wide.variables), jnp.asarray(x), jnp.asarray(y)
        _refuse_nothing(wide, gradient(*arrays))
        if n > LARGEST or not fits_in_memory(6 * 8 * n**2):
            tell("estimating the spectrum")
            remark = f"{n:,} unknowns are too many for dense matrices: "
            if not noise:
                return Measured(remark=remark + "no spectrum, map or bound")
            points, spectrum, errors = _estimated_points(gradient, arrays, scale, noise, seed)
            return Measured((), None, points, spectrum, remark + errors)
        layers: Sequence[LayerLeakage] = ()
        if readable:
            tell("looking at every layer")
            layers = _numeric_layers(wide, shape, x[:1], y[:1], loss)
        tell("building the Jacobian")
        leakage = dense_leakage(gradient, *arrays, scale)
        tell("bounding what noise leaves")
        points = _noise_points(leakage, x.shape, noise)
    return Measured(layers, leakage, points, tuple(np.sqrt(leakage.values[::-1]).tolist()))


def _refuse_nothing(model: Model, gradient: dict[str, Array]) -> None:
    """Weights that are not finite, and a gradient that is zero everywhere, say nothing of what leaks."""
    for path, array in model.variables.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(array))):
            raise InputError(f"the model's {path!r} holds numbers that are not finite; mend the weights")
    if not any(bool(jnp.any(g != 0)) for g in gradient.values()):
        raise InputError(
            "the gradient at this image is zero everywhere, and an audit of it would say 'safe'; use other images, or "
            'loss="sigmoid_binary_cross_entropy" (--loss) for a model with one logit'
        )


def _numeric_layers(model: Model, shape: tuple[int, ...], x: Any, y: Any, loss: str) -> list[LayerLeakage]:
    segments = read_segments(model, shape, jnp.float64).segments
    images, head = jnp.asarray(x), segments[-1]
    z = push_forward(segments, model.variables, images)[1][-1]

    def mean_loss(z: Array) -> Array:
        logits = head.activation.function(model.variables, z)
        return jnp.mean(jax.vmap(LOSSES[loss])(logits, jnp.asarray(y)))

    return layer_leakage(segments, model.variables, images, jax.grad(mean_loss)(z))


def _estimated_points(
    gradient: Any, arrays: tuple[Any, Array, Array], scale: float, noise: Sequence[float], seed: int
) -> tuple[tuple[NoisePoint, ...], tuple[float, ...], str]:
    """Effective dimensions by random probes, the largest singular values, and a remark with the errors."""
    floors = [sigma / (PRIOR_DEVIATION * scale) for sigma in noise]
    found = estimate_spectrum(gradient, *arrays, floor=floors, seed=seed)
    points = tuple(NoisePoint(s, None, None, float(c)) for s, c in zip(noise, found.counts, strict=True))
    errors = ", ".join(
        f"{c:,.0f} +- {e:,.0f} at {s:g}" for s, c, e in zip(noise, found.counts, found.counts_error, strict=True)
    )
    remark = f"effective dimensions are estimated ({errors}), the spectrum is its largest values, and there is "
    return points, tuple((scale * found.singular_values).tolist()), remark + "no map and no bound"


def _noise_points(leakage: Leakage, shape: tuple[int, ...], noise: Sequence[float]) -> tuple[NoisePoint, ...]:
    prior = with_natural_prior(leakage, shape)
    spread = np.sqrt(leakage.values) * PRIOR_DEVIATION

    def decibel(variance: float) -> float | None:
        return None if not np.isfinite(variance) else float(-10 * np.log10(variance))

    return tuple(
        NoisePoint(
            sigma,
            decibel(float(np.mean(variances(leakage, sigma)))),
            decibel(variance_with_prior(prior, sigma)),
            int(np.sum(spread > sigma)),
        )
        for sigma in noise
    )
