"""What the shapes of a layer allow it to tell of its input, counted in microseconds.

A convolution's forward constraints are z_o = sum_k W_k x_(so + dk), and its gradient constraints
sum_o dz_o x_(so + dk) = G_k. For generic W and dz they see an entry of x through its residue class modulo the stride
alone: with O = min(C_out, outputs), the kernel's offsets split by residue on each axis into classes q of n_q offsets
and L_q live positions,

    rank = min( C_in (sum_q L_q)^2,  C_in sum_{q, q'} min(O n_q n_q', L_q L_q') + C_out (outputs - O) ),

for each group of channels, O C_out relations being shared by both blocks (<g_a, w_b> = <dz_a, z_b>). It is the generic
rank, as far as random layers tell, where no window reaches over the border and either windows do not overlap or the
count is that of all that is read; elsewhere it is a bound, seldom loose, and by more than tens more seldom.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from leakjax.report.audit.record import PaddedCount
from leakjax.segments.geometry import Axis, Geometry, Window, positions


class Count(NamedTuple):
    """`rank` of both blocks together, input entries that are `live`; whether the rank is `exact`."""

    rank: int
    live: int
    exact: bool


class Taps(NamedTuple):
    """A class of a kernel's offsets: how many `offsets`, the live `readings` through them, and whether it is `inside`:
    no output reads a zero of the padding through one of them."""

    offsets: int
    readings: int
    inside: bool


Used = Sequence[np.ndarray] | None
"""Which outputs of each axis are used, (outputs,) booleans; None for all."""


def structural_count(geometry: Geometry, used: Used = None) -> Count:
    """The rank that a map's shapes allow the constraints on its input, those of the outputs that are `used`."""
    if not geometry.simple:
        live = geometry.unknowns
        return Count(min(live, geometry.rows + geometry.parameters), live, False)
    outputs = _outputs(geometry, used)
    channels, features = geometry.channels // geometry.groups, geometry.features // geometry.groups
    rank_of_dz = min(features, outputs)
    classes = [tap_classes(axis, mask) for axis, mask in _masks(geometry, used)]
    gradient, everything = 0, 0
    for combination in itertools.product(*classes):
        taps = joined(combination)
        gradient += min(rank_of_dz * taps.offsets, taps.readings)
        everything += taps.readings
    limit = math.prod(int(np.sum(_read(axis, mask))) for axis, mask in _masks(geometry, used))
    rank = min(channels * everything, channels * limit, channels * gradient + features * (outputs - rank_of_dz))
    read = geometry.channels * math.prod(int(np.sum(p)) for p in live_positions(geometry, used))
    live = read if geometry.axes else geometry.unknowns
    apart = all(axis.kernel.stride >= axis.kernel.size for axis in geometry.axes)
    exact = all(is_plain(axis) for axis in geometry.axes) and (apart or geometry.groups * rank == live)
    return Count(min(geometry.groups * rank, live), live, exact)


def joined(combination: Sequence[Taps]) -> Taps:
    """The class of a kernel of several axes, from one class of each."""
    return Taps(
        math.prod(taps.offsets for taps in combination),
        math.prod(taps.readings for taps in combination),
        all(taps.inside for taps in combination),
    )


def padded_count(geometry: Geometry, rank: int, *, head: bool) -> PaddedCount:
    """Rows, columns and rank of the layer's system with the zeros around its input as unknowns, as R-GAP counts.

    Every such zero adds an unknown and the equation that it is 0, so that the deficiency stays what it is without.
    Arguments: `rank` without them; `head`: whether it is the last layer, of which nobody sends the outputs.
    """
    inside, outside = 1, 1
    for axis in geometry.axes if geometry.simple else ():
        size = axis.positions if axis.before is None else axis.before.outputs
        inside, outside = inside * size, outside * (size + axis.kernel.low + axis.kernel.high)
    zeros = geometry.channels * (outside - inside)
    own = kernel_entries(geometry) if geometry.simple else geometry.parameters
    rows = own + (0 if head else geometry.rows) + zeros
    return PaddedCount(rows, geometry.unknowns + zeros, rank + zeros)


def kernel_entries(geometry: Geometry) -> int:
    """Entries of the kernel of a simple map."""
    window = math.prod(axis.kernel.size for axis in geometry.axes)
    return geometry.features * (geometry.channels // geometry.groups) * window


def gradient_entries(geometry: Geometry) -> int:
    """How many numbers the gradient of this map's own parameters is."""
    own = kernel_entries(geometry) + geometry.scales if geometry.simple else geometry.parameters
    return own + geometry.biases


def live_positions(geometry: Geometry, used: Used = None) -> list[np.ndarray]:
    """(positions,) booleans of every axis: what the outputs that are `used` see."""
    return [positions(axis, mask) for axis, mask in _masks(geometry, used)]


def live_outputs(axis: Axis) -> int:
    """How many outputs along an axis read anything of the input, and not padding alone."""
    count = (axis.after or axis.kernel).outputs
    return sum(bool(np.any(positions(axis, np.arange(count) == o))) for o in range(count))


def _masks(geometry: Geometry, used: Used) -> list[tuple[Axis, np.ndarray | None]]:
    return list(zip(geometry.axes, [None] * len(geometry.axes) if used is None else used, strict=True))


def _outputs(geometry: Geometry, used: Used) -> int:
    if used is None:
        return int(math.prod((axis.after or axis.kernel).outputs for axis in geometry.axes))
    return math.prod(int(np.sum(u)) for u in used)


def _read(axis: Axis, used: np.ndarray | None) -> np.ndarray:
    """What the kernel itself reads: positions after a pooling before it."""
    if axis.before is None:
        return positions(axis, used)
    inside = positions(axis._replace(before=None, positions=axis.before.outputs), used)
    return inside & _filled(axis)


def _filled(axis: Axis) -> np.ndarray:
    """Which positions before the kernel hold any data: padding does not."""
    if axis.before is None:
        return np.ones(axis.positions, bool)
    window = axis.before
    where = np.arange(window.outputs)[:, None] * window.stride - window.low + window.dilation * np.arange(window.size)
    return np.any((where >= 0) & (where < axis.positions), axis=1)


def tap_classes(axis: Axis, used: np.ndarray | None = None) -> list[Taps]:
    """The kernel's offsets along an axis that read anything, in classes that read no position in common: the residue
    classes modulo the stride, as far as there are outputs enough to lead from one offset to the next."""
    kernel, after = axis.kernel, axis.after
    outputs = np.arange((after or kernel).outputs) if used is None else np.flatnonzero(used)
    starts = outputs * kernel.stride
    taps = np.zeros(1, int)
    if after is not None:
        starts = (outputs * after.stride - after.low) * kernel.stride
        taps = after.dilation * kernel.stride * np.arange(after.size)
    filled = _filled(axis)
    found: list[tuple[int, set[int], bool]] = []
    for k in range(kernel.size):
        read = starts + kernel.dilation * k - kernel.low
        where = read[:, None] + taps
        full = (where >= 0) & (where < len(filled)) & filled[np.clip(where, 0, len(filled) - 1)]
        some = np.any(full, axis=1)
        if not np.any(some):
            continue
        n, seen, inside = 1, set(read[some].tolist()), bool(np.all(full)) and _whole(after, kernel.outputs)
        for other in [c for c in found if c[1] & seen]:
            found.remove(other)
            n, seen, inside = n + other[0], seen | other[1], inside and other[2]
        found.append((n, seen, inside))
    return [Taps(n, len(seen), inside) for n, seen, inside in found]


def _whole(window: Window | None, count: int) -> bool:
    """Whether no window of a pooling, if there is one, reaches over the border."""
    if window is None:
        return True
    last = (window.outputs - 1) * window.stride - window.low + window.dilation * (window.size - 1)
    return window.low == 0 and last < count


def is_plain(axis: Axis) -> bool:
    """Whether the kernel has no holes, no window of it reaches over the border, and no pooling follows."""
    kernel = axis.kernel
    if axis.after is not None or kernel.dilation > 1:
        return False
    last = (kernel.outputs - 1) * kernel.stride - kernel.low + kernel.dilation * (kernel.size - 1)
    return kernel.low == 0 and last < len(_filled(axis)) and bool(np.all(_filled(axis)))
