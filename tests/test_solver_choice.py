"""Which solver closes a deficient layer can be chosen, and any Optax transformation serves."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_match import batch
from test_pull_back import network, psnr

from leakjax import InputError, invert, observe
from leakjax.attacks.layerwise import layer_step
from leakjax.runtime.programs import quickly


@pytest.fixture(scope="module")
def observation():
    return observe(network(jnp.tanh, filters=6), (batch(1), np.array([2])))


@pytest.mark.parametrize(
    "options",
    [
        {"pull_back": "levenberg_marquardt"},
        {"pull_back": "optax"},
        {"pull_back": "optax", "optimizer": optax.lbfgs(memory_size=30)},
    ],
)
def test_every_solver_closes_the_layer(observation, options):
    answer = invert(observation, **options)
    assert psnr(answer.images, batch(1)) > 150
    assert answer.certificates[0].status == "exact"
    assert answer.layers[0][1].status == "pulled_back"


@pytest.mark.parametrize("optimizer", ["adam", optax.sgd(1e3)], ids=["adam", "diverging"])
def test_a_descent_that_does_not_arrive_is_failed_and_finite(observation, optimizer):
    answer = invert(observation, pull_back="optax", optimizer=optimizer)
    assert answer.certificates[0].status == "failed"
    assert np.all(np.isfinite(answer.images))


def test_unknown_solvers_are_refused(observation):
    with pytest.raises(InputError, match="pull_back"):
        invert(observation, pull_back="newton")
    with pytest.raises(InputError, match="optimizer"):
        invert(observation, optimizer="sgdd")
    with pytest.raises(InputError, match="Optax transformation"):
        invert(observation, optimizer=3)


def test_programs_are_compiled_quickly_until_some_clients_have_come():
    """What is only planned is not counted, nor are clients of another precision; elsewhere than on CPUs nothing is."""
    problem = SimpleNamespace(segments=(object(),), dtype=np.dtype(np.float64), victims=40, devices=())
    single = SimpleNamespace(**{**vars(problem), "dtype": np.dtype(np.float32)})
    assert layer_step._options(problem, planned=True) == layer_step._options(problem, planned=True) is not None
    assert layer_step._options(problem, planned=False) is not None
    assert layer_step._options(problem, planned=True) is None
    assert layer_step._options(problem, planned=False) is None
    assert layer_step._options(single, planned=False) is not None
    assert quickly([SimpleNamespace(platform="gpu")]) is None
