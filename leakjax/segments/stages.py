"""A nonlinear map, lifted: the outputs of the activations inside it become unknowns of their own.

A residual block is no affine map, but with the value y_k behind each of its m activations it is a sequence of them,

    e_k = f_k(theta, x, y_1 ... y_{k-1}),  y_k = act_k(e_k),  z = f_{m+1}(theta, x, y_1 ... y_m),

each affine in (x, y) together (lifting: Albersmeyer & Diehl, SIAM J. Optim. 20, 2010).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from leakjax.models.activations import Activation
from leakjax.segments.tracing import jaxprs, kinds
from leakjax.segments.tracing.elementwise import Part, elementwise_parts


class Stage(NamedTuple):
    """e = function(variables, (x, y_1, ...)), affine; `paths`: the parameters it reads; `output`: what e looks like;
    `activation`: y from e, None behind the last stage."""

    function: Callable[..., Any]
    paths: tuple[str, ...]
    output: jax.ShapeDtypeStruct
    activation: Activation | None


def read_stages(
    graph: jaxprs.Graph,
    reader: Callable[[Sequence[int], int], tuple[Callable[..., Any], tuple[str, ...]]],
    activation: Callable[[int, int], Activation],
    start: int,
    end: int,
) -> tuple[Stage, ...]:
    """The map from value `start` to value `end` in stages; () where its activations do not cut it into affine maps.

    Arguments: `reader(given, end)`, the function (variables, values of `given`) -> value of `end`, and the paths of the
    parameters that it reads; `activation(entry, exit)`, the elementwise part between two values.
    """
    order = {o: k for k, e in enumerate(graph.equations) for o in e.outputs}
    parts = sorted(elementwise_parts(graph, graph.needed(end, [start]), start, end), key=lambda part: order[part.exit])
    live = graph.dependents([start])
    stages: list[Stage] = []
    read: list[str] = []
    for k, (target, exit) in enumerate([*((part.entry, part.exit) for part in parts), (end, None)]):
        given = [start, *(part.exit for part in parts[:k])]
        moving = [e for e in graph.needed(target, given) if any(v in live for v in e.inputs if isinstance(v, int))]
        if not all(kinds.is_linear(e, graph.structs, live) for e in moving):
            return ()
        function, paths = reader(given, target)
        inside = None if exit is None else activation(target, exit)
        if inside is not None and (inside.parametric or _varies(parts[k])):
            return ()
        stages.append(Stage(function, paths, graph.structs[target], inside))
        read += paths
    return tuple(stages) if parts and len(read) == len(set(read)) else ()


def _varies(part: Part) -> bool:
    """Whether a part may act differently on different entries: arrays of constants take part in it."""
    constants = (v.value for e in part.equations for v in e.inputs if isinstance(v, jaxprs.Constant))
    return any(np.size(c) > 1 for c in constants)
