"""Statistics of the data inside a map, as train-mode batch norm has them: sums over x on which the rest depends.

    t = T(theta, x)       one sum after another, each of x and of the sums before it
    z = f(theta, x, t)    the map itself

Where f is affine in x for every t, entry by entry, the map is a *normalization*: with t known, x is read off z, and
only dL/dx needs to know that t depends on x.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from leakjax.segments.tracing import jaxprs, kinds

Values = Mapping[str, Float[Array, "..."]]
"""Statistics by name."""


class Statistics(NamedTuple):
    """The statistics of one map: their `names` in order, `measure(variables, x)` -> values by name, `given(variables,
    x, values)` -> z, and whether this is a `normalization`."""

    names: tuple[str, ...]
    measure: Callable[..., dict[str, Float[Array, "..."]]]
    given: Callable[..., Float[Array, "..."]]
    normalization: bool


def reductions(graph: jaxprs.Graph) -> dict[int, str]:
    """The values of a graph that sum over its data, in order, and their names: the same for every graph that was traced
    of one model."""
    live = graph.dependents([graph.input])
    found = [e.outputs[0] for e in graph.needed(graph.output, []) if _sums(e, live)]
    return {v: f"statistic{k}" for k, v in enumerate(found)}


def _sums(equation: jaxprs.Equation, live: set[int]) -> bool:
    return equation.name == "reduce_sum" and isinstance(equation.inputs[0], int) and equation.inputs[0] in live


def inside(graph: jaxprs.Graph, start: int, end: int) -> tuple[int, ...]:
    """The sums over the data between two values, but for those that only other sums read."""
    live = graph.dependents([start])
    sums = tuple(e.outputs[0] for e in graph.needed(end, [start]) if _sums(e, live))
    read = {v for e in graph.needed(end, [start, *sums]) for v in e.inputs}
    return tuple(v for v in sums if v in read or v == end)


def is_normalization(graph: jaxprs.Graph, start: int, end: int) -> bool:
    """Whether the map between two values is affine entry by entry once the sums inside it are given."""
    sums = inside(graph, start, end)
    return bool(sums) and acts_by_entry(graph, start, end, sums)


def acts_by_entry(graph: jaxprs.Graph, start: int, end: int, given: Sequence[int] = ()) -> bool:
    """Whether the map between two values is affine entry by entry, with the values `given` taken for constants."""
    equations, live = graph.needed(end, [start, *given]), {start}
    for e in equations:
        if any(isinstance(v, int) and v in live for v in e.inputs):
            live.update(e.outputs)
    moving = [e for e in equations if any(o in live for o in e.outputs)]
    return graph.structs[start].shape == graph.structs[end].shape and all(
        kinds.is_elementwise(e, graph.structs, live) and kinds.is_linear(e, graph.structs, live) for e in moving
    )


def read_statistics(
    graph: jaxprs.Graph,
    reader: Callable[[Sequence[int], int], Callable[..., Any]],
    start: int,
    end: int,
    *,
    normalization: bool,
) -> Statistics | None:
    """The statistics of the map between two values; None where it has none.

    Arguments: `reader(given, end)`, the function (variables, values of `given`) -> value of `end`.
    """
    sums = inside(graph, start, end)
    if not sums:
        return None
    known = reductions(graph)
    names = tuple(known[v] for v in sums)
    each = [reader([start], v) for v in sums]
    from_given = reader([start, *sums], end)

    def measure(variables: Any, x: Any) -> dict[str, Float[Array, "..."]]:
        return {name: function(variables, [x]) for name, function in zip(names, each, strict=True)}

    def given(variables: Any, x: Any, values: Values) -> Float[Array, "..."]:
        return from_given(variables, [x, *(values[name] for name in names)])

    return Statistics(names, measure, given, normalization)


def slope_and_bias(
    statistics: Statistics, variables: Any, struct: jax.ShapeDtypeStruct, values: Values
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(a, b) of z = a x + b, entry by entry, that a normalization is with its statistics given."""
    zero, one = jax.numpy.zeros(struct.shape, struct.dtype), jax.numpy.ones(struct.shape, struct.dtype)
    bias, slope = jax.jvp(lambda x: statistics.given(variables, x, values), (zero,), (one,))
    return slope, bias
