"""Kinks inside a nonlinear map, made smooth: a path from a blurred map to the map itself, along which Newton can walk.

An elementwise part y = g(z) becomes the mean of g(z + s n) over standard normal n; the greatest of a window becomes
its entries' mean with weights softmax(entries / s). Both tend to the map itself as s falls.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.segments.tracing import evaluation, jaxprs
from leakjax.segments.tracing.elementwise import Part, elementwise_parts
from leakjax.segments.tracing.rules import RULES
from leakjax.segments.tracing.windows import window_entries

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(12)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def rms(a: Float[Array, "..."]) -> Float[Array, ""]:
    """Root mean square; 1 for an array of zeros."""
    size = jnp.sqrt(jnp.mean(a**2))
    return jnp.where(size > 0, size, 1.0)


def gaussian_mean(
    function: Callable[[Array], Array], z: Float[Array, "..."], smoothing: Any
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The mean of an elementwise function(z + s n), s = smoothing * rms(z), and its slope.

    The slope of the mean is mean(n function(z + s n)) / s (Stein), so that its own derivative sees the kinks.
    """
    width = jax.lax.stop_gradient(smoothing * rms(z))
    nodes, weights = jnp.asarray(_NODES, z.dtype), jnp.asarray(_WEIGHTS, z.dtype)
    values = jax.vmap(lambda n: function(z + width * n))(nodes)
    return jnp.tensordot(weights, values, 1), jnp.tensordot(weights * nodes, values, 1) / width


def smoother(graph: jaxprs.Graph, start: int, end: int) -> Callable[[Mapping[int, Any], Any], Any]:
    """(values at hand, smoothing) -> the value `end`, computed from `start` with every kink smoothed."""
    equations = graph.needed(end, [start])
    parts = {part.exit: part for part in elementwise_parts(graph, equations, start, end)}

    def evaluate(env: Mapping[int, Any], smoothing: Any) -> Any:
        replaced: dict[int, Callable[[Mapping[int, Any]], Any]] = {
            exit: lambda values, part=part: _smooth(part, values, smoothing) for exit, part in parts.items()
        }
        for e in equations:
            if e.name == "reduce_window_max" and all(d == 1 for d in e.params["base_dilation"]):
                replaced[e.outputs[0]] = lambda values, e=e: _soft_window_max(e, values, smoothing)
        return evaluation.evaluate(equations, env, end, RULES, replaced)

    return evaluate


def _smooth(part: Part, values: Mapping[int, Any], smoothing: Any) -> Any:
    others = {v: values[v] for v in part.others}
    moving = {v: a for v, a in others.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    fixed = {v: a for v, a in others.items() if v not in moving}

    def mean(moving: Any, z: Array, smoothing: Any) -> tuple[Array, Array]:
        given = {**fixed, **moving}
        return gaussian_mean(
            lambda z: evaluation.evaluate(part.equations, {**given, part.entry: z}, part.exit, RULES), z, smoothing
        )

    @jax.custom_jvp
    def value(moving: Any, z: Array, smoothing: Any) -> Array:
        return mean(moving, z, smoothing)[0]

    @value.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (moving, z, smoothing), (d_moving, d_z, _) = primals, tangents
        (result, slope), (along, _) = jax.jvp(lambda m: mean(m, z, smoothing), (moving,), (d_moving,))
        return result, along + slope * d_z

    return value(moving, values[part.entry], jnp.asarray(smoothing, values[part.entry].dtype))


def _soft_window_max(equation: jaxprs.Equation, values: Mapping[int, Any], smoothing: Any) -> Any:
    (operand,) = equation.inputs
    assert isinstance(operand, int)
    x = values[operand]
    entries = window_entries(x, **equation.params)
    width = jax.lax.stop_gradient(smoothing * rms(x))
    return jnp.sum(entries * jax.nn.softmax(entries / width, axis=0), axis=0)
