"""What the outputs of an example are compared with: of which kind, and in which shape."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from leakjax.arguments import array
from leakjax.errors import InputError
from leakjax.models.losses import labels_of

TargetKind = Literal["class", "classes", "several", "probabilities", "values", "input"]
"""One class; a class at every position; 0 or 1 for every output (several labels); numbers from 0 that sum to 1; any
numbers; the input itself."""

_SUM = 1e-5
"""Of probabilities in float32, some thousands of them."""

KINDS: tuple[str, ...] = get_args(TargetKind)


class Targets(NamedTuple):
    """The targets of N examples, `values` (N, *shape), and their `kind`."""

    values: np.ndarray
    kind: TargetKind

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's target."""
        return tuple(self.values.shape[1:])


def read_targets(given: Any, images: np.ndarray, outputs: Sequence[int], name: str = "labels") -> Targets:
    """The targets of `images` (N, ...) for a model whose outputs for one example have the shape `outputs`.

    Integers (N,) are classes; integers in the shape of all axes of the outputs but the last, classes at every position;
    zeros and ones in the outputs' own shape, several labels; the images themselves, an autoencoder's; numbers from 0
    that sum to 1, in the outputs' own shape, probabilities; anything else is taken as numbers.

    Raises `InputError` for arrays of another length, classes out of range, or numbers not finite.
    """
    wanted = "integers, or numbers that the loss compares the outputs with"
    found, outputs = array(name, given, "biuf", wanted), tuple(outputs)
    if not found.ndim or len(found) != len(images):
        raise InputError(f"{name} must be {len(images)} targets, got {found.dtype} of shape {found.shape}")
    if found.dtype.kind == "f":
        if not np.all(np.isfinite(found)):
            raise InputError(f"{name} hold NaN or infinite values")
        if found.ndim == 1 and np.prod(outputs) > 1:
            raise InputError(
                f"{name} must be integers, or numbers in the shape of the outputs, {outputs}, "
                f"got {found.dtype} of shape {found.shape}"
            )
        shares = found.shape[1:] == outputs and outputs[-1:] > (1,) and found.min() >= 0
        shares = shares and bool(np.all(np.abs(found.sum(axis=-1, dtype=float) - 1.0) <= _SUM))
        kind = "input" if np.array_equal(found, images) else "probabilities" if shares else "values"
        return Targets(found.astype(float), kind)
    if found.dtype.kind == "b":
        if found.ndim == 1 and np.prod(outputs) > 1:
            raise InputError(f"{name} must be integers, one an example, got bool")
        found = found.astype(np.int64)
    shape = found.shape[1:]
    if shape == outputs and outputs and found.min() >= 0 and found.max() <= 1:
        return Targets(found, "several")
    if shape == outputs[:-1] and (outputs or not shape):
        return Targets(check_classes(found, outputs, name), "class" if not shape else "classes")
    if not shape:  # outputs with axes of their own, one class for all
        return Targets(check_classes(found, (int(np.prod(outputs)),), name), "class")
    return Targets(found, "values")


def check_classes(found: np.ndarray, outputs: Sequence[int], name: str) -> np.ndarray:
    """Refuse classes that the outputs do not tell apart."""
    count = outputs[-1] if outputs else 1
    if found.size and (found.min() < 0 or found.max() >= labels_of(count)):
        raise InputError(
            f"{name} must be in 0..{labels_of(count) - 1} for a model with {count} outputs, "
            f"got {found.min()}..{found.max()}"
        )
    return found
