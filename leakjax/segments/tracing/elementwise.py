"""The elementwise nonlinear parts inside a map: what lies between them is affine, or another kind of nonlinear."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from leakjax.segments.tracing import jaxprs, kinds


class Part(NamedTuple):
    """An elementwise nonlinear part of a graph: value in, value out, the equations between, what else they read."""

    entry: int
    exit: int
    equations: tuple[jaxprs.Equation, ...]
    others: tuple[int, ...]


def elementwise_parts(graph: jaxprs.Graph, equations: Sequence[jaxprs.Equation], start: int, end: int) -> list[Part]:
    """All elementwise parts between `start` and `end` that are not affine, without the affine steps they begin with."""
    live = graph.dependents([start])
    root, used_outside = {start: start}, {end}
    for e in equations:
        inputs = [v for v in e.inputs if isinstance(v, int) and v in live]
        if not inputs:
            continue
        roots = {root[v] for v in inputs}
        joined = len(roots) == 1 and kinds.is_elementwise(e, graph.structs, live)
        root.update((o, next(iter(roots)) if joined else o) for o in e.outputs)
        used_outside.update(() if joined else inputs)
    parts = []
    for exit in used_outside:
        if root[exit] == exit or not jnp.issubdtype(graph.structs[exit].dtype, jnp.floating):
            continue
        inner = [e for e in graph.needed(exit, [root[exit]]) if any(o in live for o in e.outputs)]
        entry = root[exit]
        while inner and _leads(inner, entry, graph, live):
            entry = inner.pop(0).outputs[0]
        if inner:
            made = {o for e in inner for o in e.outputs} | {entry}
            others = dict.fromkeys(v for e in inner for v in e.inputs if isinstance(v, int) and v not in made)
            parts.append(Part(entry, exit, tuple(inner), tuple(others)))
    return parts


def _leads(equations: Sequence[jaxprs.Equation], entry: int, graph: jaxprs.Graph, live: set[int]) -> bool:
    """Whether the first equation is an affine step that all that follows goes through."""
    first, rest = equations[0], equations[1:]
    bypassed = any(v == entry for e in rest for v in e.inputs)
    return not bypassed and kinds.is_linear(first, graph.structs, live)
