"""Pixels of [0, 1] as a model sees them: x = (pixel - mean) / std, channel by channel."""

from typing import Any

import numpy as np
from jaxtyping import Float

from leakjax.arguments import LARGEST, real, several, shown
from leakjax.errors import InputError

NAMES = ("input_mean", "input_std")
Numbers = tuple[float, ...]
Limits = tuple[float, float] | tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]


def check_normalization(mean: Any, std: Any, names: tuple[str, str] = NAMES) -> tuple[Any, Any]:
    """(mean, std) as tuples of equally many numbers, or (None, None); one number goes for all of the other's."""
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise InputError(f"{names[0]} and {names[1]} go together: give both, or neither")
    means, stds = _numbers(names[0], mean), _numbers(names[1], std)
    count = max(len(means), len(stds))
    means, stds = spread(means, count, names), spread(stds, count, names)
    if min(stds) <= 0:
        raise InputError(f"{names[1]} must hold numbers above 0, got {shown(std)}")
    low, high = channel_limits(means, stds)
    if not (np.all(low < high) and max(np.abs(low).max(), np.abs(high).max()) <= LARGEST):
        raise InputError(f"{names[0]} and {names[1]} put pixels of [0, 1] where none can be told from another")
    return means, stds


def spread(numbers: Numbers, channels: int, names: tuple[str, str] = NAMES) -> Numbers:
    """One number a channel, of one for each or one for all."""
    if len(numbers) not in (1, channels):
        raise InputError(
            f"{' and '.join(names)} must hold {channels} numbers, one a channel, or one for all; got {len(numbers)}"
        )
    return numbers if len(numbers) == channels else numbers * channels


def channel_limits(mean: Numbers, std: Numbers) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """What pixels 0 and 1 become, by channel."""
    means, stds = np.asarray(mean), np.asarray(std)
    with np.errstate(over="ignore"):
        return -means / stds, (1.0 - means) / stds


def hull(mean: Numbers, std: Numbers) -> tuple[float, float]:
    """The least and the greatest value that a pixel of any channel becomes."""
    low, high = channel_limits(mean, std)
    return float(low.min()), float(high.max())


def _numbers(name: str, value: Any) -> Numbers:
    wanted = "a sequence of numbers, one per channel"
    parts = several(name, value, wanted)
    if not parts:
        raise InputError(f"{name} must be {wanted}, got none")
    return tuple(real(name, part, wanted) for part in parts)
