"""Where weights meet tokens: the values whose rows a weight matrix multiplies, one after another.

    v_t = K^T u_t,  t = 1 ... T        =>        dL/dK = sum_t u_t (dL/dv_t)^T

so the columns of K's gradient lie in the span of the tokens u_t, and where they have its rank they span it, whatever
lies behind K: attention, normalizations, a loss that nobody knows.
"""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from leakjax.segments.tracing import evaluation
from leakjax.segments.tracing.jaxprs import Equation, Graph
from leakjax.segments.tracing.primitives import REARRANGING
from leakjax.segments.tracing.rules import RULES


class TokenRead(NamedTuple):
    """Tokens u (tokens, width) of one example that the matrices of the parameters `paths` multiply.

    `matrices(arrays)`: those of arrays by path, parameters or their gradients, (width, outputs) each.
    """

    paths: tuple[str, ...]
    tokens: int
    width: int
    matrices: Callable[[Mapping[str, Any]], list[Float[Array, "width outputs"]]]


class Tokens(NamedTuple):
    """All reads of a network, first to last, and `values(variables, x, count)`: the tokens of x (1, ...) at the first
    `count` of them, the rest of the network left out. A fourth argument {value: array} stands for values of the graph
    that are not computed then."""

    reads: tuple[TokenRead, ...]
    values: Callable[..., tuple[Float[Array, "tokens width"], ...]]


class _Operand(NamedTuple):
    """A parameter among the operands of an equation: its `path`, how it is rearranged, and the axes summed over."""

    path: str
    rearrange: Callable[[Any], Any]
    axes: tuple[int, ...]


def read_tokens(graph: Graph, paths: Sequence[str]) -> Tokens:
    """The reads of a graph that was traced for one example; `paths` of its variables, in their order."""
    names = dict(zip(graph.variables, paths, strict=True))
    live = graph.dependents([graph.input])
    equations = graph.needed(graph.output, [*graph.variables, graph.input])
    uses = collections.Counter(v for e in graph.needed(graph.output, []) for v in e.inputs if isinstance(v, int))
    found: dict[tuple[int, tuple[int, ...]], list[_Operand]] = {}
    for equation in equations:
        if equation.name == "dot_general":
            for value, axes, operand in _operands(graph, names, live, uses, equation):
                found.setdefault((value, axes), []).append(operand)
    order = {v: k for k, e in enumerate(equations) for v in e.outputs}
    keys = [key for key in found if key[0] in order]

    def values(
        variables: Mapping[str, Any], x: Any, count: int, given: Mapping[int, Any] | None = None
    ) -> tuple[Any, ...]:
        wanted = keys[:count]
        last = max(order[v] for v, _ in wanted)
        env = {v: variables[path] for v, path in names.items()}
        replaced = {v: functools.partial(_constant, array) for v, array in (given or {}).items()}
        known = evaluation.evaluate_all(equations[: last + 1], {**env, graph.input: x}, RULES, replaced)
        return tuple(_rows(known[v], axes) for v, axes in wanted)

    return Tokens(tuple(_read(graph, key, found[key]) for key in keys), values)


def _constant(array: Any, _: Mapping[int, Any]) -> Any:
    return array


def _operands(
    graph: Graph, names: Mapping[int, str], live: set[int], uses: Mapping[int, int], equation: Equation
) -> list[tuple[int, tuple[int, ...], _Operand]]:
    """(value, its axes, the parameter) where an equation multiplies data by a parameter, row by row."""
    contracted, batched = equation.params["dimension_numbers"]
    pairs = []
    for side in (0, 1):
        value, other = equation.inputs[side], equation.inputs[1 - side]
        if isinstance(value, int) and value in live and isinstance(other, int) and not any(batched):
            path, rearrange = _parameter(graph, names, uses, other)
            if path is not None and contracted[side]:
                pairs.append((value, tuple(contracted[side]), _Operand(path, rearrange, tuple(contracted[1 - side]))))
    return pairs


class Held(NamedTuple):
    """The parameter `source` that a value holds rearranged by `equations`; `alone`: whether both have no other use, so
    that the parameter's gradient is the value's."""

    source: int
    equations: tuple[Equation, ...]
    alone: bool


def held_parameter(graph: Graph, names: Mapping[int, str], uses: Mapping[int, int], value: int) -> Held | None:
    """None where a value is no rearrangement of one parameter; `uses` of every value of the graph."""
    equations = graph.needed(value, graph.variables)
    read = {v for e in equations for v in e.inputs if isinstance(v, int)} - {o for e in equations for o in e.outputs}
    sources = read or {value}
    if len(sources) > 1 or not sources <= set(names) or any(e.name not in REARRANGING for e in equations):
        return None
    (source,) = sources
    return Held(source, equations, all(uses[v] <= 1 for v in (source, *(o for e in equations for o in e.outputs))))


def _parameter(
    graph: Graph, names: Mapping[int, str], uses: Mapping[int, int], value: int
) -> tuple[str | None, Callable[[Any], Any]]:
    """The path of the one parameter that a value holds entry for entry, and the map from it; None where there is none,
    or where it is used elsewhere as well: its gradient is a sum over both uses then."""
    held = held_parameter(graph, names, uses, value)
    if held is None or not held.alone:
        return None, lambda a: a
    source, equations = held.source, held.equations
    size = math.prod(graph.structs[source].shape)
    if any(math.prod(graph.structs[e.outputs[0]].shape) != size for e in equations):
        return None, lambda a: a

    def rearrange(array: Any) -> Any:
        return evaluation.evaluate(equations, {source: jnp.asarray(array)}, value, RULES)

    return names[source], rearrange


def _read(graph: Graph, key: tuple[int, tuple[int, ...]], operands: list[_Operand]) -> TokenRead:
    value, axes = key
    shape = graph.structs[value].shape
    width = math.prod(shape[k] for k in axes)

    def matrices(arrays: Mapping[str, Any]) -> list[Any]:
        present = [o for o in operands if o.path in arrays]
        return [_rows(o.rearrange(arrays[o.path]), o.axes).T for o in present]

    paths = tuple(dict.fromkeys(o.path for o in operands))
    return TokenRead(paths, math.prod(shape) // width, width, matrices)


def _rows(a: Any, axes: Sequence[int]) -> Float[Array, "rows width"]:
    """An array as rows along `axes`, in their order."""
    kept = [k for k in range(a.ndim) if k not in axes]
    return jnp.transpose(a, (*kept, *axes)).reshape(-1, math.prod(a.shape[k] for k in axes))
