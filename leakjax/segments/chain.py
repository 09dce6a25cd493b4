"""Reading a model: a chain of segments, each a map followed by an elementwise activation.

    z_i = f_i(theta, x_i)      affine in x_i where that can be had, else nonlinear (residual block, max-pooling ...)
    x_{i+1} = act_i(z_i)       entry by entry

A chain is read for the B examples of one gradient at once: they are one input. Statistics over examples (train-mode
batch norm) or within one (layer norm) are a nonlinear map like any other.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from leakjax.errors import InputError, UnreadableModelError
from leakjax.models.activations import Activation, build_activation
from leakjax.models.paths import owner, separator
from leakjax.models.reader import Arrays, Model
from leakjax.runtime.programs import Shelf, keep
from leakjax.segments.geometry import Geometry, read_geometry
from leakjax.segments.pieces import Group, not_invertible, read_groups
from leakjax.segments.stages import Stage, read_stages
from leakjax.segments.tracing import evaluation, jaxprs, kinds
from leakjax.segments.tracing.derivatives import map_flaw
from leakjax.segments.tracing.rules import RULES
from leakjax.segments.tracing.smoothing import smoother
from leakjax.segments.tracing.statistics import Statistics, read_statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """One step of the chain: z = function(variables, x), x_next = activation.function(variables, z).

    - `name`: the parameters' common path, or "segmentK" where it has none;
    - `paths`: the parameters that `function` reads; `function(variables, x, s)` with a smoothing s > 0 is a nonlinear
      map whose kinks are smooth over s times the size of what they act on;
    - `input`, `output`: shapes and dtypes of x and z, leading batch axis B included;
    - `nonlinearity`: the primitive, and its line, that makes `function` nonlinear in x; None where it is affine;
    - `work`: numbers that evaluating `function` once holds at its peak (patches of a convolution included);
    - `stages`: a nonlinear `function`, lifted; () where that cannot be done;
    - `statistics`: of the data, on which a nonlinear `function` depends, as train-mode batch norm does; None for none.
      Where `variables` hold them by name, `function` takes these for them (`cotangent` does not);
    - `geometry`: the sizes of `function`.
    """

    name: str
    paths: tuple[str, ...]
    input: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct
    function: Callable[..., Float[Array, "..."]]
    activation: Activation
    work: int
    geometry: Geometry
    nonlinearity: str | None = None
    stages: tuple[Stage, ...] = ()
    statistics: Statistics | None = None

    @property
    def linear(self) -> bool:
        """Whether `function` is affine in x for all parameters."""
        return self.nonlinearity is None

    @property
    def normalizes(self) -> bool:
        """Whether `function` is affine entry by entry once its statistics are given."""
        return self.statistics is not None and self.statistics.normalization

    def whole(self, variables: Arrays, x: Any, smoothing: Any = None) -> Float[Array, "..."]:
        """`function`, its statistics those of x."""
        names = () if self.statistics is None else self.statistics.names
        return self.function({path: a for path, a in variables.items() if path not in names}, x, smoothing)

    def cotangent(self, variables: Arrays, x: Any, dz: Any, smoothing: Any = None) -> Float[Array, "..."]:
        """dL/dx = (df/dx)^T dL/dz, through its statistics as well."""
        return jax.vjp(lambda x: self.whole(variables, x, smoothing), x)[1](dz)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A model as segments, first to last, and the floating precision that its own code computes in.

    `parametric`: whether an activation depends on the weights it was read with (then the chain serves no others).
    """

    segments: tuple[Segment, ...]
    precision: Any
    parametric: bool


_CHAINS: Shelf[Chain] = Shelf(64)


def read_chain(
    model: Model, input_shape: Sequence[int], dtype: Any, examples: int = 1, *, checked: bool = True
) -> Chain:
    """`read_segments`, once for all models of one architecture (a `parametric` chain serves its own weights alone)."""
    key = (model.apply, model.structs, tuple(input_shape), str(jnp.dtype(dtype)), examples, checked)
    known = _CHAINS.get(key)
    if known is not None:
        return known
    chain = read_segments(model, input_shape, dtype, examples, checked=checked)
    return chain if chain.parametric else _CHAINS.put(key, chain)


def read_segments(
    model: Model, input_shape: Sequence[int], dtype: Any, examples: int = 1, *, checked: bool = True
) -> Chain:
    """Trace a model at inputs (examples, *input_shape) of `dtype` and cut it into segments.

    Without `checked` the derivatives of nonlinear pieces are not looked at, which takes most of the time: enough for
    whoever wants their sizes alone.

    Raises `UnreadableModelError` naming the primitive and the user's line where a nonlinear piece cannot be
    differentiated, where data meets random numbers, or where two segments share a parameter.
    """
    paths = list(model.variables)
    x = jax.ShapeDtypeStruct((examples, *input_shape), dtype)
    graph = jaxprs.trace_by_path(model.apply, model.variables, x)
    precision = kinds.dtype_of_least_precision(graph)
    segments = tuple(
        _segment(graph, model, paths, position, group, dtype, checked)
        for position, group in enumerate(read_groups(graph, known_keys=model.known_keys))
    )
    owner: dict[str, str] = {}
    for segment in segments:
        for path in segment.paths:
            if path in owner:
                raise UnreadableModelError(
                    f"parameter {path!r} is shared by {owner[path]} and {segment.name}: "
                    "its gradient is a sum over both, and cannot be inverted layer by layer; use attack='match' "
                    "(--attack match)"
                )
            owner[path] = segment.name
    if not owner:
        raise InputError("no parameter of the model acts on the data")
    return Chain(segments, precision, any(s.activation.parametric for s in segments))


@keep(64)
def with_statistics(chain: Chain, names: tuple[str, ...]) -> Chain:
    """The chain where the statistics `names` are known: a normalization is affine then."""

    return dataclasses.replace(chain, segments=tuple(told_statistics(segment, names) for segment in chain.segments))


def told_statistics(segment: Segment, names: Collection[str]) -> Segment:
    """The segment, affine where it is a normalization of which all statistics are among `names`."""
    told = segment.statistics is not None and segment.normalizes and set(segment.statistics.names) <= set(names)
    return dataclasses.replace(segment, nonlinearity=None) if told else segment


def _segment(
    graph: jaxprs.Graph,
    model: Model,
    paths: Sequence[str],
    position: int,
    group: Group,
    dtype: Any,
    checked: bool,
) -> Segment:
    names = dict(zip(graph.variables, paths, strict=True))
    start, end = group.map
    evaluate, used = _reader(graph, names, [start], end)
    nonlinear = group.nonlinearity is not None
    smooth = smoother(graph, start, end) if nonlinear else None

    def plain(given: Sequence[int], end: int) -> Callable[..., Any]:
        return _reader(graph, names, given, end)[0]

    statistics = None
    if nonlinear:
        statistics = read_statistics(graph, plain, start, end, normalization=group.normalization)

    def apply(variables: Arrays, x: Any, smoothing: Any = None) -> Any:
        if smoothing is None or smooth is None:
            told = statistics is not None and all(name in variables for name in statistics.names)
            return statistics.given(variables, x, variables) if told and statistics else evaluate(variables, [x])
        return smooth({**{v: variables[path] for v, path in names.items() if path in used}, start: x}, smoothing)

    def activation(entry: int, exit: int) -> Activation:
        _refuse_integers(graph, entry)
        function, parametric = _reader(graph, names, [entry], exit)
        scalar = _on_any_shape(lambda variables, z: function(variables, [z]), graph.structs[entry].shape)
        return build_activation(scalar, model.variables, dtype, parametric=bool(parametric))

    def stage(given: Sequence[int], end: int) -> tuple[Callable[..., Any], tuple[str, ...]]:
        function, used = _reader(graph, names, given, end)
        return function, tuple(path for path in used if path in model.params)

    owned = tuple(path for path in used if path in model.params)
    segment = Segment(
        name=_name(owned, group) or f"segment{position + 1}",
        paths=owned,
        input=graph.structs[group.map[0]],
        output=graph.structs[group.map[1]],
        function=apply,
        activation=activation(*group.activation),
        work=max((kinds.work(e, graph.structs) for e in graph.needed(group.map[1], [group.map[0]])), default=1),
        geometry=read_geometry(graph, start, end, {v for v, path in names.items() if path in model.params}),
        nonlinearity=group.nonlinearity,
        stages=read_stages(graph, stage, activation, start, end) if nonlinear else (),
        statistics=statistics,
    )
    if checked and not segment.linear:
        weights = {path: model.variables[path] for path in used}
        flaw = map_flaw(apply, weights, segment.input, segment.output)
        if flaw is not None:
            raise not_invertible(str(segment.nonlinearity), flaw)
    return segment


def _refuse_integers(graph: jaxprs.Graph, value: int) -> None:
    """A value between layers that holds no floating numbers has no derivative, and no activation acts on it."""
    dtype = graph.structs[value].dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return
    made = next((f"by `{e.name}` at {e.location}" for e in graph.equations if value in e.outputs), "by the model")
    raise UnreadableModelError(
        f"cannot read the model layer by layer: {dtype} values stand between its layers, made {made}; no derivative "
        "passes through them"
    )


def _reader(
    graph: jaxprs.Graph, names: Mapping[int, str], given: Sequence[int], end: int
) -> tuple[Callable[..., Any], list[str]]:
    """(variables, values of `given`) -> the value `end`, and the variables that it reads, in order of first use."""
    equations = graph.needed(end, given)
    read = dict.fromkeys(v for e in equations for v in e.inputs if isinstance(v, int))
    used = [names[v] for v in read if v in names]

    def apply(variables: Arrays, values: Sequence[Any]) -> Any:
        env = {v: variables[path] for v, path in names.items() if path in used}
        return evaluation.evaluate(equations, {**env, **dict(zip(given, values, strict=True))}, end, RULES)

    return apply, used


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


def _name(paths: Sequence[str], group: Group) -> str:
    """The modules that own `paths`: "conv1", or "conv1+bn1" where one map holds several, or what a block's share."""
    owners = list(dict.fromkeys(owner(path) or path for path in paths))
    mark = separator("".join(paths))
    parts = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*(o.split(mark) for o in owners), strict=False))
    shared = mark.join(names[0] for names in parts)
    return shared if group.nonlinearity and shared else "+".join(owners)
