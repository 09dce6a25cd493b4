"""What DP-SGD leaves of a gradient: the Jacobian of the clipped gradient, and the privacy that its noise buys."""

import importlib
import math
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Float

from leakjax.errors import InputError


def clipped(
    gram: Float[np.ndarray, "n n"], slope: Float[np.ndarray, " n"], norm: float, clip: float
) -> Float[np.ndarray, "n n"]:
    """J_c^T J_c of the clipped gradient g_c = g min(1, C / ||g||), from J^T J, J^T g and ||g||.

    Where ||g|| <= C it is J^T J. Elsewhere g_c = C g / ||g|| keeps the direction alone, and with h = g / ||g||

        J_c = (C / ||g||) (I - h h^T) J,
        J_c^T J_c = (C / ||g||)^2 (J^T J - (J^T h) (J^T h)^T):

    one direction of the images at most is hidden, the rest is scaled.

    Arguments: `gram` J^T J, `slope` J^T g, `norm` ||g|| and `clip` C, the latter two in the gradient's unit. The rows
    of J are not weighted. For a batch, g is the gradient that is clipped: clipping each example's own is another map.

    Raises `InputError` for a clip that is not positive or a norm that is negative.

    Reference: clipping, Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
    """
    if not clip > 0:
        raise InputError(f"clip must be positive, got {clip}")
    if not 0 <= norm < math.inf:
        raise InputError(f"norm must be finite and not negative, got {norm}")
    if norm <= clip:
        return np.asarray(gram)
    direction = np.asarray(slope) / norm
    return (clip / norm) ** 2 * (np.asarray(gram) - np.outer(direction, direction))


def epsilon(noise_multiplier: float, *, sampling_rate: float, steps: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after `steps` steps of DP-SGD.

    Each step takes every example with probability `sampling_rate`, clips its gradient at C and adds Gaussian noise of
    standard deviation `noise_multiplier` * C to the sum; neighbors differ by one example more or less. Infinite without
    noise. One step on all examples is the Gaussian mechanism, of which epsilon is known exactly; all else is by privacy
    loss distributions, an upper bound and tight to about a percent.

    Raises `InputError` for a negative multiplier, a rate outside (0, 1], a delta outside (0, 1), steps that are not a
    whole number of at least 1, and where dp-accounting is not installed.

    Reference: Balle & Wang, "Improving the Gaussian mechanism", ICML 2018, theorem 8 (all examples; s steps are one
    with the multiplier over sqrt(s)); Koskela, Jalko & Honkela, "Computing tight differential privacy guarantees using
    FFT", AISTATS 2020, and Google's dp-accounting (subsampled).
    """
    if not 0 <= noise_multiplier < math.inf:
        raise InputError(f"noise_multiplier must be finite and not negative, got {noise_multiplier}")
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate must be in (0, 1], got {sampling_rate}")
    if not 0 < delta < 1:
        raise InputError(f"delta must be in (0, 1), got {delta}")
    if not isinstance(steps, Integral) or steps < 1:
        raise InputError(f"steps must be a whole number, at least 1, got {steps}")
    accounting = _accounting()
    if noise_multiplier == 0:
        return math.inf
    if sampling_rate == 1:
        return float(accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(steps), delta))
    step = accounting.PoissonSampledDpEvent(sampling_rate, accounting.GaussianDpEvent(noise_multiplier))
    grid = 1e-4 * max(1.0, noise_multiplier**-2)  # a loss of one example is about multiplier^-2
    accountant = accounting.pld.PLDAccountant(value_discretization_interval=grid)
    return float(accountant.compose(step, int(steps)).get_epsilon(delta))


def _accounting() -> Any:
    try:
        importlib.import_module("dp_accounting.pld")
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise InputError('epsilon needs dp-accounting: pip install "leakjax[dp]"') from error
