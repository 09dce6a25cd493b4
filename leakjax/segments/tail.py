"""What follows the last layer with parameters, as part of the loss: a final softmax, a norm, a choice among outputs.

    loss(tail(z), y),    z the last layer's outputs

is a loss of z like any other, and dL/dz is read off the last layer's bias whatever it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from leakjax.errors import InputError
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.reader import Arrays, Model
from leakjax.runtime.programs import keep
from leakjax.segments.pieces import read_groups
from leakjax.segments.tracing import jaxprs

Tail = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def without_tail(model: Model, input_shape: Sequence[int], dtype: Any) -> tuple[Model, Tail | None]:
    """(the model up to its last layer with parameters, z of one example -> the outputs).

    The model as it is, and None, where nothing but an elementwise function follows that layer.
    """
    structs = tuple((path, tuple(a.shape), str(a.dtype)) for path, a in model.variables.items())
    parts = _cut(model.apply, structs, tuple(model.params), tuple(input_shape), str(dtype), model.known_keys)
    if parts is None:
        return model, None
    apply, tail = parts
    return Model(apply, model.params, model.buffers, model.known_keys), tail


@keep(64)
def behind(loss: LossSpec, tail: Tail) -> LossSpec:
    """The loss of z whose tail's outputs have the `loss`."""
    function = read_loss(loss)
    return lambda z, target: function(tail(z), target)


Structs = tuple[tuple[str, tuple[int, ...], str], ...]


@keep(64)
def _cut(
    apply: Callable[..., Any],
    structs: Structs,
    params: tuple[str, ...],
    input_shape: tuple[int, ...],
    dtype: str,
    known_keys: bool,
) -> tuple[Callable[..., Any], Tail] | None:
    x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
    arrays = {path: jax.ShapeDtypeStruct(shape, kind) for path, shape, kind in structs}
    try:
        graph, ends = _ends(apply, arrays, x, params, known_keys)
    except InputError:
        return None
    if ends is None:
        return None

    def front(variables: Arrays, x: Any) -> Any:
        graph, ends = _ends(apply, variables, x, params, known_keys)
        assert ends is not None, "found for one example"
        env = {**dict(zip(graph.variables, variables.values(), strict=True)), graph.input: x}
        return jaxprs.evaluate(graph.needed(ends, list(env)), env, ends, {})

    def tail(z: Float[Array, "..."]) -> Float[Array, "..."]:
        return jaxprs.evaluate(graph.needed(graph.output, [ends]), {ends: z[None]}, graph.output, {})[0]

    return front, tail


def _ends(
    apply: Callable[..., Any], arrays: Mapping[str, Any], x: Any, params: Sequence[str], known_keys: bool
) -> tuple[jaxprs.Graph, int | None]:
    """The graph, and the outputs of its last layer with parameters where a nonlinear map of them alone follows."""
    paths = list(arrays)
    graph = jaxprs.trace(
        lambda leaves, x: apply(dict(zip(paths, leaves, strict=True)), x),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays.values()],
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    weights = {v for v, path in zip(graph.variables, paths, strict=True) if path in params}

    def reads(start: int, end: int, among: set[int]) -> bool:
        used = (v for e in graph.needed(end, [start]) for v in e.inputs if isinstance(v, int))
        return any(v in among for v in used)

    groups = read_groups(graph, known_keys=known_keys)
    last = max((k for k, g in enumerate(groups) if reads(*g.map, weights)), default=None)
    if last is None or all(g.nonlinearity is None for g in groups[last + 1 :]):
        return graph, None
    end = groups[last].map[1]
    alone = not reads(end, graph.output, {*graph.variables, graph.input})
    return graph, end if alone else None
