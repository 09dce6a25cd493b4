"""Where integers look rows up: the tables of a network whose input are the ids of tokens.

    e_t = E[id_t],  t = 1 ... T        =>        dL/dE[v] = sum over id_t = v of dL/de_t

so that rows of E that no token has taken have a gradient of zeros, wherever E is used for nothing else.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from leakjax.segments.tracing import evaluation
from leakjax.segments.tracing.jaxprs import Graph
from leakjax.segments.tracing.rules import RULES
from leakjax.segments.tracing.tokens import held_parameter


class Lookup(NamedTuple):
    """The parameter at `path`, `rows` of which the ids take, one a token; `alone`: whether it has no other use.

    `value`: that of the graph that holds what was looked up, for the fourth argument of `Tokens.values`.
    """

    path: str
    rows: int
    alone: bool
    value: int


class Lookups(NamedTuple):
    """All tables, and `embedded(variables, ids (1, T))`: what is looked up in each, (1, T, width).

    `others`: the paths of parameters that other integers made of the ids take rows of.
    """

    tables: tuple[Lookup, ...]
    embedded: Callable[[Mapping[str, Any], Int[Any, "1 T"]], tuple[Float[Array, "1 T width"], ...]]
    others: tuple[str, ...] = ()


def read_lookups(graph: Graph, paths: Sequence[str]) -> Lookups:
    """The tables of a graph whose input are ids (1, T); `paths` of its variables, in their order."""
    names = dict(zip(graph.variables, paths, strict=True))
    live = graph.dependents([graph.input])
    equations = graph.needed(graph.output, [*graph.variables, graph.input])
    uses = collections.Counter(v for e in graph.needed(graph.output, []) for v in e.inputs if isinstance(v, int))
    found, others = [], []
    for equation in equations:
        if equation.name != "gather" or not isinstance(equation.inputs[1], int) or equation.inputs[1] not in live:
            continue
        table, value = equation.inputs[0], equation.outputs[0]
        if not isinstance(table, int):
            continue
        held = held_parameter(graph, names, uses, table)
        if held is None or graph.structs[held.source].shape[:1] != graph.structs[table].shape[:1]:
            continue
        rows, ids = graph.structs[table].shape[0], tuple(graph.structs[graph.input].shape)
        if graph.structs[value].shape[: len(ids)] == ids and _are_ids(graph, equation.inputs[1], rows):
            found.append(Lookup(path=names[held.source], rows=rows, alone=held.alone, value=value))
        else:
            others.append(names[held.source])

    def embedded(variables: Mapping[str, Any], ids: Any) -> tuple[Any, ...]:
        env = {v: variables[path] for v, path in names.items()}
        wanted = [table.value for table in found]
        last = max(k for k, e in enumerate(equations) if e.outputs[0] in wanted)
        known = evaluation.evaluate_all(equations[: last + 1], {**env, graph.input: ids}, RULES)
        return tuple(known[v] for v in wanted)

    return Lookups(tuple(found), embedded, tuple(dict.fromkeys(others)))


def _are_ids(graph: Graph, value: int, rows: int) -> bool:
    """Whether the rows that are taken are the ids themselves, and no other function of them."""
    shape = graph.structs[graph.input].shape
    ids = np.random.default_rng(0).integers(0, rows, shape).astype(np.int32)
    equations = graph.needed(value, [graph.input])
    made = {graph.input, *(o for e in equations for o in e.outputs)}
    if any(isinstance(v, int) and v not in made for e in equations for v in e.inputs):
        return False  # of parameters as well
    taken = evaluation.evaluate(equations, {graph.input: jnp.asarray(ids)}, value, RULES)
    return np.array_equal(np.asarray(taken).reshape(-1), ids.reshape(-1))
