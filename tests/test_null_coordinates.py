"""Null spaces closed by the activation before: the parts, and deficient layers behind kinked activations."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_pull_back import SHAPE, network, psnr

from leakjax import invert, observe
from leakjax.solvers.active_set import is_pinned, solve_pattern
from leakjax.solvers.null_space import null_space, stacked_null_space


@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 40, 33), (30, 50, 30), (50, 20, 20), (40, 40, 5)])
@pytest.mark.parametrize("guess", [0, 7, 60])
def test_null_space_is_orthonormal_whole_and_null(rng, rows, columns, rank, guess):
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    basis = null_space(matrix, guess)
    assert basis.shape == (columns, columns - rank)
    np.testing.assert_allclose(basis.T @ basis, np.eye(columns - rank), atol=1e-12)
    np.testing.assert_allclose(matrix @ basis, 0, atol=1e-8 * np.linalg.norm(matrix))


def test_null_space_of_blocks_that_fall_apart(rng):
    """[I_3 (x) D; F], columns shuffled: the same space as by singular values."""
    small, dense = rng.normal(size=(6, 10)), rng.normal(size=(8, 33))
    first = np.pad(np.kron(np.eye(3), small), ((0, 0), (0, 3)))[:, rng.permutation(33)]
    basis = stacked_null_space(first, dense, 4)
    assert basis.shape == (33, 33 - 18 - 8)
    np.testing.assert_allclose(basis.T @ basis, np.eye(7), atol=1e-12)
    np.testing.assert_allclose(np.concatenate([first, dense]) @ basis, 0, atol=1e-10)
    assert stacked_null_space(first, rng.normal(size=(40, 33)), 4).shape == (33, 0)


def test_a_sparse_matrix_is_factorized_as_one(rng):
    band = np.diag(np.ones(400)) + np.diag(np.ones(399), 1)
    band[::8] = 0
    basis = null_space(band, 50)
    assert basis.shape == (400, 400 - np.linalg.matrix_rank(band))
    np.testing.assert_allclose(band @ basis, 0, atol=1e-10)


def test_a_matrix_without_a_clear_gap_has_no_null_space_to_show(rng):
    left, right = (np.linalg.qr(rng.normal(size=(30, 30)))[0] for _ in range(2))
    values = np.geomspace(1, 1e-12, 30)
    assert null_space(left @ (values[:, None] * right), 5) is None


def test_patterns_are_found_where_plain_updates_cycle(rng):
    """|A c| + 0.3 A c = its value at a truth: piecewise linear, overdetermined, the sign pattern unknown."""
    a, truth = rng.normal(size=(60, 12)), rng.normal(size=12)

    def curve(z):
        return np.abs(z) + 0.3 * z

    def residual(c):
        z = a @ c
        return curve(z) - curve(a @ truth), lambda: a * (np.sign(z) + 0.3)[:, None]

    found = solve_pattern(residual, truth + 0.3 * rng.normal(size=12), tolerance=1e-13)
    np.testing.assert_allclose(found.c, truth, atol=1e-10)
    lost = solve_pattern(lambda c: (np.abs(c) + 1, lambda: np.diag(np.sign(c))), np.ones(3), tolerance=1e-9)
    assert np.all(np.isfinite(lost.c))
    assert lost.residual >= np.sqrt(3) - 1e-9


def test_pinned_means_no_direction_is_left(rng):
    free = rng.normal(size=(30, 10))
    free[:, 0] = np.abs(free[:, 0])  # c = e_0 satisfies every inequality
    assert not is_pinned(free)
    assert not is_pinned(rng.normal(size=(9, 10)))
    assert not is_pinned(np.hstack([rng.normal(size=(40, 4)), np.zeros((40, 1))]))
    assert is_pinned(np.vstack([np.eye(10), -np.ones((1, 10))]))
    assert is_pinned(rng.normal(size=(60, 10)))  # six half-spaces a dimension: no direction survives


@pytest.mark.parametrize("slope", [0.2, 0.1])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_leaky_layers_are_closed_by_the_range_of_the_layer_before(slope, dtype):
    model = network(lambda z: jnp.where(z > 0, z, slope * z), filters=3)
    images = np.random.default_rng(0).uniform(size=(3, *SHAPE))
    observation = observe(model, (images, np.array([1, 4, 0])), dtype=dtype)
    alone, pulled = invert(observation, attack="rgap"), invert(observation, attack="copa")
    assert all(c.status != "exact" for c in alone.certificates)
    for layers, certificate in zip(pulled.layers, pulled.certificates, strict=True):
        assert (layers[1].status, layers[1].pull_back_depth, layers[1].rank) == ("pulled_back", 1, 512)
        assert (certificate.status, certificate.leaked_dimensions) == ("exact", 128)
    assert psnr(pulled.images, images) > (200 if dtype == "float64" else 60)


def test_a_relu_layer_is_closed_by_its_zeros():
    """Half of x is exactly 0 and the rest above it: with few null directions nothing else fits."""
    model = network(lambda z: jnp.maximum(z, 0), filters=8)
    images = np.random.default_rng(0).uniform(size=(1, *SHAPE))
    observation = observe(model, (images, np.array([1])))
    alone, pulled = invert(observation, attack="rgap"), invert(observation, attack="copa")
    assert all(layers[1].rank < layers[1].unknowns for layers in alone.layers)
    assert all(layers[1].status == "pulled_back" for layers in pulled.layers)
    assert [c.status for c in pulled.certificates] == ["exact"]
    assert psnr(pulled.images, images) > 150


def test_dead_layers_and_gapped_activations_end_without_an_error():
    """A black photo kills a ReLU net without biases; soft-shrink has a gap where no slope is known."""
    model = network(lambda z: jnp.maximum(z, 0), filters=3)
    black = observe(model, (np.zeros((1, *SHAPE)), np.array([1])))
    assert invert(black, attack="copa").certificates[0].status != "exact"
    model = network(lambda z: jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.1, 0), filters=3)
    observation = observe(model, (np.random.default_rng(0).uniform(size=(1, *SHAPE)), np.array([1])))
    assert np.all(np.isfinite(invert(observation, attack="copa").images))


@pytest.mark.parametrize("shape", [(5, 4), (3, 7)])
def test_the_null_space_of_zeros_is_everything(shape):
    np.testing.assert_array_equal(null_space(np.zeros(shape), 2), np.eye(shape[1]))
    assert stacked_null_space(np.zeros(shape), np.zeros((2, shape[1])), 1).shape == (shape[1], shape[1])
