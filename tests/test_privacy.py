"""Clipping by its Jacobian, and epsilon by closed forms and published values."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from leakjax.errors import InputError
from leakjax.leakage import privacy
from leakjax.leakage.privacy import clipped, epsilon


def gaussian_delta(multiplier, loss):
    """Balle & Wang (2018), theorem 8."""
    a, b = 1 / (2 * multiplier), loss * multiplier
    return norm.cdf(a - b) - math.exp(loss) * norm.cdf(-a - b)


@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_clipped_is_the_jacobian_of_the_clipped_gradient(clip):
    generator = np.random.default_rng(0)
    a, b = jnp.asarray(generator.normal(size=(9, 4))), jnp.asarray(generator.normal(size=9))
    x = jnp.asarray(generator.normal(size=4))

    def gradient(x):
        return jnp.tanh(a @ x) + b

    def limited(x):
        g = gradient(x)
        return g * jnp.minimum(1.0, clip / jnp.linalg.norm(g))

    g, j, expected = gradient(x), jax.jacobian(gradient)(x), jax.jacobian(limited)(x)
    found = clipped(np.asarray(j.T @ j), np.asarray(j.T @ g), float(jnp.linalg.norm(g)), clip)
    np.testing.assert_allclose(found, expected.T @ expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("clip", "size", "named"), [(0.0, 1.0, "clip"), (-1.0, 1.0, "clip"), (1.0, math.nan, "norm")])
def test_clipped_names_bad_input(clip, size, named):
    with pytest.raises(InputError, match=named):
        clipped(np.eye(2), np.ones(2), size, clip)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 5.0])
def test_one_step_on_all_examples_is_the_gaussian_mechanism(multiplier):
    found = epsilon(multiplier, sampling_rate=1.0, steps=1, delta=1e-5)
    assert gaussian_delta(multiplier, found) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_one_step_on_a_sample_has_a_closed_form(rate):
    """delta(e) = q delta_Gauss(log(1 + (exp(e) - 1) / q)): Li, Qardaji & Su (2012), Balle, Barthe & Gaboardi (2018)."""
    found = epsilon(0.8, sampling_rate=rate, steps=1, delta=1e-5)
    assert rate * gaussian_delta(0.8, math.log1p(math.expm1(found) / rate)) == pytest.approx(1e-5, rel=1e-2)


def test_steps_on_almost_all_examples_compose_as_gaussians_do():
    exact = epsilon(8.0, sampling_rate=1.0, steps=64, delta=1e-5)
    assert exact == pytest.approx(epsilon(1.0, sampling_rate=1.0, steps=1, delta=1e-5), rel=1e-9)
    assert epsilon(8.0, sampling_rate=1 - 1e-9, steps=64, delta=1e-5) == pytest.approx(exact, rel=1e-3)


def test_published_values_are_met_from_below():
    """(1.26, 1e-5): Abadi et al. (2016), section 3, moments accountant; later bounds are tighter, not by much."""
    assert 0.9 < epsilon(4.0, sampling_rate=0.01, steps=10_000, delta=1e-5) < 1.26


def test_renyi_accounting_is_an_upper_bound():
    import dp_accounting
    from dp_accounting import rdp

    step = dp_accounting.PoissonSampledDpEvent(256 / 60_000, dp_accounting.GaussianDpEvent(1.1))
    bound = rdp.RdpAccountant().compose(step, 14_040).get_epsilon(1e-5)
    assert 0.85 * bound < epsilon(1.1, sampling_rate=256 / 60_000, steps=14_040, delta=1e-5) < bound


def test_epsilon_without_noise_is_infinite_and_with_little_is_finite():
    assert epsilon(0.0, sampling_rate=0.1, steps=3, delta=1e-5) == math.inf
    little = epsilon(0.05, sampling_rate=0.01, steps=100, delta=1e-5)
    assert 100 < little < epsilon(0.05, sampling_rate=1.0, steps=100, delta=1e-5)


@pytest.mark.parametrize(
    ("named", "value"),
    [
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.nan),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.1),
        ("delta", 0.0),
        ("delta", 1.0),
        ("steps", 0),
        ("steps", 1.5),
    ],
)
def test_bad_input_is_named_in_one_line(named, value):
    good = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(InputError, match=named) as caught:
        epsilon(**{**good, named: value})
    assert "\n" not in str(caught.value)


def test_a_missing_accountant_names_the_remedy(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "dp_accounting"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match=r'pip install "leakjax\[dp\]"'):
        privacy.epsilon(1.0, sampling_rate=0.1, steps=1, delta=1e-5)
