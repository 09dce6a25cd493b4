"""What kind of map an equation is: affine in its live operands, entry by entry, floating, a choice.

Whether it is affine is decided by its derivative (`is_linear`), whether it acts entry by entry by the primitive's name
(`is_elementwise`).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.segments.tracing.evaluation import bind
from leakjax.segments.tracing.jaxprs import Constant, Equation, Graph, all_equations, body_of, depends, opened
from leakjax.segments.tracing.primitives import CALLS, CHOICES, CUSTOM_DERIVATIVES, ELEMENTWISE


def is_linear(equation: Equation, structs: Mapping[int, jax.ShapeDtypeStruct], live: set[int]) -> bool:
    """Whether one equation is affine in its operands in `live`, jointly.

    Decided by its derivative: the primitive's tangent is traced, and the equation is affine exactly where the tangent
    does not depend on the point of linearization. A vanishing tangent (`floor`, comparisons) does not count, and
    custom derivatives are never trusted.
    """
    if equation.name in CUSTOM_DERIVATIVES or not is_floating(equation, structs, live):
        return False
    by_point, by_direction = tangent_depends(equation, structs, live)
    return not any(by_point) and all(by_direction)


def is_elementwise(equation: Equation, structs: Mapping[int, jax.ShapeDtypeStruct], live: set[int]) -> bool:
    """Whether one equation maps its live operands, all of one shape, entry by entry to outputs of that shape."""
    shapes = {structs[v].shape for v in equation.inputs if isinstance(v, int) and v in live}
    shapes |= {structs[o].shape for o in equation.outputs}
    if len(shapes) != 1:
        return False
    if equation.name in ELEMENTWISE:
        return True
    if equation.name not in CUSTOM_DERIVATIVES:
        return False
    body, consts = opened(equation.params["call_jaxpr"])
    (shape,) = shapes
    return not consts and _jaxpr_is_elementwise(body, shape)


def work(equation: Equation, structs: Mapping[int, jax.ShapeDtypeStruct]) -> int:
    """How many numbers an equation's outputs hold, a convolution's patches included."""
    size = max(math.prod(structs[o].shape) for o in equation.outputs)
    if equation.name != "conv_general_dilated":
        return size
    right = equation.inputs[1]
    shape = structs[right].shape if isinstance(right, int) else np.shape(right.value)
    features = structs[equation.outputs[0]].shape[equation.params["dimension_numbers"][2][1]]
    window = math.prod(shape) // features  # (kernel window) x (input channels of a group)
    return max(size, size // features * window * equation.params["feature_group_count"])


def has_choices(graph: Graph) -> bool:
    """Whether any value that depends on the input is chosen between others: where kinks come from."""
    live = graph.dependents([graph.input])

    def names(equation: Equation) -> set[str]:
        body = body_of(equation.params)
        return {equation.name} | (set() if body is None else {e.primitive.name for e in all_equations(body)})

    return any(names(e) & CHOICES for e in graph.equations if any(o in live for o in e.outputs))


def dtype_of_least_precision(graph: Graph) -> Any:
    """The least precise floating dtype among all values of a graph."""
    floating = [s.dtype for s in graph.structs.values() if jnp.issubdtype(s.dtype, jnp.floating)]
    return max(floating, key=lambda d: float(jnp.finfo(d).eps))


def is_floating(equation: Equation, structs: Mapping[int, jax.ShapeDtypeStruct], live: set[int]) -> bool:
    """Whether all operands in `live` and all outputs of one equation are floating point."""
    ids = [v for v in equation.inputs if isinstance(v, int) and v in live]
    return all(jnp.issubdtype(structs[v].dtype, jnp.floating) for v in (*ids, *equation.outputs))


def tangent_depends(
    equation: Equation, structs: Mapping[int, jax.ShapeDtypeStruct], live: set[int]
) -> tuple[list[bool], list[bool]]:
    """Whether each output's tangent depends on the point, and on the direction, of the live operands.

    Without a derivative rule: on the point, as far as we can tell, and on no direction.
    """
    where = [k for k, v in enumerate(equation.inputs) if isinstance(v, int) and v in live]
    operands = [v.value if isinstance(v, Constant) else structs[v] for v in equation.inputs]
    points = [operands[k] for k in where]
    fixed = [v for k, v in enumerate(operands) if k not in where]

    def tangent(points: Any, directions: Any, fixed: Any) -> Any:
        def apply(*points: Any) -> Any:
            moving, rest = dict(zip(where, points, strict=True)), iter(fixed)
            return bind(equation, [moving[k] if k in moving else next(rest) for k in range(len(operands))])

        return jax.jvp(apply, points, directions)[1]

    try:
        jaxpr = jax.make_jaxpr(tangent)(points, points, fixed).jaxpr
    except NotImplementedError:
        return [True], [False]
    n = len(points)
    return depends(jaxpr, jaxpr.invars[:n]), depends(jaxpr, jaxpr.invars[n : 2 * n])


def _jaxpr_is_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    for eqn in jaxpr.eqns:
        inner = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params), None)
        if inner is not None:
            if eqn.primitive.name not in CALLS | CUSTOM_DERIVATIVES:
                return False
            if not _jaxpr_is_elementwise(opened(inner)[0], shape):
                return False
        elif eqn.primitive.name not in ELEMENTWISE | {"broadcast_in_dim"}:
            return False
        if any(v.aval.shape not in ((), shape) for v in (*eqn.invars, *eqn.outvars)):
            return False
    return True
