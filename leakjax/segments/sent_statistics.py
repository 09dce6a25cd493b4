"""The batch's own statistics, read off the running ones that a client sends after its step.

    new = m old + (1 - m) batch

or whatever else the model's code says: the traced map from the sums over the data (`tracing.statistics`) to the new
buffers is solved for the sums by Newton's method, module by module. Conventions of momentum, of biased and unbiased
variances and of how a variance is computed need no code of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from leakjax.errors import InputError
from leakjax.models.reader import Model
from leakjax.runtime.arrays import to_device
from leakjax.segments.tracing import jaxprs
from leakjax.segments.tracing.statistics import reductions

_STEPS = 50
"""Of Newton's method: a mean and a mean of squares take three."""

_RESIDUE = 1e3
"""Roundings of the client's, relative to a buffer's own size, that may remain."""


_RULES = {"stop_gradient": lambda a, **_: a}
"""Running statistics take no part in the client's gradient, and are differentiated here all the same."""


class _Module(NamedTuple):
    """Buffers that depend on the same sums: paths and values of the ones, names and values of the others."""

    buffers: dict[str, int]
    sums: dict[int, str]


def read_sent_statistics(
    model: Model,
    buffers: Mapping[str, np.ndarray],
    input_shape: Sequence[int],
    input_range: tuple[float, float],
    examples: int,
    dtype: Any,
    rounding: float,
) -> dict[str, np.ndarray]:
    """The sums over the data, by name, (V, ...) of each of V clients, as far as their new `buffers` (V, ...) say.

    Arguments: `model` with the weights and old buffers that the clients began with; `rounding`, relative, of what they
    computed.

    Raises `InputError` naming the buffer where the model cannot have left it there.
    """
    if model.step is None or not buffers:
        return {}
    x = jax.ShapeDtypeStruct((examples, *input_shape), dtype)
    paths, step = list(model.variables), model.step
    told = [path for path in buffers if jnp.issubdtype(model.buffers[path].dtype, jnp.floating)]

    def several(leaves: Sequence[Any], x: Any) -> list[Any]:
        logits, after = step(dict(zip(paths, leaves, strict=True)), x)
        return [logits, *(after[path] for path in told)]

    graph, after = jaxprs.trace_several(several, list(model.variables.values()), x)
    modules = _modules(graph, dict(zip(told, after, strict=True)))
    env = {v: to_device(model.variables[path]) for v, path in zip(graph.variables, paths, strict=True)}
    begin = _of_noise(graph, env, x, input_range)
    found: dict[str, list[np.ndarray]] = {}
    for module in modules:
        for victim in range(len(next(iter(buffers.values())))):
            sent = {path: np.asarray(buffers[path][victim], dtype) for path in module.buffers}
            for name, value in _solve(graph, env, module, sent, begin, rounding).items():
                found.setdefault(name, []).append(value)
    return {
        name: np.stack(values) for name, values in found.items() if len(values) == len(next(iter(buffers.values())))
    }


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


def _of_noise(
    graph: jaxprs.Graph, env: Mapping[int, Any], x: jax.ShapeDtypeStruct, between: tuple[float, float]
) -> dict[int, np.ndarray]:
    """What the sums are for noise in the input range: where Newton's method begins."""
    noise = np.random.default_rng(0).uniform(*between, size=x.shape).astype(x.dtype)
    values = jaxprs.evaluate_all(graph.needed(graph.output, []), {**env, graph.input: to_device(noise)}, {})
    return {v: np.asarray(values[v]) for v in reductions(graph)}


def _newton_step(jacobian: Any, residual: Any, t: np.ndarray) -> np.ndarray | None:
    """Newton's step from t; None where the sums are not determined there."""
    scale = np.maximum(np.abs(t), np.finfo(t.dtype).tiny)
    step, _, rank, _ = np.linalg.lstsq(np.asarray(jacobian(t)) * scale, -np.asarray(residual(t)), rcond=None)
    return scale * step if rank == len(t) else None


def _damped(
    jacobian: Any, residual: Any, t: np.ndarray, step: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """(t after as much of a `step` as brings it nearer and leaves the sums determined, the step from there): a whole
    step from a mean far away may end at a variance below 0, which models clip."""
    before = np.max(np.abs(residual(t)) / size)
    for halvings in range(_STEPS):
        there = t + 0.5**halvings * step
        after = _newton_step(jacobian, residual, there)
        if after is not None and np.max(np.abs(residual(there)) / size) < before:
            return there, after
    return t, step


def _solve(
    graph: jaxprs.Graph,
    env: Mapping[int, Any],
    module: _Module,
    sent: Mapping[str, np.ndarray],
    begin: Mapping[int, np.ndarray],
    rounding: float,
) -> dict[str, np.ndarray]:
    """The sums of one module, by name, where its buffers determine them; nothing where they do not."""
    start, unravel = ravel_pytree({v: to_device(begin[v]) for v in module.sums})
    parts = {p: graph.needed(v, module.sums) for p, v in module.buffers.items()}
    target, _ = ravel_pytree({p: to_device(sent[p]) for p in module.buffers})

    def left(t: Any) -> Any:
        given = {**env, **unravel(t)}
        made = {p: jaxprs.evaluate(parts[p], given, v, _RULES) for p, v in module.buffers.items()}
        return ravel_pytree(made)[0] - target

    jacobian, residual = jax.jit(jax.jacfwd(left)), jax.jit(left)
    t, size = np.asarray(start), np.abs(np.asarray(target)) + np.abs(np.asarray(target) + np.asarray(residual(start)))
    step = _newton_step(jacobian, residual, t)
    for _ in range(_STEPS):
        if step is None:
            return {}
        if np.all(np.abs(residual(t)) <= 4 * np.finfo(t.dtype).eps * size):
            break
        t, step = _damped(jacobian, residual, t, step, size)
    off = np.abs(np.asarray(residual(t))) > _RESIDUE * rounding * size
    if np.any(off):
        ends = dict(zip(np.cumsum([sent[p].size for p in sorted(sent)]), sorted(sent), strict=True))
        path = next(p for end, p in ends.items() if int(np.argmax(off)) < end)
        raise InputError(
            f"buffers: no step of the model leaves {path!r} as it was sent: give the model with the buffers that it "
            "had before the step, or leave the new ones out (buffers=False)"
        )
    return {module.sums[v]: np.asarray(value) for v, value in unravel(to_device(t)).items()}
