"""From what an audit read and measured to its record: counts, index, verdict and sentences."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from leakjax.files.provenance import provenance
from leakjax.leakage.dense import variances
from leakjax.leakage.request import Asked, Measured
from leakjax.leakage.sentences import constants_remarks, layer_sentence
from leakjax.leakage.structural.advice import best_changes, dead_pixels
from leakjax.leakage.structural.counts import padded_count
from leakjax.leakage.structural.index import LayerCount, copa_index, layer_counts, layer_weights, structural_leaked
from leakjax.leakage.verdict import Found, verdict
from leakjax.models.losses import loss_name
from leakjax.models.reader import Model
from leakjax.report.audit.audit import Audit
from leakjax.report.audit.record import UNSEEN, Change, LayerAudit, Withheld
from leakjax.segments.chain import Segment
from leakjax.segments.geometry import Geometry


class Structure(NamedTuple):
    """A model as an audit reads it: its `segments`, () where it is looked at as one map, the `names` and `geometries`
    of its layers, and `remarks` on how it was read; how many numbers of running statistics
    are `told` beside the gradient, and how many of these are no normalization's of the layers, but `others`."""

    model: Model
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    names: list[str]
    geometries: list[Geometry]
    remarks: list[str]
    told: int = 0
    others: int = 0


class Examined(NamedTuple):
    """What was `measured` of a gradient of so many `examples`, the layers whose gradients could be `withheld`,
    and the `images` (B, *shape), pixels in [0, 1], None on shapes alone."""

    measured: Measured
    examples: int
    withheld: tuple[Withheld, ...]
    images: Any = None


def assemble(structure: Structure, examined: Examined, asked: Asked, name: str, data: str, *, bounded: bool) -> Audit:
    """The audit of a model called `name`; `bounded`: whether bounds under noise were asked for by the caller."""
    found, batch = examined.measured, examined.examples
    geometries, leakage = structure.geometries, found.leakage
    ranks = _ranks(structure, examined)
    counts = layer_counts(geometries)
    counted = [count.rank if rank is None else rank for count, rank in zip(counts, ranks, strict=True)]
    c_m, rounded = copa_index([rank - g.unknowns for g, rank in zip(geometries, counted, strict=True)])
    shares = [1.0] * len(geometries)
    if batch == 1 and found.layers:  # those of a batch are looked at for its first image alone
        shares = [layer.passing_share for layer in found.layers]
    unknowns = batch * geometries[0].unknowns
    numbers = structure.told + sum(int(np.prod(p.shape)) for p in structure.model.params.values())
    structural, possible = (
        min(structural_leaked(geometries, shares=s, examples=batch) + structure.others, max(numbers, 1), unknowns)
        for s in (shares, None)
    )
    leaked = None if leakage is None else leakage.rank
    status, sentence = verdict(
        Found(
            leaked=leaked,
            structural=structural,
            possible=possible,
            unknowns=unknowns,
            examples=batch,
            channels=structure.shape[-1],
            doubt=found.doubt,
            noise=found.points or (),
            asked=bounded,
        )
    )
    spread = None
    if leakage is not None and asked.noise and found.points is not None:
        spread = np.sqrt(variances(leakage, asked.noise[0])).reshape(leakage.map.shape)
    return Audit(
        model=name,
        input_shape=structure.shape,
        examples=batch,
        c_m=c_m,
        c_m_rounded=rounded,
        layers=_layers(structure, found, ranks, counts),
        unknowns=unknowns,
        structural_leaked_dimensions=structural,
        leaked_dimensions=leaked,
        leaked_fraction=None if leaked is None else leaked / unknowns,
        unseen_pixels=None if leakage is None else int(np.sum(np.max(leakage.map, axis=-1) < UNSEEN)),
        spectrum=found.spectrum,
        noise=found.points,
        verdict=status,
        sentence=sentence,
        changes=_changes(structure, shares, unknowns) if structure.segments else (),
        withheld=examined.withheld,
        remarks=(*structure.remarks, *found.remarks, *_of_batches(batch), *constants_remarks(counts, geometries)),
        leakage_map=found.map,
        uncertainty=spread,
        images=examined.images if found.pictures else None,
        pictures=found.pictures,
        blind=found.doubt.spots,
        seed=asked.seed,
        loss=loss_name(asked.loss),
        data=data,
        **provenance(),
    )


def _changes(structure: Structure, shares: Sequence[float], unknowns: int) -> tuple[Change, ...]:
    """The best changes, with what is told beside the layers' own numbers."""
    found = best_changes(structure.names, structure.geometries, shares)
    most = [min(change.leaked_dimensions + structure.others, unknowns) for change in found]
    return tuple(dataclasses.replace(c, leaked_dimensions=n) for c, n in zip(found, most, strict=True))


def _ranks(structure: Structure, examined: Examined) -> list[int | None]:
    """The measured rank of every layer; of a model that is one map, the rank of one example's gradient."""
    found = examined.measured
    if not structure.segments and found.leakage is not None and examined.examples == 1:
        return [found.leakage.rank]
    return [layer.rank for layer in found.layers] or [None] * len(structure.geometries)


def _of_batches(examples: int) -> list[str]:
    if examples == 1:
        return []
    return [
        f"layers are those of the first of {examples} images, changes and layers to withhold are counted for one; "
        "leaked dimensions are all images' together"
    ]


def _layers(
    structure: Structure, found: Measured, ranks: Sequence[int | None], counts: Sequence[LayerCount]
) -> tuple[LayerAudit, ...]:
    return tuple(
        _layer(structure, found, i, rank, count) for i, (rank, count) in enumerate(zip(ranks, counts, strict=True))
    )


def _layer(structure: Structure, found: Measured, i: int, rank: int | None, count: LayerCount) -> LayerAudit:
    geometry, numeric = structure.geometries[i], found.layers[i] if found.layers else None
    dead, weight = dead_pixels(geometry), layer_weights(len(structure.geometries))[i]
    known = None if numeric is None else numeric.known_share
    depth = None if numeric is None else numeric.pull_back_depth
    head = bool(structure.segments) and i == len(structure.segments) - 1
    return LayerAudit(
        name=structure.names[i],
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
        parameters=_parameters(structure.model, structure.segments, i),
        padded=padded_count(geometry, count.rank if rank is None else rank, head=head),
        sentence=layer_sentence(geometry, count, rank, dead, known, depth),
    )


def _parameters(model: Model, segments: Sequence[Segment], i: int) -> int:
    paths: Any = segments[i].paths if segments else tuple(model.params)
    return sum(int(np.prod(model.params[path].shape)) for path in paths)
