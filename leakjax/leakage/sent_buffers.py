"""What new running statistics, sent beside a gradient, add to what an audit counts.

A train-mode batch norm leaves a mixture of the batch's own mean and variance in its buffers. Who has the old and the
new ones knows both: rows of the Jacobian like any other, and statistics that no layer has to find. Other buffers that
the data move are rows alone, and so many numbers more.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.errors import InputError
from leakjax.models.reader import Model
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment, told_statistics
from leakjax.segments.sent_statistics import read_sent_statistics, sums_in_buffers
from leakjax.segments.tracing.network import Gradient

NOT_COUNTED = (
    "the new running statistics ({names}) are not counted: where clients send them with the gradient, ask for them too "
    "(buffers=True, --buffers)"
)
BEHIND_ROUNDING = "new running statistics are not counted: an operation hides the images from the derivative"
_NONE = (
    "buffers: no running statistics of the batch are left behind by this model: no buffer of floating numbers depends "
    "on the images. Let it run in training mode (train=True, --train), or leave buffers out (--buffers)"
)


class SentBuffers(NamedTuple):
    """The `names` of the sums over the data that new buffers tell, the buffers' `paths`, and how many `numbers` they
    are; `step(variables, x)` -> (logits, buffers by path)."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    numbers: int
    step: Any


def read_buffers(model: Model, input_shape: Sequence[int], dtype: Any) -> SentBuffers | None:
    """What a model's step leaves of the batch in its buffers; None where it leaves nothing."""
    if model.step is None:
        return None
    floating = tuple(path for path, a in model.buffers.items() if jnp.issubdtype(a.dtype, jnp.floating))
    if not floating:
        return None
    names, paths = sums_in_buffers(model, floating, input_shape, dtype)
    numbers = sum(math.prod(model.buffers[path].shape) for path in paths)
    return SentBuffers(names, paths, numbers, model.step) if paths else None


def solved_buffers(found: SentBuffers, model: Model, x: Any, limits: tuple[float, float]) -> SentBuffers:
    """`found`, with the names of those sums alone that the buffers after images x (B, ...) determine: with a momentum
    of 1, none."""
    new = {path: np.asarray(a)[None] for path, a in found.step(model.variables, jnp.asarray(x))[1].items()}
    sent = {path: new[path] for path in found.paths}
    eps = float(jnp.finfo(x.dtype).eps)
    solved, _ = read_sent_statistics(model, sent, x.shape[1:], limits, len(x), x.dtype, eps)
    return found._replace(names=tuple(name for name in found.names if name in solved))


def needed_buffers(found: SentBuffers | None) -> SentBuffers:
    """`found`; raises `InputError` where that is nothing."""
    if found is None:
        raise InputError(_NONE)
    return found


def with_told(segments: Sequence[Segment], buffers: SentBuffers) -> tuple[tuple[Segment, ...], int]:
    """(the segments, normalizations of which all statistics are told being affine; the numbers that no count of a
    normalization holds)."""
    found, counted = [], 0
    for segment in segments:
        known = told_statistics(segment, buffers.names)
        norm = known.geometry.normalization
        if known is not segment and norm is not None:
            counted += 2 * known.geometry.unknowns // norm.entries
            geometry = known.geometry._replace(normalization=norm._replace(told=True))
            known = dataclasses.replace(known, geometry=geometry)
        found.append(known)
    return tuple(found), max(buffers.numbers - counted, 0)


def measured(segments: Sequence[Segment], xs: Sequence[Any], variables: Any) -> dict[str, Any]:
    """The statistics of the segments that are told, at the inputs of each."""
    values: dict[str, Any] = {}
    for segment, x in zip(segments, xs, strict=True):
        if segment.statistics is not None and segment.normalizes and segment.nonlinearity is None:
            values |= segment.statistics.measure(variables, x)
    return values


@keep(32)
def with_buffers(gradient: Gradient, step: Any, paths: tuple[str, ...]) -> Gradient:
    """`gradient`, and the new buffers under their paths."""

    def both(variables: Any, x: Any, labels: Any, *given: Any) -> dict[str, jax.Array]:
        after = step(variables, x)[1]
        return {**gradient(variables, x, labels, *given), **{path: after[path] for path in paths}}

    return both
