"""Priors, the descent that drives them, and what they may and may not change of an image."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_pull_back import convolve, psnr
from typer.testing import CliRunner

from leakjax import invert, observe
from leakjax.constraints.priors import PRIORS, outside_box, total_variation
from leakjax.errors import InputError
from leakjax.solvers.descent import CONVERGED, DIVERGED, OUT_OF_STEPS, STATES, descend
from leakjax.solvers.null_projection import null_projection

SHAPE = (8, 8, 3)


def test_a_constant_has_no_variation_and_noise_more_than_a_ramp(rng):
    ramp = np.broadcast_to(np.linspace(0, 1, 8)[:, None, None], SHAPE)
    assert total_variation(jnp.full(SHAPE, 0.3)) == pytest.approx(0, abs=1e-12)
    assert 0 < total_variation(jnp.asarray(ramp)) < total_variation(jnp.asarray(rng.permutation(ramp)))


def test_color_edges_cost_more_than_equal_edges_of_lightness():
    edge = np.zeros(SHAPE)
    edge[4:] = 0.5
    color = edge * np.array([1.0, 0.0, -1.0]) / np.sqrt(2)
    light = edge / np.sqrt(3)
    assert np.linalg.norm(color) == pytest.approx(np.linalg.norm(light))
    assert total_variation(jnp.asarray(color)) > 3 * total_variation(jnp.asarray(light))


def test_the_box_counts_the_squared_excess():
    x = jnp.array([[-0.5, 0.0, 0.5], [1.0, 1.25, 0.25]])
    assert float(outside_box(x)) == pytest.approx(0.25 + 0.0625)
    assert float(outside_box(x, -1, 2)) == 0


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 3), (6, 5, 4, 2)])
def test_priors_take_any_number_of_axes_and_channels(shape, rng):
    prior = PRIORS["tv"]
    x = jnp.asarray(rng.uniform(size=shape))
    assert np.all(np.isfinite(jax.grad(prior)(x)))
    assert prior(jnp.full(shape, 0.5)) == pytest.approx(0, abs=1e-12)


def valley(x):
    return (1 - x[0]) ** 2 + (x[1] - x[0] ** 2) ** 2


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.adam(0.03)])
def test_descent_by_any_optimizer_jitted_and_vmapped(optimizer):
    starts = jnp.array([[-1.0, 1.0], [0.0, -0.5], [1.2, 0.3]])
    found = jax.jit(jax.vmap(lambda x: descend(valley, x, optimizer, steps=3000, tolerance=1e-9, patience=200)))(starts)
    np.testing.assert_allclose(found.x, 1, atol=1e-2)
    assert np.all(found.state == CONVERGED)
    assert np.all(found.value == jax.vmap(valley)(found.x))


def test_a_descent_that_runs_out_of_steps_says_so():
    found = descend(valley, jnp.array([-1.0, 1.0]), optax.adam(1e-3), steps=5)
    assert (int(found.state), int(found.steps)) == (OUT_OF_STEPS, 5)
    assert found.value < valley(jnp.array([-1.0, 1.0]))


@pytest.mark.parametrize("optimizer", [optax.sgd(1e3), optax.lbfgs(learning_rate=1e200, linesearch=None)])
def test_divergence_ends_with_the_best_finite_iterate(optimizer):
    start = jnp.array([1.0, 2.0])
    found = descend(lambda x: jnp.sum(x**4), start, optimizer, steps=100)
    assert STATES[int(found.state)].startswith("diverged")
    assert np.all(np.isfinite(found.x))
    assert float(found.value) <= 17


def test_a_start_without_a_value_is_returned_as_it_is():
    found = descend(lambda x: jnp.sum(jnp.log(x)), jnp.array([-1.0]), optax.sgd(1.0), steps=9)
    assert (float(found.x[0]), int(found.state), float(found.value)) == (-1.0, DIVERGED, np.inf)


@pytest.mark.parametrize(("rows", "rank"), [(20, 20), (25, 18), (60, 30)])
def test_null_projection_is_the_pseudoinverse_and_the_null_space(rows, rank, rng):
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, 40))
    matrix = np.insert(matrix, 3, 0.0, axis=0)
    found = null_projection(matrix, 40 - rank)
    answer = matrix @ rng.normal(size=40)
    np.testing.assert_allclose(found.solve(answer), np.linalg.pinv(matrix, rtol=1e-9) @ answer, atol=1e-7)
    onto_rows = np.linalg.pinv(matrix, rtol=1e-9) @ matrix
    projector = found.basis.T @ found.basis
    np.testing.assert_allclose(projector, np.eye(40) - onto_rows if found.null else onto_rows, atol=1e-7)
    np.testing.assert_allclose(found.seen, np.diag(onto_rows), atol=1e-7)


def smooth_image():
    rows, columns = np.meshgrid(np.linspace(0, 1, 8), np.linspace(0, 1, 8), indexing="ij")
    return 0.5 + 0.35 * np.stack([rows, 0.5 * (rows + columns), columns], -1) - 0.2 * (rows > 0.6)[..., None]


def deficient(depth):
    """One convolution with two filters, or two whose second sees a quarter; 8x8x3 pixels remain partly open."""

    def apply(p, x):
        x = jnp.tanh(convolve(x - 0.5, p["a"], 1, "VALID"))
        if depth == 2:
            x = jnp.tanh(convolve(x, p["b"], 2, "VALID"))
        return x.reshape(x.shape[0], -1) @ p["c"] + p["d"][None]

    rng = np.random.default_rng(5)
    filters = 2 if depth == 1 else 3
    params = {"a": rng.uniform(-0.3, 0.3, (3, 3, 3, filters)), "b": rng.uniform(-0.2, 0.2, (2, 2, 3, 2))}
    params = params if depth == 2 else {"a": params["a"]}
    size = 36 * filters if depth == 1 else 18
    return apply, {**params, "c": rng.normal(0, 0.3, (size, 5)), "d": rng.normal(0, 0.1, 5)}


@pytest.mark.parametrize("depth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_prior_chooses_within_what_the_gradient_leaves_open(depth):
    image = smooth_image()
    observation = observe(deficient(depth), (image[None], np.array([2])))
    least = invert(observation, attack="copa", prior="none")
    likely = invert(observation, attack="copa")
    assert psnr(likely.images[0], image) > psnr(least.images[0], image) + 6
    for found in (least, likely):
        assert found.certificates[0].status == "ambiguous"
        assert found.gradient_residual[0] < 1e-10
    assert likely.certificates[0].leaked_dimensions == least.certificates[0].leaked_dimensions < 192
    assert np.sum(likely.determined) == pytest.approx(least.certificates[0].leaked_dimensions, abs=1e-3)


def test_only_the_open_directions_move():
    image = smooth_image()
    observation = observe(deficient(1), (image[None], np.array([2])))
    least, likely, alone = (
        invert(observation, attack=attack, prior=prior).images[0].ravel()
        for attack, prior in [("copa", "none"), ("copa", "tv"), ("rgap", "tv")]
    )
    np.testing.assert_array_equal(least, alone)  # rgap is minimum norm whatever the prior
    truth, moved = image.ravel() - least, likely - least
    assert abs(moved @ least) < 1e-9 * np.linalg.norm(moved) * np.linalg.norm(least)  # the minimum norm is across
    assert np.linalg.norm(moved) > 0.5 * np.linalg.norm(truth)


@pytest.mark.parametrize("prior", ["tv", pytest.param("none", marks=pytest.mark.slow)])
def test_hybrid_matches_better_than_the_layers_alone(prior):
    image = smooth_image()
    observation = observe(deficient(2), (image[None], np.array([2])))
    alone, found = invert(observation, attack="rgap"), invert(observation, attack="hybrid", prior=prior)
    assert np.all(np.isfinite(found.images))
    assert found.gradient_residual[0] < 0.3 * alone.gradient_residual[0]
    if prior == "tv":
        assert psnr(found.images[0], image) > psnr(alone.images[0], image) + 5


def test_an_unknown_prior_is_one_clear_error(tmp_path):
    observation = observe(deficient(1), (smooth_image()[None], np.array([2])))
    with pytest.raises(InputError, match="unknown prior 'wavelet'"):
        invert(observation, prior="wavelet")
    from leakjax.cli import app

    result = CliRunner().invoke(app, ["invert", "--prior", "wavelet", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "known: none, tv" in result.stderr
