"""Levenberg-Marquardt with dense factors and geodesic acceleration: few, costly steps where conditioning is bad.

Every step factorizes J^T J + lambda I and moves by d, or by d + a / 2 where that is better,

    (J^T J + lambda I) d = -J^T r,    (J^T J + lambda I) a = -J^T r''(d, d)

(Transtrum & Sethna, "Improvements to the Levenberg-Marquardt algorithm", arXiv 1201.5885): the second follows the
curved valleys of ill-conditioned residuals, in which plain steps have to be short.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

_FACTORS = (100.0, 10.0, 1.0, 0.1, 0.01)
_STALLED = 3


class Rows(NamedTuple):
    """A residual r(x) (m,) of x (n,), compiled: r, (r, J^T (n, m)), and r''(d, d) of (x, d)."""

    value: Callable[[Float[np.ndarray, " n"]], Float[Array, " m"]]
    jacobian: Callable[[Float[np.ndarray, " n"]], tuple[Float[Array, " m"], Float[Array, "n m"]]]
    curvature: Callable[[Float[np.ndarray, " n"], Float[np.ndarray, " n"]], Float[Array, " m"]]


class DenseNewtonSolution(NamedTuple):
    """x, ||r(x)|| / size, and steps."""

    x: Float[np.ndarray, " n"]
    residual: float
    steps: int


def dense_levenberg_marquardt(
    rows: Rows,
    x: Float[np.ndarray, " n"],
    *,
    size: float,
    tolerance: float,
    max_steps: int,
    tell: Callable[[str], None],
) -> DenseNewtonSolution:
    """min ||r(x)||^2 from x (n,).

    Stops when ||r|| <= tolerance * size, after `max_steps`, or where it no longer falls. `tell` hears of every step.
    Memory: J and J^T J.
    """
    least, damping, stalled, steps = float(np.linalg.norm(rows.value(x))), 1e-2, 0, 0
    while least > tolerance * size and stalled < _STALLED and steps < max_steps:
        steps += 1
        r, transposed = rows.jacobian(x)
        if jax.default_backend() == "cpu":
            r, transposed = np.asarray(r), np.asarray(transposed)  # NumPy multiplies A A^T in half the time
        gram, slope = np.array(transposed @ transposed.T), np.asarray(transposed @ r)
        level, found = float(np.trace(gram)) / len(x), []
        for shift in (factor * damping for factor in _FACTORS):
            try:
                factor = scipy.linalg.cho_factor(gram + max(shift, 1e-16) * level * np.eye(len(x)), check_finite=False)
            except scipy.linalg.LinAlgError:
                continue
            move = -scipy.linalg.cho_solve(factor, slope)
            bend = -scipy.linalg.cho_solve(factor, np.asarray(transposed @ rows.curvature(x, move)))
            found += [(float(np.linalg.norm(rows.value(y))), shift, y) for y in (x + move, x + move + 0.5 * bend)]
        new, shift, y = min(found, key=lambda trial: np.nan_to_num(trial[0], nan=np.inf), default=(np.inf, damping, x))
        stalled = 0 if new < 0.98 * least else stalled + 1
        least, damping, x = (new, shift, y) if new < least else (least, 1e3 * damping, x)
        tell(f"dense step {steps}: relative residual {least / size:.1e}")
    return DenseNewtonSolution(x, least / size, steps)
