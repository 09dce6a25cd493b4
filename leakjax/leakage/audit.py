"""`audit`: how much a model leaks of the images it is trained on, why, and what would help."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from leakjax.errors import InputError, UnreadableModelError, unknown_name
from leakjax.geometry import Geometry
from leakjax.leakage.advice import best_changes, dead_pixels
from leakjax.leakage.estimates import estimate_spectrum
from leakjax.leakage.index import copa_index, layer_weights, smallest_withheld, structural_leaked
from leakjax.leakage.layers import LayerLeakage, layer_leakage
from leakjax.leakage.result import Audit, LayerAudit, NoisePoint, Withheld
from leakjax.leakage.sentences import layer_sentence, verdict
from leakjax.leakage.spectrum import (
    PRIOR_DEVIATION,
    Leakage,
    dense_leakage,
    variance_with_prior,
    variances,
    with_natural_prior,
)
from leakjax.leakage.structural import structural_count
from leakjax.losses import LOSSES
from leakjax.memory import fits_in_memory
from leakjax.model import Model, read_model
from leakjax.network import batch_gradient, read_network
from leakjax.observation import output_count
from leakjax.precision import compute_in
from leakjax.priors import from_natural
from leakjax.residuals import push_forward
from leakjax.segments import Segment, read_segments

LARGEST = 6000  # unknowns up to which the Jacobian's Gram matrix is dense
SIGMAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
UNSEEN = 1e-6

Tell = Callable[[str], None]


def audit(
    model: Any,
    input_shape: Sequence[int],
    *,
    images: Float[np.ndarray, "B ..."] | None = None,
    labels: Int[np.ndarray, " B"] | None = None,
    loss: str = "softmax_cross_entropy",
    input_range: tuple[float, float] = (0.0, 1.0),
    noise: Sequence[float] = SIGMAS,
    shapes_only: bool = False,
    seed: int = 0,
    name: str = "model",
    progress: Tell | None = None,
) -> Audit:
    """Audit a model, its layers and its gradient at a batch of images.

    Arguments:
    - `model`: anything that `read_model` takes; `input_shape` (H, W, C), of one example;
    - `images` (B, H, W, C) in `input_range` with `labels` (B,): the B examples of one gradient; without them a random
      smooth image drawn with `seed`;
    - `noise`: standard deviations of Gaussian noise in every gradient entry, for the bounds;
    - `shapes_only`: count on shapes alone, without weights or images, in milliseconds;
    - `name`: what the report calls the model; `progress` hears of every stage.

    A model that cannot be read layer by layer is audited as one map. Raises `InputError` for bad arguments.
    """
    tell = progress or (lambda stage: None)
    read = read_model(model)
    shape = _check_shape(input_shape)
    _check_options(loss, input_range, noise)
    tell("reading the model")
    segments, remarks = _segments(read, shape, checked=not shapes_only)
    geometries = [s.geometry for s in segments] or [_whole(read, shape)]
    names = [s.name for s in segments] or ["network"]
    numeric: Sequence[LayerLeakage | None] = [None] * len(geometries)
    leakage, batch = None, 1
    points: tuple[NoisePoint, ...] | None = None
    spectrum: tuple[float, ...] | None = None
    low, high = input_range
    if not shapes_only:
        x, y = _batch(read, shape, images, labels, input_range, seed)
        batch = len(x)
        n = x.size
        dense = n <= LARGEST and fits_in_memory(6 * 8 * n**2)
        with compute_in("float64"):
            wide = read.astype("float64")
            gradient = _gradient(wide, shape, batch, loss)
            arrays = dict(wide.variables), jnp.asarray(x), jnp.asarray(y)
            if dense:
                if segments:
                    tell("looking at every layer")
                    numeric = _numeric_layers(wide, shape, x[:1], y[:1], loss)
                tell("building the Jacobian")
                leakage = dense_leakage(gradient, *arrays, high - low)
                tell("bounding what noise leaves")
                points = _noise_points(leakage, x.shape, noise)
            elif noise:
                tell("estimating the spectrum")
                points, spectrum, remark = _estimated_points(gradient, arrays, high - low, noise, seed)
                remarks.append(f"{n:,} unknowns are too many for dense matrices: {remark}")
    ranks = [m.rank if m is not None and m.rank is not None else None for m in numeric]
    counts = [structural_count(g) for g in geometries]
    if not segments and leakage is not None:
        ranks = [leakage.rank]
    deficiencies = [
        (counts[i].rank if rank is None else rank) - g.unknowns
        for i, (g, rank) in enumerate(zip(geometries, ranks, strict=True))
    ]
    c_m, rounded = copa_index(deficiencies)
    weights = layer_weights(len(geometries))
    shares = [1.0 if m is None else m.known_share for m in numeric]
    structural = structural_leaked(geometries, shares=shares)
    unknowns = batch * geometries[0].unknowns
    if batch > 1:
        remarks.append(f"layers are those of the first of {batch} images; leaked dimensions are all images' together")
    leaked = None if leakage is None else leakage.rank
    if leakage is not None:
        spectrum = tuple(np.sqrt(leakage.values[::-1]).tolist())
    status, sentence = verdict(
        min(structural, unknowns) if leaked is None else leaked,
        geometries[0].unknowns if leaked is None else unknowns,
        numeric=leaked is not None,
    )
    chosen = smallest_withheld(geometries)
    seen = None if leakage is None else leakage.map
    spread = None
    if leakage is not None and noise:
        spread = np.sqrt(variances(leakage, noise[0])).reshape(leakage.map.shape)
    return Audit(
        model=name,
        input_shape=shape,
        examples=batch,
        c_m=c_m,
        c_m_rounded=rounded,
        layers=tuple(
            _layer(names[i], geometry, ranks[i], weights[i], numeric[i], _size(read, segments, i))
            for i, geometry in enumerate(geometries)
        ),
        unknowns=unknowns,
        structural_leaked_dimensions=structural,
        leaked_dimensions=leaked,
        leaked_dimensions_error=None,
        leaked_fraction=None if leaked is None else leaked / unknowns,
        unseen_pixels=None if seen is None else int(np.sum(np.max(seen, axis=-1) < UNSEEN)),
        spectrum=spectrum,
        noise=points,
        verdict=status,
        sentence=sentence,
        changes=best_changes(names, geometries, shares) if segments else (),
        withheld=() if chosen is None else (Withheld(tuple(names[i] for i in chosen[0]), chosen[1]),),
        remarks=tuple(remarks),
        leakage_map=seen,
        uncertainty=spread,
    )


def _check_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in input_shape)
    except (TypeError, ValueError):
        raise InputError(f"input_shape must be a sequence of sizes like (32, 32, 3), got {input_shape!r}") from None
    if not shape or min(shape) < 1:
        raise InputError(f"input_shape must hold positive sizes, got {tuple(input_shape)}")
    return shape


def _check_options(loss: str, input_range: tuple[float, float], noise: Sequence[float]) -> None:
    if loss not in LOSSES:
        raise unknown_name("loss", loss, LOSSES)
    low, high = input_range
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise InputError(f"input_range must be (low, high) with low below high, got {input_range}")
    for sigma in noise:
        if not (np.isfinite(sigma) and sigma > 0):
            raise InputError(f"noise must hold positive standard deviations, got {sigma}; leave out 0, it is no noise")


def _segments(model: Model, shape: tuple[int, ...], *, checked: bool) -> tuple[tuple[Segment, ...], list[str]]:
    """The model's layers at one example; none, and the reason, where it cannot be read."""
    try:
        return read_segments(model, shape, jnp.float32, checked=checked).segments, []
    except UnreadableModelError as error:
        return (), [f"not readable layer by layer, audited as one map: {error}"]


def _whole(model: Model, shape: tuple[int, ...]) -> Geometry:
    outputs = output_count(model, shape)
    return Geometry(math.prod(shape), outputs, sum(int(p.size) for p in model.params.values()), simple=False)


def _size(model: Model, segments: Sequence[Segment], i: int) -> int:
    paths = segments[i].paths if segments else tuple(model.params)
    return sum(int(np.prod(model.params[path].shape)) for path in paths)


def _layer(
    name: str, geometry: Geometry, rank: int | None, weight: float, numeric: LayerLeakage | None, parameters: int
) -> LayerAudit:
    count, dead = structural_count(geometry), dead_pixels(geometry)
    known = None if numeric is None else numeric.known_share
    depth = None if numeric is None else numeric.pull_back_depth
    return LayerAudit(
        name=name,
        unknowns=geometry.unknowns,
        rank=rank,
        rank_deficiency=None if rank is None else rank - geometry.unknowns,
        structural_rank=count.rank,
        structural_exact=count.exact,
        condition=None if numeric is None else numeric.condition,
        dead_pixels=dead,
        weight=weight,
        known_share=known,
        pull_back_depth=depth,
        parameters=parameters,
        sentence=layer_sentence(geometry.unknowns, count, rank, dead, known, depth),
    )


def _batch(
    model: Model,
    shape: tuple[int, ...],
    images: Any,
    labels: Any,
    input_range: tuple[float, float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, *shape) and labels (B,), given or drawn."""
    outputs = max(output_count(model, shape), 2)
    low, high = input_range
    key, other = jax.random.split(jax.random.key(seed))
    if images is None:
        if labels is not None:
            raise InputError("labels go with images; without images both are drawn with seed")
        noise = jax.random.normal(key, (1, *shape))
        drawn = np.clip(0.5 + PRIOR_DEVIATION * np.asarray(from_natural(noise)), 0.0, 1.0)
        return low + (high - low) * drawn.astype(float), np.asarray(jax.random.randint(other, (1,), 0, outputs))
    x = np.asarray(images, float)
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape or not len(x):
        raise InputError(f"images must have shape (B, {', '.join(map(str, shape))}) with B >= 1, got {x.shape}")
    if not np.all(np.isfinite(x)) or x.min() < low or x.max() > high:
        raise InputError(f"images must lie in input_range {input_range}, got {x.min():g} to {x.max():g}")
    if labels is None:
        return x, np.asarray(jax.random.randint(other, (len(x),), 0, outputs))
    y = np.asarray(labels)
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= outputs:
        raise InputError(f"labels must be {len(x)} integers in 0..{outputs - 1}, got {y.tolist()}")
    return x, y


def _numeric_layers(model: Model, shape: tuple[int, ...], x: Any, y: Any, loss: str) -> list[LayerLeakage]:
    segments = read_segments(model, shape, jnp.float64).segments
    images, head = jnp.asarray(x), segments[-1]
    z = push_forward(segments, model.variables, images)[1][-1]

    def mean_loss(z: Array) -> Array:
        logits = head.activation.function(model.variables, z)
        return jnp.mean(jax.vmap(LOSSES[loss])(logits, jnp.asarray(y)))

    return layer_leakage(segments, model.variables, images, jax.grad(mean_loss)(z))


def _gradient(model: Model, shape: tuple[int, ...], examples: int, loss: str) -> Any:
    return batch_gradient(read_network(model, shape, examples, jnp.float64).logits, loss, tuple(model.params))


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
