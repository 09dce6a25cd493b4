"""The numbers of a table: medians with their intervals, and exponents of cost."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000


class Spread(NamedTuple):
    """Median with the ends of its 95 % bootstrap interval, mean and least of some values."""

    median: float
    low: float
    high: float
    mean: float
    least: float


def spread_of(values: Sequence[float]) -> Spread:
    """The `Spread` of at least one value; the interval is that of `DRAWS` resamples, percentiles 2.5 and 97.5."""
    a = np.asarray(values, float)
    drawn = np.random.default_rng(0).choice(a, (DRAWS, len(a)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Spread(
        median=float(np.median(a)), low=float(low), high=float(high), mean=float(np.mean(a)), least=float(np.min(a))
    )


class Exponent(NamedTuple):
    """b of cost = a size^b, its standard error (infinite for two points), and the factor a."""

    exponent: float
    error: float
    factor: float


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Least squares of log(cost) on log(size), at least two different sizes.

    b = S_xy / S_xx; its standard error is sqrt(S_rr / (n - 2) / S_xx), S_rr the sum of squared residuals.
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
    means = x.mean(), y.mean()
    x, y = x - means[0], y - means[1]
    b = float(x @ y / (x @ x))
    free = len(x) - 2
    error = float(np.sqrt(np.sum((y - b * x) ** 2) / free / (x @ x))) if free > 0 else float("inf")
    return Exponent(b, error, float(np.exp(means[1] - b * means[0])))
