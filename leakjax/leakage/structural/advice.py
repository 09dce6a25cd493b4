"""What would help: single changes of one layer, counted on shapes alone."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from leakjax.leakage.structural.counts import kernel_entries, live_positions
from leakjax.leakage.structural.index import structural_leaked
from leakjax.report.audit.record import Change
from leakjax.segments.geometry import Axis, Geometry

RELU_SHARE = 0.5  # of the entries of its input that a ReLU gives back, about


@dataclasses.dataclass(frozen=True)
class _Trial:
    text: str
    geometries: tuple[Geometry, ...] | None
    shares: tuple[float, ...]


def best_changes(names: Sequence[str], geometries: Sequence[Geometry], shares: Sequence[float]) -> tuple[Change, ...]:
    """For every layer the change of stride, filters, kernel or activation after which the shapes allow least to leak.

    Arguments: `shares`, what each activation gives back of its input. Of equally good changes the one with the fewest
    parameters is named. A layer without a change that lowers the number is left out, and so are changes behind which
    the sizes cannot be followed (residual blocks). A bias adds no equation on the image, and is never among them.
    """
    now, found = structural_leaked(geometries, shares=shares), []
    size = _kernels(geometries)
    for i, name in enumerate(names[:-1]):
        trials = [
            (structural_leaked(t.geometries, shares=t.shares), _kernels(t.geometries) - size, t.text)
            for t in _trials(geometries, tuple(shares), i)
            if t.geometries is not None
        ]
        leaked, parameters, text = min(trials, default=(now, 0, ""))
        if leaked < now:
            found.append(Change(name, text, leaked, parameters))
    return tuple(sorted(found, key=lambda change: (change.leaked_dimensions, change.parameters)))


def _trials(geometries: Sequence[Geometry], shares: tuple[float, ...], i: int) -> Iterator[_Trial]:
    geometry = geometries[i]
    if not geometry.simple:
        return
    if shares[i] > RELU_SHARE:
        changed = (*shares[:i], RELU_SHARE, *shares[i + 1 :])
        yield _Trial("ReLU for its activation (which hides about half of its outputs)", tuple(geometries), changed)
    half = geometry.features // 2
    if half >= geometry.groups and half % geometry.groups == 0:
        text = f"{half} filters for {geometry.features}" if geometry.axes else f"{half} units for {geometry.features}"
        fewer = geometry._replace(features=half, biases=geometry.biases // 2, scales=geometry.scales // 2)
        yield _Trial(text, _followed(geometries, i, fewer), shares)
    if not geometry.axes:
        return
    strides = [axis.kernel.stride for axis in geometry.axes]
    text = f"stride {_sides([2 * s for s in strides])} for {_sides(strides)}"
    yield _Trial(text, _followed(geometries, i, _with_kernels(geometry, stride=2)), shares)
    sizes = [axis.kernel.size for axis in geometry.axes]
    if min(sizes) > 2:
        text = f"kernel {_sides([s - 2 for s in sizes])} for {_sides(sizes)}, padding one less where there is any"
        yield _Trial(text, _followed(geometries, i, _with_kernels(geometry, smaller=2)), shares)


def _sides(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


def _with_kernels(geometry: Geometry, stride: int = 1, smaller: int = 0) -> Geometry:
    def changed(axis: Axis) -> Axis:
        k = axis.kernel
        less = smaller // 2
        low, high = max(k.low - less, 0), max(k.high - less, 0)
        return axis._replace(kernel=k._replace(stride=stride * k.stride, size=k.size - smaller, low=low, high=high))

    return geometry._replace(axes=tuple(map(changed, geometry.axes)))


def _followed(geometries: Sequence[Geometry], i: int, changed: Geometry) -> tuple[Geometry, ...] | None:
    """All geometries with one changed, and the sizes behind it that follow; None where that cannot be told."""
    found = [*geometries[:i]]
    for k in range(i, len(geometries)):
        geometry = changed if k == i else geometries[k]
        if not geometry.simple or any(axis.after for axis in geometry.axes):
            return None
        if k > i:
            follower = _behind(found[-1], geometries[k - 1], geometry)
            if follower is None:
                return None
            geometry = follower
        axes = []
        for axis in geometry.axes:
            kernel, count = axis.kernel, axis.positions
            if axis.before is not None:
                count = (count + axis.before.low + axis.before.high - axis.before.size) // axis.before.stride + 1
                axis = axis._replace(before=axis.before._replace(outputs=count))
            reach = kernel.dilation * (kernel.size - 1) + 1
            outputs = (count + kernel.low + kernel.high - reach) // kernel.stride + 1
            if outputs < 1:
                return None
            axes.append(axis._replace(kernel=kernel._replace(outputs=outputs)))
        rows = geometry.features * math.prod(axis.kernel.outputs for axis in axes)
        found.append(geometry._replace(axes=tuple(axes), rows=rows))
    return tuple(found)


def _behind(before: Geometry, old: Geometry, geometry: Geometry) -> Geometry | None:
    """A geometry with the input that the changed one before it leaves; `old`: what was before it."""
    outputs = [axis.kernel.outputs for axis in before.axes]
    unknowns = before.features * math.prod(outputs)
    if geometry.axes:
        if len(geometry.axes) != len(outputs) or geometry.channels != old.features or geometry.groups != 1:
            return None
        axes = [axis._replace(positions=count) for axis, count in zip(geometry.axes, outputs, strict=True)]
        return geometry._replace(axes=tuple(axes), channels=before.features, unknowns=unknowns)
    if geometry.channels == geometry.unknowns:
        return geometry._replace(channels=unknowns, unknowns=unknowns)
    return geometry._replace(channels=before.features, unknowns=unknowns) if geometry.channels == old.features else None


def _kernels(geometries: Sequence[Geometry] | None) -> int:
    """Weights of all kernels."""
    return sum(map(kernel_entries, geometries or ()))


def dead_pixels(geometry: Geometry) -> int:
    """Positions of the input that no output sees."""
    if not geometry.simple or not geometry.axes:
        return 0
    seen = live_positions(geometry)
    return math.prod(len(p) for p in seen) - math.prod(int(p.sum()) for p in seen)
