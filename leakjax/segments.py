"""Reading a model: a chain of segments, each an affine map followed by an elementwise activation.

    z_i = f_i(theta, x_i)      affine in x_i
    x_{i+1} = act_i(z_i)       entry by entry

The traced graph is cut wherever all data flows through one value; each piece between two cuts is affine, elementwise,
or unreadable. Adjacent affine pieces are one affine map, adjacent elementwise ones one activation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from leakjax import _jaxpr
from leakjax.activations import Activation, build_activation
from leakjax.errors import InputError, UnreadableModelError
from leakjax.model import Arrays, Model


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """One step of the chain: z = function(variables, x), x_next = activation.function(variables, z).

    - `name`: the parameters' common path, or "segmentK" where it has none;
    - `paths`: the parameters that `function` reads;
    - `input`, `output`: shapes and dtypes of x and z, leading batch axis 1 included;
    - `work`: numbers that evaluating `function` once holds at its peak (patches of a convolution included).
    """

    name: str
    paths: tuple[str, ...]
    input: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct
    function: Callable[[Arrays, Float[Array, "..."]], Float[Array, "..."]]
    activation: Activation
    work: int


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A model as segments, first to last, and the floating precision that its own code computes in.

    `parametric`: whether an activation depends on the weights it was read with (then the chain serves no others).
    """

    segments: tuple[Segment, ...]
    precision: Any
    parametric: bool


def read_segments(model: Model, input_shape: Sequence[int], dtype: Any) -> Chain:
    """Trace a model at inputs (1, *input_shape) of `dtype` and cut it into segments.

    Raises `UnreadableModelError` naming the primitive and the user's line where a piece is neither affine nor
    elementwise, where data meets random numbers, or where two segments share a parameter.
    """
    paths = list(model.variables)
    x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
    arrays = [model.variables[path] for path in paths]
    graph = _jaxpr.trace(lambda leaves, x: model.apply(dict(zip(paths, leaves, strict=True)), x), arrays, x)
    precision = _jaxpr.dtype_of_least_precision(graph)
    live = graph.dependents([graph.input])
    _refuse_random(graph, live)
    groups = _merge([_classify(graph, live, piece) for piece in _cut(graph, live)])
    segments = tuple(
        _segment(graph, model, paths, position, affine, elementwise, dtype)
        for position, (affine, elementwise) in enumerate(groups)
    )
    owner: dict[str, str] = {}
    for segment in segments:
        for path in segment.paths:
            if path in owner:
                raise UnreadableModelError(
                    f"parameter {path!r} is shared by {owner[path]} and {segment.name}: "
                    "its gradient is a sum over both, and cannot be inverted layer by layer"
                )
            owner[path] = segment.name
    if not owner:
        raise InputError("no parameter of the model acts on the data")
    return Chain(segments, precision, any(s.activation.parametric for s in segments))


@dataclasses.dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    affine: bool


def _cut(graph: _jaxpr.Graph, live: set[int]) -> list[tuple[int, int, list[_jaxpr.Equation]]]:
    """Pieces (value in, value out, equations) between the values that all data flows through."""
    equations = [e for e in graph.equations if any(o in live for o in e.outputs)]
    last_use = {graph.output: len(equations)}
    for k, equation in enumerate(equations):
        for v in equation.inputs:
            if isinstance(v, int) and v in live:
                last_use[v] = max(last_use.get(v, -1), k)
    pieces, start, current, alive = [], graph.input, [], {graph.input}
    for k, equation in enumerate(equations):
        current.append(equation)
        alive |= {o for o in equation.outputs if last_use.get(o, -1) > k}
        alive = {v for v in alive if last_use[v] > k}
        if len(alive) == 1:
            (end,) = alive
            if end != start:
                pieces.append((start, end, current))
                start, current = end, []
    return pieces


def _classify(graph: _jaxpr.Graph, live: set[int], piece: tuple[int, int, list[_jaxpr.Equation]]) -> _Piece:
    start, end, equations = piece
    nonlinear = [e for e in equations if not _jaxpr.is_linear(e, graph.structs, live)]
    if not nonlinear:
        return _Piece(start, end, True)
    odd = [e for e in equations if not _jaxpr.is_elementwise(e, graph.structs, live)]
    if not odd:
        return _Piece(start, end, False)
    culprit = next((e for e in nonlinear if e in odd), nonlinear[0])
    raise UnreadableModelError(
        f"cannot read `{culprit.name}` at {culprit.location}: this part of the model is neither affine nor elementwise "
        f"({_advice(culprit)})"
    )


def _advice(equation: _jaxpr.Equation) -> str:
    if equation.name == "reduce_window_max":
        return "max-pooling; use average pooling or strides"
    return (
        "train-mode batch norm? call model.eval() or pass use_running_average=True; layer norm, attention, softmax and "
        "residual blocks around activations cannot be inverted layer by layer"
    )


def _refuse_random(graph: _jaxpr.Graph, live: set[int]) -> None:
    random = graph.random_values()
    for equation in graph.equations:
        inputs = [v for v in equation.inputs if isinstance(v, int)]
        if any(v in live for v in inputs) and any(v in random and v not in live for v in inputs):
            raise UnreadableModelError(
                f"random numbers meet the data in `{equation.name}` at {equation.location} (dropout in train mode?); "
                "call model.eval() or pass deterministic=True: a server does not know the client's mask"
            )


def _merge(pieces: Sequence[_Piece]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Group pieces into ((affine in, affine out), (activation in, activation out)) pairs; either may be empty."""
    groups: list[tuple[tuple[int, int], tuple[int, int]]] = []
    open_affine = False
    for piece in pieces:
        if piece.affine and open_affine:
            (start, _), _ = groups[-1]
            groups[-1] = ((start, piece.end), (piece.end, piece.end))
        elif piece.affine:
            groups.append(((piece.start, piece.end), (piece.end, piece.end)))
        elif groups:
            affine, (start, _) = groups[-1]
            groups[-1] = (affine, (start, piece.end))
        else:
            groups.append(((piece.start, piece.start), (piece.start, piece.end)))
        open_affine = piece.affine
    return groups


def _segment(
    graph: _jaxpr.Graph,
    model: Model,
    paths: Sequence[str],
    position: int,
    affine: tuple[int, int],
    elementwise: tuple[int, int],
    dtype: Any,
) -> Segment:
    by_id = dict(zip(graph.variables, paths, strict=True))

    def reader(start: int, end: int) -> tuple[Callable[[Arrays, Any], Any], list[str]]:
        equations = graph.needed(end, [start])
        read = dict.fromkeys(v for e in equations for v in e.inputs if isinstance(v, int))
        used = [by_id[v] for v in read if v in by_id]  # in order of first use

        def apply(variables: Arrays, x: Any) -> Any:
            env = {v: variables[path] for v, path in by_id.items() if path in used}
            return _jaxpr.evaluate(equations, {**env, start: x}, end)

        return apply, used

    apply, used = reader(*affine)
    function, parametric = reader(*elementwise)
    scalar = _on_any_shape(function, graph.structs[elementwise[0]].shape)
    activation = build_activation(scalar, model.variables, dtype, parametric=bool(parametric))
    owned = tuple(path for path in used if path in model.params)
    return Segment(
        _owner_names(owned) or f"segment{position + 1}",
        owned,
        graph.structs[affine[0]],
        graph.structs[affine[1]],
        apply,
        activation,
        max((_jaxpr.work(e, graph.structs) for e in graph.needed(affine[1], [affine[0]])), default=1),
    )


def _on_any_shape(function: Callable[[Arrays, Any], Any], shape: tuple[int, ...]) -> Callable[[Arrays, Any], Any]:
    """The elementwise `function`, traced at `shape`, on arrays of any shape."""

    size = math.prod(shape)

    def apply(variables: Arrays, z: Any) -> Any:
        if z.shape == shape:
            return function(variables, z)
        rows = -(-z.size // size)
        padded = jnp.concatenate([jnp.ravel(z), jnp.zeros(rows * size - z.size, z.dtype)])
        values = jax.vmap(functools.partial(function, variables))(padded.reshape(rows, *shape))
        return jnp.ravel(values)[: z.size].reshape(z.shape)

    return apply


def _owner_names(paths: Sequence[str]) -> str:
    """The modules that own `paths`: "conv1", or "conv1+bn1" where one affine map holds several."""
    return "+".join(dict.fromkeys(path.rpartition("/")[0] or path for path in paths))
