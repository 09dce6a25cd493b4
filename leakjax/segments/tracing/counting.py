"""What a traced program costs, counted from its shapes: floating-point operations, those of each step of its loops.

A product of matrices (m, k) (k, n) counts 2 m k n operations, a convolution two for each entry of its output and each
number of a filter that meets it (zeros that a dilation puts in between are none), a factorization its leading term or
somewhat more (Golub & Van Loan, Matrix Computations, 2013): Cholesky n^3 / 3, eigenvectors 9 n^3, a triangular solve
n^2 a column, QR 2 m n^2 and singular values 14 m n^2 of m >= n rows; anything else one for each entry of its output.
Loops whose length is known count as often as they run; what runs until it is done (`while_loop`) counts by the step,
without its condition.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from leakjax.segments.tracing.jaxprs import opened


class Count(NamedTuple):
    """Operations of a program without its open loops, and of one step of these (a sum, where there are several)."""

    fixed: float
    step: float

    def after(self, steps: float) -> float:
        """Operations where the open loops take so many steps in all."""
        return self.fixed + self.step * steps


def count_operations(function: Callable[..., Any], *arguments: Any) -> Count:
    """The count of `function` on arguments of these shapes; nothing is compiled or run."""
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments))


def _of_jaxpr(jaxpr: Any) -> Count:
    counts = [_of_equation(equation) for equation in opened(jaxpr)[0].eqns]
    return Count(sum(c.fixed for c in counts), sum(c.step for c in counts))


def _of_equation(equation: Any) -> Count:
    name, params = equation.primitive.name, equation.params
    if name == "while":
        body = _of_jaxpr(params["body_jaxpr"])
        return Count(0.0, body.fixed + body.step)
    inner = [_of_jaxpr(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        inner = [max(inner)]
    if inner:
        times = params["length"] if name == "scan" else 1
        # an open loop inside a closed one is counted by the step of it: all its runs together take the steps
        return Count(times * sum(c.fixed for c in inner), sum(c.step for c in inner))
    return Count(_RULES.get(name, _elementwise)(equation), 0.0)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [jaxpr for one in value for jaxpr in _jaxprs(one)]
    return [value] if hasattr(value, "eqns") or hasattr(value, "jaxpr") else []


def _elementwise(equation: Any) -> float:
    return float(sum(math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")))


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[k] for k in contracted)


def _convolution(equation: Any) -> float:
    filters, params = equation.invars[1].aval.shape, equation.params
    outputs = filters[params["dimension_numbers"].rhs_spec[0]]
    met = math.prod(filters) / outputs / math.prod(params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * met


def _square(factor: float) -> Callable[[Any], float]:
    """`factor` n^3, times the matrices of a batch."""

    def count(equation: Any) -> float:
        *batch, _, n = equation.invars[0].aval.shape
        return factor * math.prod(batch) * n**3

    return count


def _triangular(equation: Any) -> float:
    right, n = equation.invars[1].aval.shape, equation.invars[0].aval.shape[-1]
    return float(n * math.prod(right))


def _tall(factor: float) -> Callable[[Any], float]:
    """`factor` m n^2 (m >= n), times the matrices of a batch."""

    def count(equation: Any) -> float:
        *batch, m, n = equation.invars[0].aval.shape
        return factor * math.prod(batch) * max(m, n) * min(m, n) ** 2

    return count


_RULES: dict[str, Callable[[Any], float]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "cholesky": _square(1 / 3),
    "eigh": _square(9),
    "triangular_solve": _triangular,
    "geqrf": _tall(2),
    "qr": _tall(2),
    "svd": _tall(14),
}
