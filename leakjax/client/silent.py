"""Gradients that say nothing, and what an answer is where some of a call's gradients are such."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from leakjax.reconstruction import Certificate, Reconstruction

Gradients = Mapping[str, Shaped[np.ndarray, "V ..."]]

SMALLEST = 1e-100
"""Of a gradient's largest entry: the squares of smaller ones, summed, come near the smallest number."""

_DECAYED, _ROUNDINGS = 1e-14, 50
"""What is left of a gradient when weight decay is subtracted, as a share of it, that is rounding: units of the client's
own, and no less."""

ZERO = (
    "the gradient is zero everywhere, or below 1e-100: it carries no information (the loss is at a minimum, "
    "or a saturated softmax underflowed)"
)
_DECAY = "weight_decay {decay:g} times the weights is all there is in the gradient: it carries no information"


def largest_entries(gradients: Gradients) -> np.ndarray:
    """max |g| of every victim's gradient."""
    return np.max([np.max(np.abs(_rows(g)), axis=1, initial=0.0) for g in gradients.values()], axis=0)


def without_decay(gradients: Gradients, params: Mapping[str, Any], decay: float) -> tuple[Gradients, np.ndarray]:
    """Each victim's g = s - lambda theta of what was sent, s, and ||s|| / ||g||: by how much more rounding weighs."""
    victims = len(next(iter(gradients.values())))
    if decay == 0:
        return gradients, np.ones(victims)
    left = {p: np.asarray(g, float) - decay * np.asarray(params[p], float) for p, g in gradients.items()}
    before, after = _sizes(gradients), _sizes(left)
    least = np.maximum(1e-3 * _DECAYED * before, np.finfo(float).tiny)  # so that nothing overflows
    return left, np.maximum(before / np.maximum(after, least), 1.0)


def silent_victims(observation: Any) -> dict[int, str]:
    """By victim of an `Observation` whose gradient says nothing, why."""
    gradients, decay = observation.gradients, observation.weight_decay
    entries = largest_entries(gradients)
    found = {int(v): ZERO for v in np.flatnonzero(entries < SMALLEST)}
    if decay:
        _, amplified = without_decay(gradients, observation.model.params, decay)
        rounding = max(float(jnp.finfo(observation.precision).eps), _DECAYED / _ROUNDINGS)
        found |= {int(v): _DECAY.format(decay=decay) for v in np.flatnonzero(amplified * rounding * _ROUNDINGS >= 1)}
    return found


def with_silent(
    found: Reconstruction, silent: Mapping[int, str], victims: int, input_range: tuple[float, float]
) -> Reconstruction:
    """The answer for all `victims` from that for those that are not silent; these are `failed`, at mid-range."""
    size = len(found.images) // (victims - len(silent))
    heard = [v for v in range(victims) if v not in silent]
    source = np.full(victims * size, -1)
    source[[v * size + b for v in heard for b in range(size)]] = np.arange(len(found.images))
    shape = found.images.shape[1:]

    def spread(values: np.ndarray, missing: Any) -> np.ndarray:
        whole = np.full((len(source), *values.shape[1:]), missing, values.dtype)
        whole[source >= 0] = values
        return whole

    def listed(values: Sequence[Any], missing: Any) -> tuple[Any, ...]:
        return tuple(values[k] if k >= 0 else missing for k in source)

    failed = [Certificate.failure(int(np.prod(shape)), None, "head", silent.get(k // size)) for k in range(len(source))]
    return dataclasses.replace(
        found,
        images=spread(found.images, 0.5 * sum(input_range)),
        labels=spread(found.labels, -1),
        determined=spread(found.determined, 0.0),
        gradient_residual=spread(found.gradient_residual, np.inf),
        certificates=tuple(found.certificates[k] if k >= 0 else failed[i] for i, k in enumerate(source)),
        layers=listed(found.layers, ()),
        candidates=listed(found.candidates, ()),
        gradient_scale=spread(found.gradient_scale, 1.0),
        targets=listed(found.targets, None),
    )


def _rows(g: Any) -> np.ndarray:
    return np.asarray(g, float).reshape(len(g), -1)


def _sizes(gradients: Gradients) -> np.ndarray:
    """||g|| of every victim."""
    return np.sqrt(np.sum([np.sum(_rows(g) ** 2, axis=1) for g in gradients.values()], axis=0))
