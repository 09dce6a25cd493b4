"""The shape of an affine map, where it is one convolution or dense layer with pooling around it.

What a segment can tell of its input depends on its sizes before it depends on any weight: this module finds these sizes
in the traced model, `leakjax.leakage.structural.counts` counts with them.
"""

import math
from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np

from leakjax.segments.tracing import jaxprs


class Window(NamedTuple):
    """Outputs o read positions stride * o - low + dilation * k, k < size, of an axis; those outside are zeros.

    `high`: zeros after the axis, as many as before it are `low`.
    """

    size: int
    stride: int
    low: int
    outputs: int
    dilation: int = 1
    high: int = 0


class Axis(NamedTuple):
    """One spatial axis: `positions` of the input, pooled `before`, the `kernel` over what is left, pooled `after`."""

    positions: int
    kernel: Window
    before: Window | None = None
    after: Window | None = None


class Normalization(NamedTuple):
    """What a train-mode normalization takes its means and variances over.

    - `over_examples`: the whole batch, as batch norm does, or each example by itself;
    - `over_positions`: all positions, or each by itself;
    - `channels`: how many channels share a mean and a variance, 1 for batch norm and instance norm; `entries` of one
      example that share them;
    - `direct`: whether an affine layer stands right before it, with no activation in between; `told`: whether means
      and variances are sent beside the gradient.
    """

    over_examples: bool
    over_positions: bool
    channels: int
    entries: int
    direct: bool
    told: bool = False


class Geometry(NamedTuple):
    """The sizes of one affine map of one example.

    - `axes`, `channels`, `features`, `groups`: of its convolution (a dense layer has no axes; channels are its inputs);
    - `scales`: entries of further parameters that multiply the data (a batch norm's scale); `biases`: of those that are
      added to it;
    - `simple`: whether that is all of the map, so that its generic rank can be counted; otherwise only the numbers of
      rows count: `rows` of the output, `parameters` that meet the data;
    - `unknowns`: entries of the input;
    - `normalization`: what a map that is none of this, but a normalization, takes its statistics over.
    """

    unknowns: int
    rows: int
    parameters: int
    simple: bool
    axes: tuple[Axis, ...] = ()
    channels: int = 0
    features: int = 0
    groups: int = 1
    scales: int = 0
    biases: int = 0
    normalization: Normalization | None = None


_Step = tuple[int, ...] | dict[int, Window]
_Sizes = tuple[tuple[tuple[int, Axis], ...], int, int, int]

_NEUTRAL = frozenset({"add", "sub", "mul", "div", "neg", "convert_element_type", "copy", "copy_p"})
_RESHAPING = frozenset({"reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim"})


def read_geometry(graph: jaxprs.Graph, start: int, end: int, trained: Set[int]) -> Geometry:
    """The sizes of the affine map between two values of a graph that was traced for one example.

    Arguments: `trained`, which of the graph's variables have gradients.
    """
    live = graph.dependents([start])
    moving = [e for e in graph.needed(end, [start]) if any(o in live for o in e.outputs)]
    owners = _owners(graph, moving, live, trained)
    multiplying = {k: [] if moving[k].name in ("add", "sub") else found for k, found in owners.items()}
    size = {v: math.prod(graph.structs[v].shape) for v in trained}
    counted = Geometry(
        math.prod(graph.structs[start].shape),
        math.prod(graph.structs[end].shape),
        sum(size[v] for v in set().union(*multiplying.values())),
        simple=False,
        biases=sum(size[v] for v in set().union(*owners.values()) - set().union(*multiplying.values())),
    )
    cores = [k for k, e in enumerate(moving) if e.name in ("conv_general_dilated", "dot_general") and multiplying[k]]
    if len(cores) != 1:
        return counted
    core = cores[0]
    before, after = _pools(moving[:core], graph), _pools(moving[core + 1 :], graph)
    if before is None or after is None or not _single_path(moving, live):
        return counted
    sizes = (_convolution if moving[core].name == "conv_general_dilated" else _dense)(moving[core], graph, live)
    if sizes is None:
        return counted
    axes, channels, features, groups = sizes
    scales = sum(size[v] for k, found in multiplying.items() if k != core for v in found)
    pooled = _with_pools(axes, before, after, graph.structs[start].shape)
    if pooled is None:
        return counted
    return counted._replace(
        simple=True, axes=pooled, channels=channels, features=features, groups=groups, scales=scales
    )


def positions(axis: Axis, used: np.ndarray | None = None) -> np.ndarray:
    """Which positions of an axis the outputs (or those that are `used`, (outputs,) booleans) see, (positions,)."""
    seen = np.ones((axis.after or axis.kernel).outputs, bool) if used is None else used
    if axis.after is not None:
        seen = _read_by(axis.after, axis.kernel.outputs, seen)
    count = axis.positions if axis.before is None else axis.before.outputs
    seen = _read_by(axis.kernel, count, seen)
    return seen if axis.before is None else _read_by(axis.before, axis.positions, seen)


def _read_by(window: Window, count: int, outputs: np.ndarray) -> np.ndarray:
    taken = np.zeros(count, bool)
    where = np.flatnonzero(outputs)[:, None] * window.stride - window.low + window.dilation * np.arange(window.size)
    taken[where[(where >= 0) & (where < count)]] = True
    return taken


def _owners(
    graph: jaxprs.Graph, moving: Sequence[jaxprs.Equation], live: set[int], trained: Set[int]
) -> dict[int, list[int]]:
    """By equation: the trained variables that meet the data there."""
    behind = {v: graph.dependents([v]) for v in trained}
    found = {}
    for k, e in enumerate(moving):
        still = [v for v in e.inputs if isinstance(v, int) and v not in live]
        found[k] = [v for v in behind if any(s in behind[v] for s in still)]
    return found


def _single_path(moving: Sequence[jaxprs.Equation], live: set[int]) -> bool:
    """Whether the data flows through one value at a time."""
    return all(sum(isinstance(v, int) and v in live for v in e.inputs) == 1 for e in moving)


def _pools(equations: Sequence[jaxprs.Equation], graph: jaxprs.Graph) -> list[_Step] | None:
    """The poolings among equations, as windows by dimension, and the shapes after reshapings; None for other maps."""
    steps: list[_Step] = []
    for e in equations:
        shape = graph.structs[next(v for v in e.inputs if isinstance(v, int))].shape
        out = graph.structs[e.outputs[0]].shape
        if e.name in _NEUTRAL:
            continue
        if e.name in _RESHAPING and math.prod(out) == math.prod(shape):
            steps.append(tuple(out))
        elif e.name == "reduce_sum":
            steps += [{d: Window(shape[d], shape[d], 0, 1) for d in e.params["axes"]}, tuple(out)]
        elif e.name == "reduce_window_sum" and all(d == 1 for d in e.params["base_dilation"]):
            p = e.params
            rows = zip(p["window_dimensions"], p["window_strides"], p["padding"], p["window_dilation"], strict=True)
            windows = {
                d: Window(size=w, stride=s, low=low, outputs=out[d], dilation=dil, high=high)
                for d, (w, s, (low, high), dil) in enumerate(rows)
            }
            steps.append({d: w for d, w in windows.items() if w != Window(1, 1, 0, out[d])})
        elif e.name == "pad" and all(inside == 0 and low >= 0 for low, _, inside in e.params["padding_config"]):
            config = enumerate(e.params["padding_config"])
            steps.append(
                {
                    d: Window(size=1, stride=1, low=low, outputs=out[d], dilation=1, high=high)
                    for d, (low, high, _) in config
                    if low or high
                }
            )
        else:
            return None
    return steps


def _convolution(e: jaxprs.Equation, graph: jaxprs.Graph, live: set[int]) -> _Sizes | None:
    """((dimension, axis) ..., channels, features, groups) of a convolution of the data with a kernel."""
    left, right = e.inputs
    if not (isinstance(left, int) and left in live) or e.params["batch_group_count"] != 1:
        return None
    if any(d != 1 for d in e.params["lhs_dilation"]):
        return None
    numbers = e.params["dimension_numbers"]
    kernel = graph.structs[right].shape if isinstance(right, int) else np.shape(right.value)
    shape, out = graph.structs[left].shape, graph.structs[e.outputs[0]].shape
    axes = []
    for k, d in enumerate(numbers.lhs_spec[2:]):
        (low, high), stride, dilation = (e.params[p][k] for p in ("padding", "window_strides", "rhs_dilation"))
        window = Window(
            size=kernel[numbers.rhs_spec[2 + k]],
            stride=stride,
            low=low,
            outputs=out[numbers.out_spec[2 + k]],
            dilation=dilation,
            high=high,
        )
        axes.append((d, Axis(shape[d], window)))
    features = kernel[numbers.rhs_spec[0]]
    return tuple(axes), shape[numbers.lhs_spec[1]], features, e.params["feature_group_count"]


def _dense(e: jaxprs.Equation, graph: jaxprs.Graph, live: set[int]) -> _Sizes | None:
    """The same of a matrix product: a convolution with a kernel of one position over what is not contracted."""
    contracting, batch = e.params["dimension_numbers"]
    side = 0 if isinstance(e.inputs[0], int) and e.inputs[0] in live else 1
    if any(batch):
        return None
    data, weight = e.inputs[side], e.inputs[1 - side]
    assert isinstance(data, int)
    shape = graph.structs[data].shape
    other = graph.structs[weight].shape if isinstance(weight, int) else np.shape(weight.value)
    mine, theirs = contracting[side], contracting[1 - side]
    free = [d for d in range(1, len(shape)) if d not in mine]
    if 0 in mine:
        return None
    axes = tuple((d, Axis(shape[d], Window(1, 1, 0, shape[d]))) for d in free)
    features = math.prod(s for d, s in enumerate(other) if d not in theirs)
    return axes, math.prod(shape[d] for d in mine), features, 1


def _with_pools(
    axes: Sequence[tuple[int, Axis]], before: Sequence[_Step], after: Sequence[_Step], shape: Sequence[int]
) -> tuple[Axis, ...] | None:
    """The axes with the poolings around them; None where these do not act on the same dimensions, or overlap."""
    first, last = _alone(before, at_end=not axes), _alone(after, at_end=True)
    if first is None or last is None or any(_overlaps(window) for window in first.values()):
        return None
    if not axes:
        return None if last else ()
    found = [axis._replace(positions=shape[d], before=first.pop(d, None), after=last.pop(d, None)) for d, axis in axes]
    return tuple(found) if not first and not last else None


def _alone(steps: Sequence[_Step], *, at_end: bool) -> dict[int, Window] | None:
    """The windows of the one pooling among steps, {} where there is none; reshapings may only follow it `at_end`."""
    kept = list(steps)
    while at_end and kept and isinstance(kept[-1], tuple):
        kept.pop()
    if not kept:
        return {}
    return dict(kept[0]) if len(kept) == 1 and isinstance(kept[0], dict) else None


def _overlaps(window: Window) -> bool:
    return window.size > 1 and (window.stride < window.size or window.dilation != 1)
