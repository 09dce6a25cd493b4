"""A model with its own roundings taken out: half-precision layers, softmax in float32, computed in one wide dtype."""

import functools
from typing import Any

import jax

from leakjax import _jaxpr
from leakjax._primitives import CALLS, CUSTOM_DERIVATIVES
from leakjax.model import Arrays, Model


def widened(model: Model, dtype: Any) -> Model:
    """The model of which every floating number is computed in `dtype`, also where its code asks for another.

    Running it raises `ValueError` where it has loops or branches.
    """
    wide = model.astype(dtype)
    return Model(_apply(model.apply, str(jax.numpy.dtype(dtype))), wide.params, wide.buffers)


@functools.lru_cache(maxsize=16)
def _apply(apply: Any, dtype: str) -> Any:
    def run(variables: Arrays, x: Any) -> Any:
        paths = list(variables)
        arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in variables.values()]

        def function(leaves: Any, x: Any) -> Any:
            return apply(dict(zip(paths, leaves, strict=True)), x)

        graph = _jaxpr.trace(function, arrays, jax.ShapeDtypeStruct(x.shape, x.dtype), CALLS | CUSTOM_DERIVATIVES)
        env = {**{i: variables[p] for i, p in zip(graph.variables, paths, strict=True)}, graph.input: x}
        return _jaxpr.evaluate_in(jax.numpy.dtype(dtype), graph.needed(graph.output, list(env)), env, graph.output)

    return run
