"""A gradient in fewer numbers with the same J^T J: what a weight sums over few positions, by its factors.

A weight's gradient G = A^T B sums over T positions, the rows of A (T, D) and B (T, K): one for a dense layer and one
example, as many as a convolution has outputs. With thin factors Q_a R_a = A_0^T and Q_b R_b = B_0^T of what A and B are
at the images, P_a = I - Q_a Q_a^T and P_b = I - Q_b Q_b^T,

    S = (Q_a^T A^T B Q_b,   P_a A^T R_b^T,   R_a B P_b),   T^2 + T D + T K numbers in place of D K,

changes at the images as G does, up to a rotation: dG = dA^T B_0 + A_0^T dB has the parts Q_a Q_a^T dG Q_b Q_b^T,
P_a dA^T R_b^T Q_b^T and Q_a R_a dB P_b, which are orthogonal to each other, and no part P_a dG P_b. So both have one
J^T J there.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from leakjax.segments.tracing import evaluation, jaxprs
from leakjax.segments.tracing.network import Gradient
from leakjax.segments.tracing.rules import RULES

SMALLER = 2
"""Factors are taken where they hold so many times fewer numbers than the gradient."""

_ORDER = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p"})


class _Product(NamedTuple):
    """A product of two matrices by the ids of its operands and the axes of each that are summed over."""

    left: int
    right: int
    left_axes: tuple[int, ...]
    right_axes: tuple[int, ...]


def factored(gradient: Gradient, variables: Any, x: Float[Array, "B ..."], labels: Any) -> Any:
    """A function of images u (B, ...), a list of arrays, whose J^T J at u = `x` is that of `gradient` there.

    A parameter's gradient that is no product over few positions is in the list as it stands.
    """
    function = factored_by_parameter(gradient, variables, x, labels)
    return lambda u: jax.tree.leaves(function(u))


def factored_by_parameter(gradient: Gradient, variables: Any, x: Float[Array, "B ..."], labels: Any) -> Any:
    """The same, for each parameter a list of its own; it is empty where the gradient does not depend on the images."""
    arguments = (variables, x, labels)
    flat = jaxprs.flatten(lambda *given: gradient(*given), arguments)
    leaves, treedef = jax.tree.flatten(arguments)
    of_x = jax.tree.unflatten(treedef, range(len(leaves)))[1]
    known = dict(zip(flat.inputs, leaves, strict=True))
    equations = flat.needed()
    live = _live(equations, flat.inputs[of_x])
    makers = {o: equation for equation in equations for o in equation.outputs}
    outputs = [v if isinstance(v, int) and v in live else None for v in flat.outputs]
    products = {v: _product(v, makers, live, flat.structs) for v in outputs if v is not None}
    here = evaluation.evaluate_all(equations, known, RULES)
    frames = {v: _frames(p, here) for v, p in products.items() if p is not None}

    tree = jax.tree.structure(jax.eval_shape(gradient, *arguments))

    def function(u: Float[Array, "B ..."]) -> Any:
        values = evaluation.evaluate_all(equations, {**known, flat.inputs[of_x]: u}, RULES)

        def parts(v: int) -> list[Array]:
            product = products[v]
            return [values[v]] if product is None else _parts(product, frames[v], values)

        return jax.tree.unflatten(tree, [[] if v is None else parts(v) for v in outputs])

    return function


def _live(equations: Any, source: int) -> set[int]:
    found = {source}
    for equation in equations:
        if any(isinstance(v, int) and v in found for v in equation.inputs):
            found.update(equation.outputs)
    return found


def _product(
    output: int, makers: Mapping[int, jaxprs.Equation], live: set[int], structs: Mapping[int, Any]
) -> _Product | None:
    """The product that an output is but for the order of its entries; None where that is none, or saves too little."""
    equation = makers.get(output)
    while equation is not None and equation.name in _ORDER and isinstance(equation.inputs[0], int):
        equation = makers.get(equation.inputs[0])
    if equation is None or equation.name != "dot_general":
        return None
    (left_axes, right_axes), batched = equation.params["dimension_numbers"]
    left, right = equation.inputs
    if any(batched) or not (isinstance(left, int) and isinstance(right, int)) or not {left, right} <= live:
        return None
    summed = math.prod(structs[left].shape[a] for a in left_axes)
    rows, columns = (structs[v].size // max(summed, 1) for v in (left, right))
    if SMALLER * summed * (summed + rows + columns) > rows * columns:
        return None
    return _Product(left, right, tuple(left_axes), tuple(right_axes))


def _matrices(product: _Product, values: Mapping[int, Any]) -> tuple[Array, Array]:
    """(A^T (D, T), B^T (K, T)) of a product A^T B."""
    pairs = (product.left, product.left_axes), (product.right, product.right_axes)
    a, b = (jnp.moveaxis(values[v], axes, range(-len(axes), 0)) for v, axes in pairs)
    summed = math.prod(a.shape[a.ndim - len(product.left_axes) :])
    return a.reshape(-1, summed), b.reshape(-1, summed)


def _frames(product: _Product, here: Mapping[int, Any]) -> tuple[Array, ...]:
    """(Q_a, R_a, Q_b, R_b)."""
    a, b = _matrices(product, here)
    return (*jnp.linalg.qr(a), *jnp.linalg.qr(b))


def _parts(product: _Product, frames: tuple[Array, ...], values: Mapping[int, Any]) -> list[Array]:
    """S of the module's docstring."""
    of_a, a_here, of_b, b_here = frames
    a, b = _matrices(product, values)
    inside_a, inside_b = of_a.T @ a, of_b.T @ b
    return [inside_a @ inside_b.T, (a - of_a @ inside_a) @ b_here.T, a_here @ (b - of_b @ inside_b).T]
