"""What follows the last layer with parameters, as part of the loss: a final softmax, a norm, a choice among outputs.

    loss(tail(z), y),    z the last layer's outputs

is a loss of z like any other, and dL/dz is read off the last layer's bias whatever it is.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.errors import InputError
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.reader import Arrays, Model
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.pieces import cut_pieces, is_mixing
from leakjax.segments.tracing import evaluation, jaxprs

Tail = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def without_tail(model: Model, input_shape: Sequence[int], dtype: Any, examples: int) -> tuple[Model, Tail | None]:
    """(the model up to its last layer with parameters, z of one example -> the outputs).

    The model as it is, and None, where nothing but an elementwise function follows that layer, and where what follows
    does not do the same with each of the `examples` of a batch.
    """
    parts = _cut(model.apply, model.structs, tuple(model.params), tuple(input_shape), str(jnp.dtype(dtype)), examples)
    if parts is None:
        return model, None
    apply, tail = parts
    return dataclasses.replace(model, apply=apply), tail


@keep(64)
def behind(loss: LossSpec, tail: Tail) -> LossSpec:
    """The loss of z whose tail's outputs have the `loss`."""
    function = read_loss(loss)
    return lambda z, target: function(tail(z), target)


Structs = tuple[tuple[str, tuple[int, ...], Any], ...]


@keep(64)
def _cut(
    apply: Callable[..., Any],
    structs: Structs,
    params: tuple[str, ...],
    input_shape: tuple[int, ...],
    dtype: str,
    examples: int,
) -> tuple[Callable[..., Any], Tail] | None:
    x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
    arrays = {path: jax.ShapeDtypeStruct(shape, kind) for path, shape, kind in structs}
    try:
        graph, ends = _ends(apply, arrays, x, params)
    except InputError:
        return None
    if ends is None:
        return None

    def front(variables: Arrays, x: Any) -> Any:
        graph, ends = _ends(apply, variables, x, params)
        assert ends is not None, "found for one example"
        env = {**dict(zip(graph.variables, variables.values(), strict=True)), graph.input: x}
        return evaluation.evaluate(graph.needed(ends, list(env)), env, ends, {})

    def tail(z: Float[Array, "..."]) -> Float[Array, "..."]:
        return evaluation.evaluate(graph.needed(graph.output, [ends]), {ends: z[None]}, graph.output, {})[0]

    return (front, tail) if _is_of_one(apply, arrays, x, params, tail, examples) else None


def _is_of_one(
    apply: Callable[..., Any],
    arrays: Mapping[str, Any],
    x: jax.ShapeDtypeStruct,
    params: Sequence[str],
    tail: Tail,
    examples: int,
) -> bool:
    """Whether the outputs of a batch are those of `tail` at each example's z, seen at random z."""
    if examples == 1:
        return True
    batch = jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype)
    try:
        graph, end = _ends(apply, arrays, batch, params)
    except InputError:
        return False
    if end is None:
        return False
    z = to_device(np.random.default_rng(0).normal(size=graph.structs[end].shape), x.dtype)
    if graph.structs[end].shape[:1] != (examples,):
        return False
    together = evaluation.evaluate(graph.needed(graph.output, [end]), {end: z}, graph.output, {})
    each = jnp.stack([tail(one) for one in z])
    if together.shape != each.shape:
        return False
    off, eps = float(jnp.linalg.norm(together - each)), float(jnp.finfo(x.dtype).eps)
    return off <= 1e3 * eps * float(jnp.linalg.norm(each))


def _ends(
    apply: Callable[..., Any], arrays: Mapping[str, Any], x: Any, params: Sequence[str]
) -> tuple[jaxprs.Graph, int | None]:
    """The graph, and the outputs of its last layer with parameters where a nonlinear map of them alone follows."""
    structs = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in arrays.items()}
    graph = jaxprs.trace_by_path(apply, structs, jax.ShapeDtypeStruct(x.shape, x.dtype))
    weights = {v for v, path in zip(graph.variables, arrays, strict=True) if path in params}
    live = graph.dependents([graph.input])
    pieces = cut_pieces(graph, live)
    last = max((k for k, (_, _, piece) in enumerate(pieces) if _read(graph, piece) & weights), default=None)
    if last is None or not any(is_mixing(graph, live, piece) for _, _, piece in pieces[last + 1 :]):
        return graph, None
    end = pieces[last][1]
    return graph, None if _read(graph, graph.needed(graph.output, [end])) & {*graph.variables, graph.input} else end


def _read(graph: jaxprs.Graph, equations: Sequence[jaxprs.Equation]) -> set[int]:
    """The values that equations read, and what these were computed from but for data."""
    live, found = graph.dependents([graph.input]), {v for e in equations for v in e.inputs if isinstance(v, int)}
    before = [e for v in found - live for e in graph.needed(v, [])]
    return found | {v for e in before for v in e.inputs if isinstance(v, int)}
