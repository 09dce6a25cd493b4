"""Layers whose weights are stacked in one array, as `flax.linen.scan` makes them: a parameter for each layer again."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from leakjax.errors import InputError
from leakjax.models.reader import Arrays, Model
from leakjax.runtime.programs import keep
from leakjax.segments.tracing import jaxprs


def unstacked(model: Model, input_shape: Sequence[int], dtype: Any) -> tuple[Model, Callable[[Arrays], dict[str, Any]]]:
    """(the model with a parameter "layers[i]/kernel" for every row of a "layers/kernel" of which it takes row by row,
    what makes gradients (V, *parameter) of its parameters those of the new ones)."""
    counts = _stacked(model.apply, model.structs, tuple(model.params), tuple(input_shape), str(jnp.dtype(dtype)))
    names = tuple((path, tuple(_row_name(path, i) for i in range(count))) for path, count in counts)
    taken = {name for _, rows in names for name in rows}
    if not names or taken & model.variables.keys():
        return model, dict
    return dataclasses.replace(model, apply=_apply(model.apply, names), params=_split(dict(names), model.params, 0)), (
        lambda gradients: _split(dict(names), gradients, 1)
    )


def _row_name(path: str, i: int) -> str:
    owner, slash, leaf = path.rpartition("/")
    return f"{owner}[{i}]/{leaf}" if slash else f"{leaf}[{i}]"


def _split(names: Mapping[str, Sequence[str]], arrays: Arrays, axis: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, a in arrays.items():
        rows = names.get(path)
        found |= {path: a} if rows is None else {name: a[:, i] if axis else a[i] for i, name in enumerate(rows)}
    return found


@keep(64)
def _apply(apply: Callable[..., Any], names: tuple[tuple[str, tuple[str, ...]], ...]) -> Callable[[Arrays, Any], Any]:
    rows_of = dict(names)
    rows = {name for _, each in names for name in each}

    def run(variables: Arrays, x: Any) -> Any:
        whole = {path: jaxprs.as_rows(*(variables[name] for name in each)) for path, each in rows_of.items()}
        return apply({**{p: a for p, a in variables.items() if p not in rows}, **whole}, x)

    return run


@keep(64)
def _stacked(
    apply: Callable[..., Any], structs: Any, params: tuple[str, ...], input_shape: tuple[int, ...], dtype: str
) -> tuple[tuple[str, int], ...]:
    """(path, rows) of the parameters of which nothing but single rows is read, and more than one."""
    arrays = {path: jax.ShapeDtypeStruct(shape, kind) for path, shape, kind in structs}
    x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
    try:
        graph = jaxprs.trace_by_path(apply, arrays, x)
    except InputError:
        return ()
    ids = dict(zip(graph.variables, arrays, strict=True))
    rows: dict[str, list[int | None]] = {path: [] for path in params}
    for e in graph.needed(graph.output, [*graph.variables, graph.input]):
        for v in e.inputs:
            if isinstance(v, int) and ids.get(v) in rows:
                row = jaxprs.row_taken(e.params, graph.structs[v].shape) if e.name == "slice" else None
                rows[ids[v]].append(row)
    return tuple(
        (path, arrays[path].shape[0]) for path, taken in rows.items() if None not in taken and len(set(taken)) > 1
    )
