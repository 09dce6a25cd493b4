"""Whether a nonlinear map's derivatives say what the map does: Gauss-Newton steps are made of nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.segments.tracing.jaxprs import Equation, all_equations, body_of
from leakjax.segments.tracing.kinds import is_floating, tangent_depends
from leakjax.segments.tracing.primitives import CUSTOM_DERIVATIVES, RANDOM


def equation_flaw(equation: Equation, structs: Mapping[int, jax.ShapeDtypeStruct], live: set[int]) -> str | None:
    """Why one nonlinear equation cannot be followed by its derivative; None where nothing is wrong with it alone.

    From floating point to floating point a derivative of 0 everywhere says nothing of the function (`floor`). Of
    `stop_gradient` and of custom derivatives only `map_flaw` can tell.
    """
    body = body_of(equation.params)
    if equation.name in CUSTOM_DERIVATIVES:
        draws = any(e.primitive.name.startswith(RANDOM) for e in all_equations(body))
        return "it draws random numbers" if draws else None
    if body is not None:
        return "loops, branches and reductions by a function are not looked into"
    if equation.name == "stop_gradient" or not is_floating(equation, structs, live):
        return None  # comparisons and indices are piecewise constant: what they choose from has the derivative
    _, by_direction = tangent_depends(equation, structs, live)
    return None if all(by_direction) else "its derivative is 0 everywhere, or has no rule"


def map_flaw(
    function: Callable[[Any, Any], Any], weights: Any, x: jax.ShapeDtypeStruct, z: jax.ShapeDtypeStruct
) -> str | None:
    """Why z = function(weights, x) cannot be inverted by its derivatives; None where it can.

    Asked for are (z, d<dz, z>/dweights, d<dz, z>/dx), their tangent and its transpose; and at a random point the
    tangent of z must agree with central differences.
    """
    if not (jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(z.dtype, jnp.floating)):
        return "its values are not floating point"

    def tangents(weights: Any, x: Any, dz: Any) -> Any:
        def rows(x: Any) -> Any:
            value, pull = jax.vjp(function, weights, x)
            return value, pull(dz)

        value, tangent = jax.linearize(rows, x)
        return jax.linear_transpose(tangent, x)(value)

    try:
        jax.eval_shape(tangents, weights, x, z)
    except (NotImplementedError, TypeError, ValueError) as error:
        return f"JAX cannot differentiate it twice: {str(error).splitlines()[0]}"
    rng = np.random.default_rng(0)
    point, direction = (jnp.asarray(rng.normal(size=x.shape), x.dtype) for _ in range(2))
    tangent = jax.jvp(lambda x: function(weights, x), (point,), (direction,))[1]
    h = float(jnp.finfo(x.dtype).eps) ** 0.4
    ahead, behind = (function(weights, point + s * direction) for s in (h, -h))
    difference = np.ravel(ahead - behind) / (2 * h)
    agree = np.linalg.norm(np.ravel(tangent) - difference) <= 0.1 * np.linalg.norm(difference)
    return None if agree else "its derivative is not its function's"
