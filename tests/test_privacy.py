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
from leakjax.leakage.privacy import DPSGD, clipped_gradient, epsilon


def gaussian_delta(multiplier, loss):
    """Balle & Wang (2018), theorem 8."""
    a, b = 1 / (2 * multiplier), loss * multiplier
    return norm.cdf(a - b) - math.exp(loss) * norm.cdf(-a - b)


@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_clipping_takes_one_direction_at_most(clip):
    """J_c = (C / ||g||) (I - h h^T) J, h = g / ||g||, where the norm of g is above C; else J."""
    generator = np.random.default_rng(0)
    a, b = jnp.asarray(generator.normal(size=(9, 4))), jnp.asarray(generator.normal(size=9))
    x, labels = jnp.asarray(generator.normal(size=(1, 4))), jnp.zeros(1, int)

    def gradient(variables, x, labels):
        del variables, labels
        return {"w": jnp.tanh(a @ x[0]) + b}

    g, j = gradient(None, x, labels)["w"], jax.jacobian(lambda x: gradient(None, x, labels)["w"])(x)[:, 0]
    found = jax.jacobian(lambda x: clipped_gradient(gradient, clip)(None, x, labels)["w"])(x)[:, 0]
    h = g / jnp.linalg.norm(g)
    expected = clip / jnp.linalg.norm(g) * (j - jnp.outer(h, h @ j)) if clip < jnp.linalg.norm(g) else j
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_every_example_is_clipped_by_itself():
    def gradient(variables, x, labels):
        del variables, labels
        return {"w": x[0]}

    x = jnp.asarray([[3.0, 4.0], [0.3, 0.4]])
    found = clipped_gradient(gradient, 1.0)(None, x, jnp.zeros(2, int))["w"]
    np.testing.assert_allclose(found, [(0.6 + 0.3) / 2, (0.8 + 0.4) / 2], rtol=1e-12)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"noise_multipliers": (-1.0,)}, "noise_multipliers"),
        ({"sampling_rate": 2.0}, "sampling_rate"),
        ({"steps": 0}, "steps"),
        ({"delta": 1.0}, "delta"),
    ],
)
def test_a_dp_sgd_names_bad_input(changed, named):
    with pytest.raises(InputError, match=named):
        DPSGD(**{"clip": 1.0, "noise_multipliers": (1.0,), **changed}).epsilons()


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
