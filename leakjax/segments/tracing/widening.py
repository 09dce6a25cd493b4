"""A model with its own roundings taken out: half-precision layers, softmax in float32, computed in one wide dtype."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from leakjax.errors import InputError
from leakjax.models.reader import Arrays, Model, run_model
from leakjax.runtime.programs import keep
from leakjax.segments.tracing import jaxprs
from leakjax.segments.tracing.network import read_network
from leakjax.segments.tracing.primitives import CALLS, CUSTOM_DERIVATIVES


class Wide(NamedTuple):
    """A `model` in one dtype, the least dtype that its `own` code computes in, and why its roundings could not be taken
    out (None where they could, or where there are none)."""

    model: Model
    own: Any
    reason: str | None = None

    @property
    def rounds(self) -> bool:
        """Whether the model's own code is less precise than the dtype asked for."""
        asked = jnp.result_type(*(a.dtype for a in self.model.params.values()))
        return bool(jnp.finfo(self.own).eps > jnp.finfo(asked).eps)


def in_one_precision(model: Model, input_shape: Sequence[int], dtype: Any) -> Wide:
    """The model in `dtype`, its own roundings (half precision, a softmax in float32) taken out where that can be."""
    cast, own = model.astype(dtype), jnp.result_type(*(a.dtype for a in model.params.values()))
    try:
        found = Wide(cast, jnp.dtype(read_network(cast, input_shape, 1, dtype).precision))
    except InputError:  # a recurrent net whose state begins in a dtype of its own
        if own == jnp.dtype(dtype):
            raise
        exact = widened(model, dtype, own)
        run_model(exact, jax.ShapeDtypeStruct((1, *input_shape), dtype))
        return Wide(exact, own)
    if not found.rounds:
        return found
    exact = widened(model, dtype)
    try:
        run_model(exact, jax.ShapeDtypeStruct((1, *input_shape), dtype))
    except InputError as error:
        return found._replace(reason=str(error))
    return found._replace(model=exact)


def widened(model: Model, dtype: Any, traced: Any = None) -> Model:
    """The model of which every floating number is computed in `dtype`, also where its code asks for another.

    `traced`: the dtype in which its code is traced, where it does not run in the wide one. Running it raises
    `ValueError` where it has branches, or loops too long to be unrolled.
    """
    return dataclasses.replace(model.astype(dtype), apply=_apply(model.apply, str(jnp.dtype(dtype)), traced))


@keep(16)
def _apply(apply: Any, dtype: str, traced: Any) -> Any:
    def run(variables: Arrays, x: Any) -> Any:
        paths = list(variables)
        arrays = {path: _struct(a, traced) for path, a in variables.items()}
        graph = jaxprs.trace_by_path(apply, arrays, _struct(x, traced), CALLS | CUSTOM_DERIVATIVES)
        env = {**{i: variables[p] for i, p in zip(graph.variables, paths, strict=True)}, graph.input: x}
        return jaxprs.evaluate_in(jnp.dtype(dtype), graph.needed(graph.output, list(env)), env, graph.output)

    return run


def _struct(a: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    floating = dtype is not None and jnp.issubdtype(a.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(a.shape, dtype if floating else a.dtype)
