"""The batch's own statistics, read off the running ones that a client sends after its step.

    new = m old + (1 - m) batch

or whatever else the model's code says: the traced map from the sums over the data (`tracing.statistics`) to the new
buffers is solved for the sums by Newton's method, module by module. Conventions of momentum, of biased and unbiased
variances and of how a variance is computed need no code of their own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from leakjax.errors import InputError
from leakjax.models.reader import Arrays, Model
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing import evaluation, jaxprs
from leakjax.segments.tracing.statistics import reductions

_STEPS = 20
"""Of Newton's method: a mean and a mean of squares take three."""

_SMALL = 1e-6
"""Of the largest sum of a module at noise: what one that is 0 there is measured in."""

_RESIDUE = 1e3
"""Roundings of the client's, relative to a buffer's own size, that may remain."""


def _unclipped(a: Any, b: Any) -> Any:
    """max(a, b), where neither is the number 0; else the other."""
    for bound, other in ((a, b), (b, a)):
        if isinstance(bound, np.ndarray | np.generic | float) and not np.any(bound):
            return other
    return jnp.maximum(a, b)


_AS_IT_IS = {"stop_gradient": lambda a, **_: a}
"""Running statistics take no part in the client's gradient, and are differentiated here all the same."""

_UNCLIPPED = {**_AS_IT_IS, "max": _unclipped}
"""For Newton's method: beyond a clip at 0, as of a variance, nothing would lead back. The answer is held against the
model as it is."""


class _Module(NamedTuple):
    """Buffers that depend on the same sums: paths and values of the ones, names and values of the others."""

    buffers: dict[str, int]
    sums: dict[int, str]


class _Solvable(NamedTuple):
    """Compiled, for one module, `left(variables, t, sent)`, what the buffers of the sums t miss of those `sent`; the
    same `unclipped`, with its `jacobian` in t; `paths` of the buffers, and `unravel(t)`, the sums by name, so
    many `numbers` in all."""

    paths: tuple[str, ...]
    numbers: int
    left: Callable[..., Any]
    unclipped: Callable[..., Any]
    jacobian: Callable[..., Any]
    unravel: Callable[[Any], dict[str, Any]]


class _Read(NamedTuple):
    """An architecture: its modules, paths of all buffers that are `moved` by the data, and compiled (variables, x) ->
    the sums of each module, in one vector."""

    modules: tuple[_Solvable, ...]
    moved: tuple[str, ...]
    sums: Callable[..., tuple[Any, ...]]


def read_sent_statistics(
    model: Model,
    buffers: Mapping[str, np.ndarray],
    input_shape: Sequence[int],
    input_range: tuple[float, float],
    examples: int,
    dtype: Any,
    rounding: float,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The sums over the data, by name, (V, ...) of each of V clients, as far as their new `buffers` (V, ...) say; and
    the relative rounding of each, the largest of all clients: where the batch's share of a buffer is 0.01, its sums
    have two digits less than the buffer.

    Arguments: `model` with the weights and old buffers that the clients began with; `rounding`, relative, of what they
    computed.

    Raises `InputError` naming the buffer where the model cannot have left it there.
    """
    told = tuple(path for path in buffers if jnp.issubdtype(model.buffers[path].dtype, jnp.floating))
    if model.step is None or not told:
        return {}, {}
    shape = (examples, *input_shape)
    read = _read(model.step, model.structs, told, shape, str(jnp.dtype(dtype)))
    variables = {path: to_device(a) for path, a in model.variables.items()}
    noise = np.random.default_rng(0).uniform(*input_range, size=shape).astype(dtype)
    found: dict[str, list[np.ndarray]] = {}
    rounded: dict[str, float] = {}
    victims = len(buffers[told[0]])
    for module, begin in zip(read.modules, read.sums(variables, noise), strict=True):
        for victim in range(victims):
            sent = {path: np.asarray(buffers[path][victim], dtype) for path in module.paths}
            for name, (value, own) in _solve(module, variables, sent, np.asarray(begin), rounding).items():
                found.setdefault(name, []).append(value)
                rounded[name] = max(own, rounded.get(name, rounding))
    whole = {name: np.stack(values) for name, values in found.items() if len(values) == victims}
    return whole, {name: rounded[name] for name in whole}


def sums_in_buffers(
    model: Model, paths: Sequence[str], input_shape: Sequence[int], dtype: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names of the sums over the data of one example that the buffers `paths` have enough numbers for, those of the
    buffers that depend on the data in any way), from shapes alone."""
    if model.step is None:
        return (), ()
    read = _read(model.step, model.structs, tuple(paths), (1, *input_shape), str(jnp.dtype(dtype)))
    names: list[str] = []
    for module in read.modules:
        sums = module.unravel(np.zeros(module.numbers))
        numbers = sum(int(np.prod(model.buffers[path].shape)) for path in module.paths)
        names += sums if numbers >= module.numbers else ()
    return tuple(names), read.moved


@keep(32)
def _read(step: Any, structs: Any, told: tuple[str, ...], shape: tuple[int, ...], dtype: str) -> _Read:
    """Trace a model's `step` and compile what its buffers `told` say of the sums over the data."""
    arrays = {path: jax.ShapeDtypeStruct(size, kind) for path, size, kind in structs}

    def several(leaves: Sequence[Any], x: Any) -> list[Any]:
        logits, after = step(dict(zip(arrays, leaves, strict=True)), x)
        return [logits, *(after[path] for path in told)]

    graph, after = jaxprs.trace_several(several, list(arrays.values()), jax.ShapeDtypeStruct(shape, dtype))
    modules = _modules(graph, dict(zip(told, after, strict=True)))

    def sums(variables: Arrays, x: Any) -> tuple[Any, ...]:
        env = {v: variables[path] for v, path in zip(graph.variables, arrays, strict=True)}
        values = evaluation.evaluate_all(graph.needed(graph.output, []), {**env, graph.input: x}, {})
        return tuple(ravel_pytree({name: values[v] for v, name in m.sums.items()})[0] for m in modules)

    live = graph.dependents([graph.input])
    moved = tuple(path for path, v in zip(told, after, strict=True) if isinstance(v, int) and v in live)
    return _Read(tuple(_solvable(graph, list(arrays), module) for module in modules), moved, jax.jit(sums))


def _modules(graph: jaxprs.Graph, after: Mapping[str, Any]) -> list[_Module]:
    """New buffers that depend on the data through sums alone, with those sums; one module for any that share a sum."""
    sums, live = reductions(graph), graph.dependents([graph.input])
    found: list[_Module] = []
    for path, value in after.items():
        if not isinstance(value, int) or value not in live:
            continue
        equations = graph.needed(value, sums)
        read = {v for e in equations for v in e.inputs if isinstance(v, int)} | {value}
        made = {o for e in equations for o in e.outputs}
        mine = {v: sums[v] for v in sums if v in read}
        if not mine or any(v in live and v not in mine and v not in made for v in read):
            continue
        joined = _Module({path: value}, mine)
        for other in [m for m in found if m.sums.keys() & mine.keys()]:
            found.remove(other)
            joined = _Module({**other.buffers, **joined.buffers}, {**other.sums, **joined.sums})
        found.append(joined)
    return found


def _solvable(graph: jaxprs.Graph, paths: Sequence[str], module: _Module) -> _Solvable:
    structs = {name: jnp.zeros(graph.structs[v].shape, graph.structs[v].dtype) for v, name in module.sums.items()}
    flat, unravel = ravel_pytree(structs)
    parts = {p: graph.needed(v, module.sums) for p, v in module.buffers.items()}

    def left(rules: Mapping[str, Callable[..., Any]], variables: Arrays, t: Any, sent: Any) -> Any:
        sums = unravel(t)
        env = {v: variables[path] for v, path in zip(graph.variables, paths, strict=True)}
        env |= {v: sums[name] for v, name in module.sums.items()}
        made = {p: evaluation.evaluate(parts[p], env, v, rules) for p, v in module.buffers.items()}
        return ravel_pytree(jax.tree.map(jnp.subtract, made, sent))[0]

    clipped, unclipped = (functools.partial(left, rules) for rules in (_AS_IT_IS, _UNCLIPPED))
    return _Solvable(
        paths=tuple(module.buffers),
        numbers=flat.size,
        left=jax.jit(clipped),
        unclipped=jax.jit(unclipped),
        jacobian=jax.jit(jax.jacfwd(unclipped, 1)),
        unravel=unravel,
    )


def _solve(
    module: _Solvable, variables: Arrays, sent: Mapping[str, np.ndarray], begin: np.ndarray, rounding: float
) -> dict[str, tuple[np.ndarray, float]]:
    """The sums of one module, by name, and the relative rounding of each, where its buffers determine them; nothing
    where they do not."""

    def left(t: np.ndarray) -> np.ndarray:
        return np.asarray(module.unclipped(variables, t, sent))

    def step_from(t: np.ndarray) -> np.ndarray | None:
        """Newton's step; None where the sums are not determined there."""
        scale = np.maximum(np.abs(t), typical)
        jacobian = np.asarray(module.jacobian(variables, t, sent)) * scale
        step, _, rank, _ = np.linalg.lstsq(jacobian, -left(t), rcond=None)
        return scale * step if rank == len(t) else None

    typical = np.maximum(np.abs(begin), _SMALL * np.max(np.abs(begin), initial=np.finfo(begin.dtype).tiny))
    target = np.concatenate([sent[path].ravel() for path in sorted(sent)])
    t, size = begin, np.maximum(np.abs(target) + np.abs(target + left(begin)), np.finfo(begin.dtype).tiny)
    if step_from(t) is None:  # a momentum of 1: any sums leave the buffers as they are
        return {}
    for _ in range(_STEPS):
        if np.all(np.abs(left(t)) <= 4 * np.finfo(t.dtype).eps * size):
            break
        step = step_from(t)
        if step is None:
            return {}
        t = t + step
    off = np.abs(np.asarray(module.left(variables, t, sent))) > _RESIDUE * rounding * size
    if np.any(off):
        ends = dict(zip(np.cumsum([sent[p].size for p in sorted(sent)]), sorted(sent), strict=True))
        path = next(p for end, p in ends.items() if int(np.argmax(off)) < end)
        raise InputError(
            f"buffers: no step of the model leaves {path!r} as it was sent: give the model with the buffers that it "
            "had before the step, or leave the new ones out (buffers=False)"
        )
    each = np.linalg.pinv(np.asarray(module.jacobian(variables, t, sent)) / size[:, None])  # d t / d (buffer / size)
    off = module.unravel(to_device(rounding * np.linalg.norm(each, axis=1)))
    values = {name: np.asarray(value) for name, value in module.unravel(to_device(t)).items()}
    tiny = np.finfo(t.dtype).tiny
    return {n: (v, float(np.linalg.norm(off[n]) / max(np.linalg.norm(v), tiny))) for n, v in values.items()}
