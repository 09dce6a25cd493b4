"""What DP-SGD sends: the mean of clipped gradients, and the privacy that its noise buys."""

import dataclasses
import importlib
import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from leakjax.errors import InputError
from leakjax.runtime.programs import keep


@dataclasses.dataclass(frozen=True)
class DPSGD:
    """Steps of DP-SGD: each example's gradient clipped to the norm `clip`, noise added to the sum of a batch.

        u = (1/B) (sum_b g_b min(1, clip / ||g_b||) + noise_multiplier clip N(0, 1))

    - `noise_multipliers`: those to look at; 0 is no noise, and has no epsilon;
    - `sampling_rate`, `steps`, `delta`: of the training that epsilon is asked for.

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
    """

    clip: float
    noise_multipliers: tuple[float, ...]
    sampling_rate: float = 1.0
    steps: int = 1
    delta: float = 1e-5

    def sigma(self, noise_multiplier: float, examples: int) -> float:
        """The noise's standard deviation in every entry of u, the mean over so many examples."""
        return noise_multiplier * self.clip / examples

    def epsilons(self) -> list[float]:
        """The epsilon of every multiplier; bad settings raise `InputError`, each by its name."""
        if not (isinstance(self.clip, Real) and 0 < self.clip < math.inf):
            raise InputError(f"clip must be positive and finite, got {self.clip!r}")
        for m in self.noise_multipliers:
            if not (isinstance(m, Real) and 0 < m < math.inf):
                raise InputError(f"noise_multipliers must be positive and finite, got {m!r}")
        spent = {"sampling_rate": self.sampling_rate, "steps": self.steps, "delta": self.delta}
        return [epsilon(m, **spent) for m in self.noise_multipliers]


@keep(16)
def clipped_gradient(gradient: Callable[..., Any], clip: float) -> Callable[..., Any]:
    """(variables, x (B, ...), labels (B,)) -> (1/B) sum_b g_b min(1, C / ||g_b||), g_b the gradient of one example.

    Arguments: `gradient` of a batch of one, a dict of arrays; C = `clip`, in the gradient's unit.

    Where ||g_b|| > C only the direction of g_b is left: of one example all of the Jacobian's row space but one
    direction at most, scaled by C / ||g_b||.
    """

    def mean(variables: Any, x: Float[Array, "B ..."], labels: Int[Array, " B"]) -> Any:
        def one(x: Array, label: Array) -> Any:
            g = gradient(variables, x[None], label[None])
            scale = jnp.minimum(1.0, clip / optax.tree.norm(g))
            return jax.tree.map(lambda a: scale * a, g)

        return jax.tree.map(lambda a: jnp.mean(a, axis=0), jax.vmap(one)(x, labels))

    return mean


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return _epsilon(accounting, noise_multiplier, sampling_rate, steps, delta)
    except (ArithmeticError, ValueError, MemoryError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"epsilon cannot be computed for noise_multiplier {noise_multiplier:g}, sampling_rate {sampling_rate:g}, "
            f"{steps if steps < 10**9 else 'over 1e9'} steps and delta {delta:g} ({reason}): out of any useful range"
        ) from error


def _epsilon(accounting: Any, noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
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
