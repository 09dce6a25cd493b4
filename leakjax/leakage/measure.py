"""The numeric part of an audit: layers, Jacobian and noise bounds at a batch of images."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.constraints.pull_back import push_forward
from leakjax.errors import InputError
from leakjax.leakage.blind import data_gradient, looked_up, rounded_front, silent, spots_of, spots_of_model, unpredicted
from leakjax.leakage.dense import (
    PRIOR_DEVIATION,
    Jacobian,
    Leakage,
    dense_leakage,
    jacobian,
    variance_with_prior,
    variances,
    with_natural_prior,
)
from leakjax.leakage.estimated import estimate
from leakjax.leakage.layers import LayerLeakage, layer_leakage
from leakjax.leakage.pictures import pictures
from leakjax.leakage.privacy import clipped_gradient
from leakjax.leakage.request import Asked, Measured
from leakjax.leakage.sent_buffers import BEHIND_ROUNDING, measured, with_buffers
from leakjax.leakage.verdict import Doubt
from leakjax.models.losses import LossSpec, on_outputs, read_loss
from leakjax.models.reader import Model, output_shape
from leakjax.report.audit.record import NoisePoint, Picture
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.jaxprs import flatten
from leakjax.segments.tracing.network import Gradient, batch_gradient, read_network
from leakjax.segments.tracing.widening import in_one_precision

LARGEST = 6000  # unknowns up to which the Jacobian's Gram matrix is dense
LARGEST_LAYERS = 20_000  # unknowns up to which layers are probed


def in_precision(model: Model, shape: tuple[int, ...], dtype: Any) -> tuple[Model, list[str]]:
    """The model in `dtype`, and a remark where its own code rounds to less."""
    wide = in_one_precision(model, shape, dtype)
    if not wide.rounds:
        return wide.model, []
    own = f"the model computes in {wide.own.name} by itself"
    if wide.reason:
        return wide.model, [f"ranks are uncertain: {own}, and {wide.reason}"]
    return wide.model, [f"{own}; looked at as if it did in {jnp.dtype(dtype).name}"]


def measure(model: Model, segments: Sequence[Segment], x: np.ndarray, y: np.ndarray, asked: Asked) -> Measured:
    """Look at images x (B, *shape) with labels y (B,), `model` and its `segments` being in float64.

    Arguments: `segments`, () where there are none; they are looked at for the first image alone.
    """
    n, shape = x.size, x.shape[1:]
    _refuse_not_finite(model)
    network = read_network(model, shape, len(x), jnp.float64)
    gradient = batch_gradient(network.logits, asked.loss, tuple(model.params))
    arrays = dict(model.variables), to_device(x), to_device(y)
    sent = jax.jit(gradient)(*arrays)
    _refuse_zero(sent)
    doubt = Doubt(silent=tuple(silent(sent)))
    spots = spots_of_model(model, asked.loss, *arrays[1:])
    if spots:
        return _measure_rounded(model, gradient, sent, arrays, asked, doubt._replace(spots=tuple(map(str, spots))))
    if asked.buffers is not None:
        gradient = with_buffers(gradient, asked.buffers.step, asked.buffers.paths)
    gradient = data_gradient(gradient)
    doubt = doubt._replace(beyond=unpredicted(network, gradient, *arrays, asked.scale))
    layers: Sequence[LayerLeakage] = ()
    if segments and x[:1].size <= LARGEST_LAYERS and not _stops(model, x):
        asked.tell("looking at every layer")
        layers = _numeric_layers(model, segments, x[:1], y[:1], asked.loss)
    clipped = None if asked.dp_sgd is None else _clipped(model, shape, asked)
    if not _fits(n):
        return estimate(gradient, clipped, arrays, layers, asked)._replace(doubt=doubt)
    asked.tell("building the Jacobian")
    found = jacobian(gradient, *arrays)
    leakage = found.leakage(asked.scale, found.rows)
    pixels = (x - asked.limits[0]) / asked.scale
    points, shown = _under_noise(leakage, pixels, asked.noise, asked)
    points = tuple(dataclasses.replace(point, asked=asked.asked) for point in points)
    shown = shown if asked.asked else shown[:1]
    if clipped is not None:
        asked.tell("building the Jacobian of clipped gradients")
        limited = dense_leakage(clipped, *arrays, asked.scale)
        private, others = _under_noise(limited, pixels, asked.private_sigmas(len(x)), asked)
        points += asked.private(private)
        shown += others[1:]
    return Measured(
        layers=layers,
        leakage=leakage,
        points=points,
        spectrum=_spectrum(leakage),
        map=leakage.map,
        doubt=doubt,
        pictures=shown,
        jacobian=found,
    )


def _measure_rounded(
    model: Model, gradient: Gradient, sent: Mapping[str, Array], arrays: Any, asked: Asked, doubt: Doubt
) -> Measured:
    """What can be said where operations hide the images: how much leaks of what those in front leave of them.

    A gradient is a function of the rounded images y, and depends on them as on any others: its first layer's is
    dz y^T, in which no rounding is left. Nothing is said where roundings come later.
    """
    variables, x, labels = arrays
    remarks = tuple(looked_up(model, sent, x))
    if asked.buffers is not None:
        remarks += (BEHIND_ROUNDING,)
    front = rounded_front(model, np.asarray(x), asked.limits)
    if front is None or not _fits(x.size):
        return Measured(remarks=remarks, doubt=doubt)
    behind, y = batch_gradient(front.logits, asked.loss, tuple(model.params)), to_device(front.y)
    if spots_of(behind, variables, y, labels):
        return Measured(remarks=remarks, doubt=doubt)
    asked.tell("building the Jacobian behind the rounding")
    leakage = dense_leakage(data_gradient(behind), variables, y, labels, front.slope)
    remarks += ("ranks, map and spectrum are of the images as they are after " + " and ".join(doubt.spots),)
    return Measured(
        layers=(),
        leakage=leakage,
        points=None,
        spectrum=_spectrum(leakage),
        map=leakage.map,
        remarks=remarks,
        doubt=doubt._replace(picture=front.psnr),
    )


def _fits(n: int) -> bool:
    return n <= LARGEST and fits_in_memory(6 * 8 * n**2)


def _spectrum(leakage: Leakage) -> tuple[float, ...]:
    return tuple(np.sqrt(leakage.values[::-1]).tolist())


def _stops(model: Model, x: np.ndarray) -> bool:
    """Whether the model stops gradients on the way to its logits: its layers' own equations are then not those of their
    derivatives. Of running statistics beside that way it may."""
    structs = jax.eval_shape(lambda: dict(model.variables)), jax.ShapeDtypeStruct(x.shape, x.dtype)
    needed = flatten(model.apply, structs).needed()
    return any("stop_gradient" in f"{e.name} {e.params}" for e in needed)


def measure_without(jacobian: Jacobian, asked: Asked, paths: Collection[str]) -> tuple[int, Float[np.ndarray, "B ..."]]:
    """(the rank of the Jacobian, its map) of what a client sends without the gradients of some parameter `paths`."""
    asked.tell("measuring what leaks without the gradients to withhold")
    kept = tuple(path for path in jacobian.rows if path not in paths)
    if not kept:
        return 0, np.zeros(jacobian.shape)
    found = jacobian.leakage(asked.scale, kept)
    return found.rank, found.map


def _refuse_not_finite(model: Model) -> None:
    for path, array in model.variables.items():
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.all(np.isfinite(np.asarray(array, np.float64))):
            raise InputError(f"the model's {path!r} holds numbers that are not finite; mend the weights")


def _refuse_zero(gradient: dict[str, Array]) -> None:
    """A gradient that is zero everywhere says nothing of what leaks."""
    if not any(np.any(np.asarray(g) != 0) for g in gradient.values()):
        raise InputError(
            "the gradient at this image is zero everywhere: this instance is degenerate (all-zero or saturated "
            "weights, or a label that is met exactly), and says nothing of others. Use other weights or images, "
            'loss="sigmoid_binary_cross_entropy" (--loss) for a model with one logit, or shapes_only (--shapes-only)'
        )


def _numeric_layers(model: Model, segments: Sequence[Segment], x: Any, y: Any, loss: LossSpec) -> list[LayerLeakage]:
    images, head = to_device(x), segments[-1]
    function = read_loss(on_outputs(loss, output_shape(model, x.shape[1:])))
    xs, zs, _ = push_forward(segments, model.variables, images)
    variables = {**model.variables, **measured(segments, xs, model.variables)}

    def mean_loss(z: Array) -> Array:
        logits = head.activation.function(variables, z)
        return jnp.mean(jax.vmap(function)(logits, to_device(y)))

    return layer_leakage(segments, variables, images, jax.grad(mean_loss)(zs[-1]))


def _clipped(model: Model, shape: tuple[int, ...], asked: Asked) -> Gradient:
    assert asked.dp_sgd is not None
    logits = read_network(model, shape, 1, jnp.float64).logits
    gradient = data_gradient(batch_gradient(logits, asked.loss, tuple(model.params)))
    return clipped_gradient(gradient, asked.dp_sgd.clip)


def _under_noise(
    leakage: Leakage, pixels: Float[np.ndarray, "B H W C"], noise: Sequence[float], asked: Asked
) -> tuple[tuple[NoisePoint, ...], tuple[Picture, ...]]:
    """A point for each level of `noise`, and pictures of what comes back: without any, then at each level."""
    prior = with_natural_prior(leakage, pixels.shape)
    plain, *noisy = pictures(leakage, prior, pixels, noise, asked.seed)
    spread = np.sqrt(leakage.values) * PRIOR_DEVIATION

    def decibel(variance: float) -> float | None:
        return None if not np.isfinite(variance) else float(-10 * np.log10(variance))

    points = tuple(
        NoisePoint(
            sigma=sigma,
            psnr_bound=decibel(float(np.mean(variances(leakage, sigma)))),
            psnr_estimate_prior=decibel(variance_with_prior(prior, sigma)),
            effective_dimensions=int(np.sum(spread > sigma)),
            psnr_at_image=shown.psnr,
        )
        for sigma, shown in zip(noise, noisy, strict=True)
    )
    return points, (plain, *noisy)
