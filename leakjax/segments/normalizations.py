"""What the normalizations of a chain take their means and variances over, found by derivatives of these.

A statistic t of a normalization depends on the entries x of which it is a sum: dt/dx is 0 elsewhere, and not there.
So a chain of two examples at random x tells batch norm from instance, group and layer norm, whatever their code.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from leakjax.errors import InputError, UnreadableModelError
from leakjax.models.reader import Model
from leakjax.segments.chain import Segment, read_chain
from leakjax.segments.geometry import Geometry, Normalization

_ALIKE = 1e-2
"""Of the largest entry of a normalized x: what it may change by where x is moved and scaled."""


def with_normalizations(
    model: Model, input_shape: Sequence[int], dtype: Any, segments: Sequence[Segment]
) -> tuple[Segment, ...]:
    """The `segments` of a model, those that normalize with what they do so by in their geometry, where it can be told.

    It cannot where a norm subtracts no mean, where entries share statistics in another way than as `Normalization` has
    it, or where the model takes no batch of two.
    """
    if not any(segment.normalizes for segment in segments):
        return tuple(segments)
    try:
        pairs = read_chain(model, input_shape, dtype, 2, checked=False).segments
    except (InputError, UnreadableModelError, TypeError, ValueError):
        return tuple(segments)
    if [s.name for s in pairs] != [s.name for s in segments]:
        return tuple(segments)
    found = []
    for i, segment in enumerate(segments):
        before = segments[i - 1] if i else None
        direct = before is not None and _leads_directly(before, segment)
        read = _read(model, pairs[i], before.geometry if direct and before else None) if segment.normalizes else None
        geometry = segment.geometry._replace(normalization=read)
        found.append(segment if read is None else dataclasses.replace(segment, geometry=geometry))
    return tuple(found)


def _leads_directly(before: Segment, segment: Segment) -> bool:
    """Whether a normalization acts on the very outputs of one simple map."""
    plain = before.linear and before.activation.name == "identity" and before.geometry.simple
    return plain and before.output.shape == segment.input.shape


def _read(model: Model, segment: Segment, before: Geometry | None) -> Normalization | None:
    """Arguments: `segment`, of two examples; the geometry `before` it, None where the input is no simple map's."""
    statistics, draw = segment.statistics, np.random.default_rng(0)
    assert statistics is not None, "a normalization"
    own = {path: draw.normal(size=model.variables[path].shape) for path in segment.paths}
    dtype = segment.input.dtype
    variables = {**model.variables, **{path: jnp.asarray(a, dtype) for path, a in own.items()}}
    x = jnp.asarray(draw.normal(size=segment.input.shape), dtype)
    z = [np.asarray(segment.whole(variables, moved)) for moved in (x, x + 3, 9 * x)]
    if not max(np.max(np.abs(other - z[0])) for other in z[1:]) <= _ALIKE * np.max(np.abs(z[0])):
        return None

    def first(x: jax.Array) -> list[jax.Array]:
        return [jnp.ravel(t)[0] for t in statistics.measure(variables, x).values()]

    masks = [np.asarray(mask) != 0 for mask in jax.jacrev(first)(x)]
    if any(not np.array_equal(mask, masks[0]) for mask in masks):
        return None
    return _pattern(masks[0], before)


def _pattern(mask: Bool[np.ndarray, "2 ..."], before: Geometry | None) -> Normalization | None:
    """What shares its first statistic: `mask` of two examples.

    Arguments: the geometry of the map `before`, None without one; its sizes tell the axis of its features.
    """
    outputs = None if before is None else [(axis.after or axis.kernel).outputs for axis in before.axes]
    for axis in range(mask.ndim - 1, 0, -1):
        each = np.moveaxis(mask, axis, -1)
        if before is not None and each.shape[1:] != (*(outputs or ()), before.features):
            continue
        last = each.ndim - 1
        examples, channels = np.any(each, tuple(range(1, each.ndim))), np.any(each, tuple(range(last)))
        positions = np.asarray(np.any(each, (0, last)))
        product = examples.reshape(-1, *[1] * last) * positions[None, ..., None] * channels
        over_examples, over_positions = bool(examples.all()), bool(positions.all())
        if not np.array_equal(product, each) or not (over_positions or positions.sum() == 1):
            continue
        if over_examples and not (over_positions and channels.sum() == 1):
            continue
        return Normalization(
            over_examples=over_examples,
            over_positions=over_positions,
            channels=int(channels.sum()),
            entries=int(mask[0].sum()),
            direct=before is not None,
        )
    return None
