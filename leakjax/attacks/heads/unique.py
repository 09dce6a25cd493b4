"""Whether one target alone explains dL/dz at the outputs z: only then it is told.

Numbers: where dL/dz is affine in the target, the rank of the affine map says so, for all targets there are. Behind any
other loss a target found by Newton's method may be one of many, and nothing is told, but for losses that are known to
be monotone in every entry.

Zeros and ones for every output: where each entry of dL/dz depends on its own label alone, every label is decided by its
entry; else all combinations are tried, where they are few.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from leakjax.models.losses import LossSpec

Pull = Callable[[Float[np.ndarray, "L ..."]], Float[np.ndarray, "L K"]]
"""Targets (L, ...) -> dL/dz of each, flat."""

MOST_TRIED = 12
"""Labels of which all 4,096 combinations are tried."""

_PATTERNS = 8  # random labels at which it is seen whether an entry depends on its own label alone
_SAME = 1e-9  # of the largest entry: entries that are one
_SIZES = (1.0, 30.0, 1000.0)  # of the outputs and the target: distances at which the slope must be the same
_MONOTONE = ("log_cosh", "huber_loss")


def is_affine(
    slope: Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "K n"]], t: Float[np.ndarray, "..."], size: float
) -> bool:
    """Whether the derivative of dL/dz by the target is the same at t, and near and far from it."""
    rng, here = np.random.default_rng(0), slope(t)
    far = (slope(t + size * s * rng.normal(size=t.shape)) for s in _SIZES for _ in range(2))
    return all(np.linalg.norm(there - here) <= 1e-7 * np.linalg.norm(here) for there in far)


def is_monotone(loss: LossSpec) -> bool:
    """Whether every entry of dL/dz is known to fall as its own target grows: what explains it is one number, where its
    derivative is not 0."""
    return isinstance(loss, str) and loss.partition(":")[0] in _MONOTONE


def solve_bits(
    pull: Pull, sent: Float[np.ndarray, " K"], shape: Sequence[int], *, scaled: bool, fit: float
) -> tuple[Int[np.ndarray, "..."] | None, float]:
    """(zeros and ones of `shape`, c) with c dL/dz = `sent`, if there are no others; (None, NaN) otherwise.

    Arguments: `scaled`, whether c is not known to be 1; `fit`, how far off an entry may be, as a share of the largest.
    """
    count, close = int(np.prod(shape)), fit * float(np.max(np.abs(sent), initial=0.0))
    if not close > 0 or not np.all(np.isfinite(sent)):
        return None, float("nan")
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2, (_PATTERNS, count))
    drawn = np.concatenate([np.zeros((1, count), int), np.ones((1, count), int), drawn])
    zero, one, *others = pull(drawn.reshape(-1, *shape).astype(float))
    if not all(np.all(np.isfinite(p)) for p in (zero, one, *others)):
        return None, float("nan")
    if len(sent) == count and _separate(zero, one, drawn[2:], np.asarray(others)):
        return _entry_by_entry(zero, one, sent, shape, scaled, close)
    return _of_all(pull, sent, shape, scaled, close) if count <= MOST_TRIED else (None, float("nan"))


def _separate(
    zero: Float[np.ndarray, " K"],
    one: Float[np.ndarray, " K"],
    drawn: Int[np.ndarray, "P K"],
    pulls: Float[np.ndarray, "P K"],
) -> bool:
    largest = float(np.max(np.abs([zero, one])))
    return float(np.max(np.abs(pulls - np.where(drawn == 1, one, zero)))) <= _SAME * largest


def _entry_by_entry(
    zero: Float[np.ndarray, " K"],
    one: Float[np.ndarray, " K"],
    sent: Float[np.ndarray, " K"],
    shape: Sequence[int],
    scaled: bool,
    close: float,
) -> tuple[Int[np.ndarray, "..."] | None, float]:
    """The largest entry says which two factors there may be, every other whether it agrees, and by which label."""
    k = int(np.argmax(np.abs(sent)))
    factors = [1.0]
    if scaled:
        factors = [float(sent[k] / p[k]) for p in (zero, one) if p[k] != 0]
    found = []
    for c in factors:
        fits = np.stack([np.abs(sent - c * zero) <= close, np.abs(sent - c * one) <= close])
        if np.all(np.any(fits, axis=0)):
            found.append((None if np.any(np.all(fits, axis=0)) else fits[1].astype(np.int64).reshape(shape), c))
    return found[0] if len(found) == 1 and found[0][0] is not None else (None, float("nan"))


def _of_all(
    pull: Pull, sent: Float[np.ndarray, " K"], shape: Sequence[int], scaled: bool, close: float
) -> tuple[Int[np.ndarray, "..."] | None, float]:
    count = int(np.prod(shape))
    every = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    pulls = pull(every.reshape(-1, *shape).astype(float))
    c = np.ones(len(every))
    if scaled:
        c = pulls @ sent / np.maximum(np.sum(pulls**2, axis=1), np.finfo(float).tiny)
    fits = np.flatnonzero(np.max(np.abs(sent - c[:, None] * pulls), axis=1) <= close)
    return (every[fits[0]].reshape(shape), float(c[fits[0]])) if len(fits) == 1 else (None, float("nan"))
