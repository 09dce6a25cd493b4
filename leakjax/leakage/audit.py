"""`audit`: how much a model leaks of the images it is trained on, why, and what would help."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from leakjax.arguments import instance, listener
from leakjax.errors import InputError, UnreadableModelError
from leakjax.files.provenance import provenance
from leakjax.leakage.dense import variances
from leakjax.leakage.inputs import batch_of, check_options, check_runs, check_seed, check_shape, check_size
from leakjax.leakage.layers import LayerLeakage
from leakjax.leakage.measure import in_precision, measure, measure_without
from leakjax.leakage.privacy import DPSGD
from leakjax.leakage.request import Asked, Measured, Tell
from leakjax.leakage.sentences import layer_sentence
from leakjax.leakage.structural.advice import best_changes, dead_pixels
from leakjax.leakage.structural.counts import Count, padded_count, structural_count
from leakjax.leakage.structural.index import copa_index, layer_weights, smallest_withheld, structural_leaked
from leakjax.leakage.verdict import Found, verdict
from leakjax.models.reader import Model, output_count, read_model
from leakjax.report.audit.audit import Audit
from leakjax.report.audit.record import LayerAudit, Withheld
from leakjax.runtime.precision import compute_in
from leakjax.segments.batch_statistics import batch_remarks
from leakjax.segments.chain import Segment, read_segments
from leakjax.segments.geometry import Geometry

SIGMAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
UNSEEN = 1e-6


def audit(
    model: Any,
    input_shape: Sequence[int],
    *,
    images: Float[np.ndarray, "B ..."] | None = None,
    labels: Int[np.ndarray, " B"] | None = None,
    loss: str = "softmax_cross_entropy",
    input_range: tuple[float, float] = (0.0, 1.0),
    noise: Sequence[float] = SIGMAS,
    dp_sgd: DPSGD | None = None,
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
    - `dp_sgd`: a DP-SGD whose clipping and noise are to be bounded too, with its epsilon (needs `leakjax[dp]`);
    - `shapes_only`: count on shapes alone, without weights or images, in milliseconds;
    - `name`: what the report calls the model; `progress` hears of every stage.

    A model that cannot be read layer by layer is audited as one map. Raises `InputError` for bad arguments.
    """
    listener("progress", progress)
    if dp_sgd is not None:
        instance("dp_sgd", dp_sgd, DPSGD, "a DPSGD of clip and noise_multipliers")
    tell = progress or (lambda stage: None)
    read = read_model(model)
    shape = check_shape(input_shape)
    limits, sigmas = check_options(loss, input_range, noise)
    if shapes_only and dp_sgd is not None:
        raise InputError("dp_sgd needs a gradient to clip; leave out shapes_only")
    seed = check_seed(seed)
    epsilons = [] if dp_sgd is None else dp_sgd.epsilons()
    if dp_sgd is not None:
        for multiplier in dp_sgd.noise_multipliers:
            check_size("clip times noise_multiplier", dp_sgd.sigma(multiplier, 1))
    dtype = jnp.dtype("float32" if shapes_only else "float64")
    with compute_in(dtype.name):
        tell("reading the model")
        check_runs(read, shape)
        read, remarks = in_precision(read, shape, dtype)
        segments, unreadable = _segments(read, shape, dtype, checked=not shapes_only)
        remarks += unreadable
        remarks += () if shapes_only else batch_remarks(read, shape, dtype)
        geometries = [s.geometry for s in segments] or [_whole(read, shape)]
        names = [s.name for s in segments] or ["network"]
        chosen = smallest_withheld(geometries)
        found, batch = Measured(), 1
        withheld = [] if chosen is None else [Withheld(tuple(names[i] for i in chosen[0]), chosen[1])]
        if not shapes_only:
            x, y = batch_of(read, shape, images, labels, limits, seed)
            batch, asked = (
                len(x),
                Asked(
                    loss=loss,
                    limits=limits,
                    noise=sigmas,
                    dp_sgd=dp_sgd,
                    epsilons=epsilons,
                    seed=seed,
                    tell=tell,
                    asked=noise is not SIGMAS,
                ),
            )
            found = measure(read, segments, x, y, asked)
            if chosen is not None and segments and found.leakage is not None and not found.doubt.spots:
                paths = {path for i in chosen[0] for path in segments[i].paths}
                rank, remaining = measure_without(read, x, y, asked, paths)
                withheld = [dataclasses.replace(withheld[0], measured_dimensions=rank, leakage_map=remaining)]
    remarks += found.remarks
    if batch > 1:
        remarks.append(
            f"layers are those of the first of {batch} images, changes and layers to withhold are counted for one; "
            "leaked dimensions are all images' together"
        )
    numeric = found.layers or [None] * len(geometries)
    leakage = found.leakage
    ranks = [None if layer is None else layer.rank for layer in numeric]
    counts = [structural_count(g) for g in geometries]
    if not segments and leakage is not None and batch == 1:
        ranks = [leakage.rank]
    deficiencies = [
        (counts[i].rank if rank is None else rank) - g.unknowns
        for i, (g, rank) in enumerate(zip(geometries, ranks, strict=True))
    ]
    c_m, rounded = copa_index(deficiencies)
    weights = layer_weights(len(geometries))
    shares = [1.0 if m is None else m.passing_share for m in numeric]
    unknowns = batch * geometries[0].unknowns
    numbers = sum(int(np.prod(p.shape)) for p in read.params.values())
    structural, possible = (
        min(batch * structural_leaked(geometries, shares=s), max(numbers, 1), unknowns) for s in (shares, None)
    )
    leaked = None if leakage is None else leakage.rank
    status, sentence = verdict(
        Found(
            leaked=leaked,
            structural=structural,
            possible=possible,
            unknowns=unknowns,
            examples=batch,
            channels=shape[-1],
            doubt=found.doubt,
            noise=found.points or (),
            asked=not shapes_only and (dp_sgd is not None or (noise is not SIGMAS and bool(sigmas))),
        )
    )
    spread = None
    if leakage is not None and sigmas and found.points is not None:
        spread = np.sqrt(variances(leakage, sigmas[0])).reshape(leakage.map.shape)
    return Audit(
        model=name,
        input_shape=shape,
        examples=batch,
        c_m=c_m,
        c_m_rounded=rounded,
        layers=tuple(
            _layer(
                names[i],
                geometry,
                counts[i],
                ranks[i],
                weights[i],
                numeric[i],
                _size(read, segments, i),
                head=bool(segments) and i == len(segments) - 1,
            )
            for i, geometry in enumerate(geometries)
        ),
        unknowns=unknowns,
        structural_leaked_dimensions=structural,
        leaked_dimensions=leaked,
        leaked_fraction=None if leaked is None else leaked / unknowns,
        unseen_pixels=None if leakage is None else int(np.sum(np.max(leakage.map, axis=-1) < UNSEEN)),
        spectrum=found.spectrum,
        noise=found.points,
        verdict=status,
        sentence=sentence,
        changes=best_changes(names, geometries, shares) if segments else (),
        withheld=tuple(withheld),
        remarks=tuple(remarks),
        leakage_map=found.map,
        uncertainty=spread,
        blind=found.doubt.spots,
        seed=seed,
        loss=loss,
        data=_data(images, batch, seed, shapes_only),
        **provenance(),
    )


def _data(images: Any, examples: int, seed: int, shapes_only: bool) -> str:
    """What the audit looked at, in words."""
    if shapes_only:
        return "none: shapes only"
    if images is None:
        return f"a random image drawn with seed {seed}"
    return f"{examples} image{'' if examples == 1 else 's'} given by the caller"


def _segments(
    model: Model, shape: tuple[int, ...], dtype: Any, *, checked: bool
) -> tuple[tuple[Segment, ...], list[str]]:
    """The model's layers at one example; none, and the reason, where it cannot be read."""
    try:
        return read_segments(model, shape, dtype, checked=checked).segments, []
    except UnreadableModelError as error:
        return (), [f"not readable layer by layer, audited as one map: {error}"]
    except InputError:
        raise
    except (TypeError, ValueError, NotImplementedError, KeyError) as error:  # integers between layers, for one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (), [f"not readable layer by layer, audited as one map: {reason}"]


def _whole(model: Model, shape: tuple[int, ...]) -> Geometry:
    outputs = output_count(model, shape)
    return Geometry(math.prod(shape), outputs, sum(int(p.size) for p in model.params.values()), simple=False)


def _size(model: Model, segments: Sequence[Segment], i: int) -> int:
    paths = segments[i].paths if segments else tuple(model.params)
    return sum(int(np.prod(model.params[path].shape)) for path in paths)


def _layer(
    name: str,
    geometry: Geometry,
    count: Count,
    rank: int | None,
    weight: float,
    numeric: LayerLeakage | None,
    parameters: int,
    *,
    head: bool,
) -> LayerAudit:
    dead = dead_pixels(geometry)
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
        padded=padded_count(geometry, count.rank if rank is None else rank, head=head),
        sentence=layer_sentence(geometry.unknowns, count, rank, dead, known, depth),
    )
