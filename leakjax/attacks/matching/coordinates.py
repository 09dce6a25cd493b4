"""Coordinates in which a gradient sees every direction of its images about equally: x = x_0 + R^-1 y.

    R^T R = J^T J + delta I,    J = W dg/dx at x_0

Near x_0 the residual r(x_0 + R^-1 y) has a Jacobian of condition about 1 in y, and LSMR takes a few steps where it
takes thousands in x. R is dense: of as many unknowns as `MOST` and as memory holds. What R gets wrong far from x_0
costs steps, and no accuracy: y is solved for by the residual itself. Its condition is that of x_0.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from leakjax.attacks.adaptive import Sent
from leakjax.attacks.matching.residual import Compare, match_programs
from leakjax.attacks.problem import DeviceLabels, Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory

MOST = 8192
"""Unknowns: two images of 32x32x3 have 6,144, whose R takes 77 GFLOP; the products that it is made of take more."""

_STEPS = 12  # of power iterations: the extreme singular values to some per cent, which is what a condition is for


class Coordinates(NamedTuple):
    """x_0 (B, ...), R (n, n) upper triangular, the condition of J, and whether J determines x: where its least singular
    value is above what rounding and delta leave of one."""

    origin: Float[Array, "B *image"]
    factor: Float[Array, "n n"]
    condition: float
    whole: bool

    def images(self, y: Float[Array, " n"]) -> Float[Array, "B *image"]:
        """x_0 + R^-1 y."""
        return self.origin + self.moves(y)

    def moves(self, y: Float[Array, " n"]) -> Float[Array, "B *image"]:
        """R^-1 y."""
        return jax.scipy.linalg.solve_triangular(self.factor, y).reshape(self.origin.shape)


def coordinates_at(
    problem: Problem,
    form: Compare,
    x: Float[np.ndarray, "B *image"],
    variables: Arrays,
    sent: Sent,
    labels: DeviceLabels,
) -> Coordinates | None:
    """Those of x; None for more unknowns than a dense factor is for, in single precision, in which J^T J loses what is
    small, and behind a prior, whose rows see every direction as it is."""
    n = x.size
    single = np.dtype(problem.dtype) != np.float64
    if single or sent.prior is not None or form.free or n > MOST or not fits_in_memory(6 * 8 * n**2):
        return None
    products = match_programs(form, problem.tolerances.solve).products
    gram = np.array(products(variables, sent, labels, to_device(x), np.eye(n)))
    if not np.all(np.isfinite(gram)):
        return None
    delta = n * float(np.finfo(float).eps) * float(np.trace(gram))
    if not delta > 0:
        return None
    gram = 0.5 * (gram + gram.T)
    gram[np.diag_indices(n)] += delta
    try:
        factor = scipy.linalg.cholesky(gram, overwrite_a=False, check_finite=False)
    except scipy.linalg.LinAlgError:  # rounding of more than delta
        return None
    high = _power(lambda v: gram @ v, n)
    low = 1.0 / _power(lambda v: scipy.linalg.cho_solve((factor, False), v, check_finite=False), n) - delta
    whole = low > delta
    condition = float(np.sqrt(high / low)) if whole else float("inf")
    return Coordinates(to_device(x), to_device(factor), condition, whole)


def _power(product: Any, n: int) -> float:
    """The largest eigenvalue of a positive matrix, from below and to some per cent."""
    v, size = np.random.default_rng(0).normal(size=n), 1.0
    for _ in range(_STEPS):
        v = product(v / np.linalg.norm(v))
        size = float(np.linalg.norm(v))
    return size
