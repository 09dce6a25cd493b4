"""Tracing: a function as a flat list of equations.

The only module that touches `jax.extend.core`. A traced function is flattened (every call-like primitive is inlined,
custom derivatives are kept as they are) into a `Graph` of `Equation`s over integer value ids. Primitives of our own are
made here, too (`linear_primitive`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from leakjax.errors import InputError, cannot_run
from leakjax.segments.tracing.primitives import CALLS, CUSTOM_DERIVATIVES, RANDOM


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A literal or a captured array among an equation's operands."""

    value: Any
    literal: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One primitive application; `inputs` are value ids or `Constant`s, `outputs` value ids."""

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[int | Constant, ...]
    outputs: tuple[int, ...]
    location: str
    custom: Callable[..., Sequence[Any]] | None = None

    @property
    def name(self) -> str:
        """The primitive's name, as JAX prints it."""
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """y = f(variables, x) as equations in execution order."""

    equations: tuple[Equation, ...]
    variables: tuple[int, ...]
    input: int
    output: int
    structs: Mapping[int, jax.ShapeDtypeStruct]

    def dependents(self, sources: Iterable[int]) -> set[int]:
        """Ids of all values that depend on `sources` (themselves included)."""
        found = set(sources)
        for equation in self.equations:
            if any(isinstance(v, int) and v in found for v in equation.inputs):
                found.update(equation.outputs)
        return found

    def random_values(self) -> set[int]:
        """Ids of all values drawn from, or computed with, a random number generator."""
        return self.dependents(o for e in self.equations if e.name.startswith(RANDOM) for o in e.outputs)

    def needed(self, target: int, given: Iterable[int]) -> tuple[Equation, ...]:
        """The equations, in order, that compute `target` when the values `given` are at hand."""
        wanted, stop, chosen = {target}, set(given), []
        for equation in reversed(self.equations):
            if any(o in wanted and o not in stop for o in equation.outputs):
                chosen.append(equation)
                wanted.update(v for v in equation.inputs if isinstance(v, int))
        return tuple(reversed(chosen))


def trace(function: Callable[..., Any], variables: Sequence[Any], x: Any, inlined: Set[str] = CALLS) -> Graph:
    """Trace `function(variables, x)`, one array out, into a flat `Graph`.

    Arguments: `variables` is a list of arrays (or structs), `x` an array or struct; `inlined`, primitives that are
    replaced by the jaxpr they carry. Nothing is computed.
    """
    graph, others = trace_several(function, variables, x, inlined)
    if others:
        raise InputError(
            f"model must return one array of logits, got {len(others) + 1} outputs; return the logits only"
        )
    return graph


def trace_several(
    function: Callable[..., Any], variables: Sequence[Any], x: Any, inlined: Set[str] = CALLS
) -> tuple[Graph, tuple[int | Constant, ...]]:
    """`trace` of a function that returns logits and further arrays: the graph of the logits, and those others in it."""
    try:
        flat = flatten(lambda v, x: function(v, x), (list(variables), x), inlined)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the model's own code
        raise cannot_run(x.shape, error) from error
    if not flat.outputs:
        raise InputError("model must return one array of logits, got none")
    output, *others = flat.outputs
    if not isinstance(output, int):
        raise InputError("model's output is a constant: it does not depend on its input")
    graph = Graph(
        equations=flat.equations, variables=flat.inputs[:-1], input=flat.inputs[-1], output=output, structs=flat.structs
    )
    if graph.output not in graph.dependents([graph.input]):
        raise InputError("model's logits do not depend on its input: no gradient of them says anything of an image")
    return graph, tuple(others)


def trace_by_path(
    apply: Callable[[Mapping[str, Any], Any], Any], arrays: Mapping[str, Any], x: Any, inlined: Set[str] = CALLS
) -> Graph:
    """`trace` of apply(arrays by path, x), as models have it; the graph's `variables` are in the order of `arrays`."""
    paths = list(arrays)
    return trace(lambda leaves, x: apply(dict(zip(paths, leaves, strict=True)), x), list(arrays.values()), x, inlined)


class Flat(NamedTuple):
    """Any traced function: its `equations`, ids of its `inputs`, its `outputs` (ids or constants), and `structs`."""

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | Constant, ...]
    structs: dict[int, jax.ShapeDtypeStruct]

    def needed(self) -> list[Equation]:
        """The equations, in order, on which an output depends."""
        wanted, chosen = {v for v in self.outputs if isinstance(v, int)}, []
        for equation in reversed(self.equations):
            if any(o in wanted for o in equation.outputs):
                chosen.append(equation)
                wanted.update(v for v in equation.inputs if isinstance(v, int))
        return chosen[::-1]


_MOST_UNROLLED = 20_000
"""Equations that the iterations of one loop may come to: a hundred layers of a transformer."""


def flatten(function: Callable[..., Any], arguments: Sequence[Any], inlined: Set[str] = CALLS) -> Flat:
    """Trace `function(*arguments)`, of and to any pytrees of arrays (or structs), into equations.

    A `scan` is unrolled where its iterations do not come to more than `_MOST_UNROLLED` equations; a row of an array
    that rows were stacked to is that row.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    structs: dict[int, jax.ShapeDtypeStruct] = {}
    counter = itertools.count()
    equations: list[Equation] = []
    stacks: dict[int, tuple[int | Constant, ...]] = {}

    def new_id(var: Any) -> int:
        i = next(counter)
        structs[i] = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        return i

    def run(function: Callable[..., Any], operands: Sequence[int | Constant]) -> int | Constant:
        """The value of a function of our own, as equations."""
        given = [structs[v] if isinstance(v, int) else v.value for v in operands]
        added = jax.make_jaxpr(function)(*given)
        return walk(added.jaxpr, added.consts, operands)[0]

    def unroll(eqn: Any, inputs: Sequence[int | Constant]) -> list[int | Constant]:
        fixed, carried, length = (eqn.params[k] for k in ("num_consts", "num_carry", "length"))
        body, body_consts = opened(eqn.params["jaxpr"])
        consts, carry, rows = inputs[:fixed], list(inputs[fixed : fixed + carried]), inputs[fixed + carried :]
        made: dict[int, list[int | Constant]] = {}
        for i in range(length)[:: -1 if eqn.params["reverse"] else 1]:
            row = [run(lambda a, i=i: jax.lax.index_in_dim(a, i, keepdims=False), [v]) for v in rows]
            out = walk(body, body_consts, [*consts, *carry, *row])
            carry, made[i] = out[:carried], out[carried:]
        stacked = zip(*(made[i] for i in range(length)), strict=True)
        return [*carry, *(run(as_rows, values) for values in stacked)]

    def walk(jaxpr: Any, consts: Sequence[Any], operands: Sequence[int | Constant]) -> list[int | Constant]:
        env: dict[Any, int | Constant] = dict(zip(jaxpr.invars, operands, strict=True))
        env.update((v, Constant(c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

        def read(atom: Any) -> int | Constant:
            return Constant(atom.val, literal=True) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            if eqn.primitive.name in inlined:
                inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
                body, body_consts = opened(inner)
                env.update(zip(eqn.outvars, walk(body, body_consts, inputs), strict=True))
                continue
            if eqn.primitive.name == "scan" and _unrolls(eqn):
                env.update(zip(eqn.outvars, unroll(eqn, inputs), strict=True))
                continue
            row = _row_of(eqn, inputs, structs)
            if row is not None and isinstance(inputs[0], int) and inputs[0] in stacks:
                env[eqn.outvars[0]] = stacks[inputs[0]][row]
                continue
            outputs = tuple(new_id(v) for v in eqn.outvars)
            if eqn.primitive.name == "concatenate" and eqn.params["dimension"] == 0 and _single_rows(eqn):
                stacks[outputs[0]] = inputs
            env.update(zip(eqn.outvars, outputs, strict=True))
            custom = _alone(jaxpr, eqn) if eqn.primitive.name in CUSTOM_DERIVATIVES else None
            equations.append(
                Equation(
                    primitive=eqn.primitive,
                    params=eqn.params,
                    inputs=inputs,
                    outputs=outputs,
                    location=_location(eqn),
                    custom=custom,
                )
            )
        return [read(v) for v in jaxpr.outvars]

    ids = [new_id(v) for v in closed.jaxpr.invars]
    outputs = walk(closed.jaxpr, closed.consts, ids)
    return Flat(tuple(equations), tuple(ids), tuple(outputs), structs)


def _unrolls(eqn: Any) -> bool:
    return _unrolled_size(eqn) <= _MOST_UNROLLED


def _unrolled_size(eqn: Any) -> int:
    """Equations that one comes to when every loop in it is unrolled."""
    body = body_of(eqn.params)
    inside = 1 if body is None else sum(map(_unrolled_size, opened(body)[0].eqns))
    return max(1, inside) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)


def _single_rows(eqn: Any) -> bool:
    return all(v.aval.shape[0] == 1 for v in eqn.invars)


def _row_of(eqn: Any, inputs: Sequence[int | Constant], structs: Mapping[int, jax.ShapeDtypeStruct]) -> int | None:
    """Which row along the first axis an equation takes of its operand, None where it does anything else."""
    if eqn.primitive.name != "slice" or not isinstance(inputs[0], int):
        return None
    return row_taken(eqn.params, structs[inputs[0]].shape)


def as_rows(*each: Any) -> Any:
    """Arrays of one shape as the rows of one: what `flatten` takes apart again."""
    return jax.lax.concatenate([jnp.expand_dims(a, 0) for a in each], 0)


def row_taken(params: Mapping[str, Any], shape: Sequence[int]) -> int | None:
    """Which row along the first axis a `slice` of an array of `shape` takes; None where it is not one whole row."""
    start, limit = tuple(params["start_indices"]), tuple(params["limit_indices"])
    whole = start[1:] == (0,) * (len(shape) - 1) and limit[1:] == tuple(shape[1:])
    whole = whole and all(step == 1 for step in params["strides"] or ())
    return start[0] if whole and limit[0] == start[0] + 1 else None


def as_function(jaxpr: Any) -> Callable[..., Sequence[Any]]:
    """A jaxpr, closed or without constants, as a function of its operands."""
    return jex.jaxpr_as_fun(jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ()))


def operands_of(jaxpr: Any) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what a jaxpr takes."""
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in opened(jaxpr)[0].invars]


def evaluate_in(dtype: Any, equations: Iterable[Equation], env: Mapping[int, Any], target: int) -> Any:
    """The value `target` with every floating number in `dtype`, whatever precision the equations were traced in.

    Rounding to another precision is left out. Raises `ValueError` for a primitive that carries a jaxpr of its own
    (a loop, a branch), which was traced for one precision.
    """
    values = dict(env)
    for equation in equations:
        if any(isinstance(v, jex.Jaxpr | jex.ClosedJaxpr) for v in equation.params.values()):
            raise ValueError(f"{equation.name} ({equation.location}) was traced for one precision")
        read = [v.value if isinstance(v, Constant) else values[v] for v in equation.inputs]
        operands = [jnp.asarray(v, dtype) if jnp.issubdtype(jnp.result_type(v), jnp.floating) else v for v in read]
        if equation.name == "reduce_precision":
            results = operands
        else:
            params = {k: dtype if _is_floating_dtype(v) else v for k, v in equation.params.items()}
            result = equation.primitive.bind(*operands, **params)
            results = result if equation.primitive.multiple_results else [result]
        values.update(zip(equation.outputs, results, strict=True))
    return values[target]


def linear_primitive(
    name: str,
    function: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    shape: Callable[[tuple[int, ...], Any], tuple[int, ...]],
) -> Callable[[Any, Hashable], Any]:
    """A primitive y = function(x, static), linear in the array x, as a callable of x and a hashable `static`.

    - `function`: takes any number of leading axes of x (a batch axis comes first) and keeps them and the dtype;
    - `transpose`: maps (cotangent of y, static) to the cotangent of x;
    - `shape`: maps (shape of x, static) to the shape of y.
    """
    primitive = jex.Primitive(name)
    compiled = jax.jit(function, static_argnums=1)

    def apply(x: Any, static: Hashable) -> Any:
        return primitive.bind(x, static=static)

    def pull_back(cotangent: Any, _: Any, *, static: Any) -> list[Any]:
        return [cotangent if isinstance(cotangent, ad.Zero) else transpose(cotangent, static)]

    def batch(operands: Any, axes: Any, *, static: Any) -> tuple[Any, int]:
        return apply(jnp.moveaxis(operands[0], axes[0], 0), static), 0

    primitive.def_impl(lambda x, *, static: compiled(x, static))
    primitive.def_abstract_eval(lambda x, *, static: x.update(shape=shape(x.shape, static)))
    ad.deflinear2(primitive, pull_back)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x, *, static: function(x, static), multiple_results=False))
    return apply


def body_of(params: Mapping[str, Any]) -> Any:
    """The first jaxpr that an equation's parameters carry; None if there is none."""
    kinds = (jex.Jaxpr, jex.ClosedJaxpr)
    flat = [v for p in params.values() for v in (p if isinstance(p, tuple | list) else [p])]
    return next((v for v in flat if isinstance(v, kinds)), None)


def all_equations(jaxpr: Any) -> list[Any]:
    """All equations of a jaxpr, nested ones included."""
    inner = [(e, body_of(e.params)) for e in opened(jaxpr)[0].eqns]
    return [e for eqn, body in inner for e in (eqn, *([] if body is None else all_equations(body)))]


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr without its constants, and these."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())


def depends(jaxpr: Any, sources: Iterable[Any]) -> list[bool]:
    """Whether each output of a jaxpr depends on any of the variables `sources`."""
    found = set(sources)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, jex.Literal) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return [not isinstance(v, jex.Literal) and v in found for v in jaxpr.outvars]


def _is_floating_dtype(value: Any) -> bool:
    return isinstance(value, np.dtype) and jnp.issubdtype(value, jnp.floating)


def _alone(jaxpr: Any, eqn: Any) -> Callable[..., Sequence[Any]]:
    """One equation of a jaxpr as a function of its non-literal operands, custom derivative and all."""
    invars = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
    names = jaxpr.debug_info._replace(
        arg_names=tuple(f"a{k}" for k in range(len(invars))), result_paths=tuple("" for _ in eqn.outvars)
    )
    alone = jaxpr.replace(constvars=[], invars=invars, outvars=list(eqn.outvars), eqns=[eqn], debug_info=names)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))


def _location(eqn: Any) -> str:
    """'file:line' of the innermost frame outside installed packages, or of the innermost one outside JAX."""
    traceback = eqn.source_info.traceback
    frames = list(traceback.frames) if traceback is not None else []
    packages = ("site-packages", "dist-packages")
    jax_home = str(jax.__path__[0])

    def line(frame: Any) -> str:
        return f"{frame.file_name}:{frame.line_num if hasattr(frame, 'line_num') else frame.start_line}"

    outside = [f for f in frames if f.file_name != __file__ and not f.file_name.startswith(jax_home)]
    users = [f for f in outside if not any(p in f.file_name for p in packages)]
    return line((users or outside)[0]) if outside else "an unknown line"
