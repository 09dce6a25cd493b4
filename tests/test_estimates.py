"""Estimates by probes against the dense Jacobian of small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leakjax.errors import InputError
from leakjax.leakage.matrix_free import estimate_map, estimate_spectrum
from leakjax.models import MODELS, build_model
from leakjax.models.activations import parse_activation
from leakjax.models.networks import Conv, ConvNet
from leakjax.models.reader import read_model
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing.network import batch_gradient, read_network

SEEDS = (0, 1, 2)


def problem(module, shape, dtype, *, logits=10):
    model = read_model(module).astype(dtype)
    gradient = batch_gradient(read_network(model, shape, 1, dtype).logits, "softmax_cross_entropy", tuple(model.params))
    x = jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, size=(1, *shape)), dtype)
    return gradient, model.variables, x, jnp.asarray([3 % logits])


def tiny(dtype):
    layers = [Conv(3, 3, 1, 0), Conv(4, 3, 2, 1)]
    tanh = parse_activation("tanh")
    net = ConvNet(layers, rngs=nnx.Rngs(0), activations=[tanh] * 2, input_shape=(10, 10, 3), init="torch")
    return problem(net, (10, 10, 3), dtype)


@functools.cache
def dense(of):
    """Singular values, descending, and right singular vectors of J, column by column."""
    with compute_in("float64") as dtype:
        gradient, variables, x, labels = of(dtype)
        tangent = jax.jit(jax.linearize(lambda x: gradient(variables, x, labels), x)[1])
        rows = jax.lax.map(
            lambda e: jnp.concatenate([jnp.ravel(g) for g in tangent(e.reshape(x.shape)).values()]),
            jnp.eye(x.size, dtype=dtype),
            batch_size=64,
        )
        _, s, vh = np.linalg.svd(np.asarray(rows).T, full_matrices=False)
    return s, vh.T


def cnn2_c4(dtype):
    return problem(build_model("cnn2_c4", seed=0), MODELS["cnn2_c4"].input_shape, dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_counts_and_total_are_within_three_errors(kind, seed):
    s, _ = dense(tiny)
    floors = s[0] * np.array([0.6, 0.3, 0.1, 0.03, 0.01])
    with compute_in(kind) as dtype:
        estimate = estimate_spectrum(*tiny(dtype), floor=floors, probes=8, order=40, seed=seed)
    truth = (s[:, None] > floors).sum(axis=0)
    assert (abs(estimate.counts - truth) <= 3 * estimate.counts_error + 1e-9).all()
    assert (estimate.counts_error < 0.1 * s.size).all()
    assert abs(estimate.total - (s**2).sum()) < 3 * estimate.total_error
    assert estimate.total_error < 0.1 * estimate.total
    leading = estimate.singular_values
    assert leading.size >= 3
    np.testing.assert_allclose(leading[:3], s[:3], rtol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_leaked_dimensions_of_cnn2_c4(seed):
    leaked, unknowns, largest = 926, 3072, 0.9
    floors = largest * np.array([1e-1, 1e-2, 1e-4, 1e-6])
    with compute_in("float64") as dtype:
        estimate = estimate_spectrum(*cnn2_c4(dtype), floor=floors, seed=seed)
    assert (abs(estimate.counts - leaked) < 3 * estimate.counts_error).all()
    assert (estimate.counts_error < 0.01 * unknowns).all()


def test_a_space_that_is_exhausted_is_counted_exactly():
    matrix = np.random.default_rng(1).normal(size=(5, 12))
    s = np.linalg.svd(matrix, compute_uv=False)

    def linear(variables, x, labels):
        return {"g": variables["a"] @ jnp.ravel(x)}

    with compute_in("float64") as dtype:
        variables, x = {"a": jnp.asarray(matrix, dtype)}, jnp.zeros((1, 2, 2, 3), dtype)
        estimate = estimate_spectrum(linear, variables, x, jnp.zeros(1, int), floor=[1e-3, (s[1] + s[2]) / 2])
    np.testing.assert_allclose(estimate.singular_values, s, rtol=1e-9)
    np.testing.assert_allclose(estimate.counts, [5, 2], atol=1e-6)
    np.testing.assert_allclose(estimate.total, (s**2).sum(), rtol=1e-9)


def test_a_gradient_that_does_not_move_has_no_dimensions():
    def constant(variables, x, labels):
        return {"g": variables["a"] + 0.0 * jnp.ravel(x)[:2]}

    with compute_in("float64") as dtype:
        x = jnp.ones((1, 2, 2, 3), dtype)
        estimate = estimate_spectrum(constant, {"a": jnp.ones(2, dtype)}, x, jnp.zeros(1, int), floor=[1e-3])
    assert (estimate.counts, estimate.counts_error, estimate.total) == (0, 0, 0)


def test_counts_below_rounding_are_not_given():
    with compute_in("float32") as dtype:
        estimate = estimate_spectrum(*tiny(dtype), floor=[1e-9, 1e-2], probes=8, order=40)
    assert np.isnan(estimate.counts[0])
    assert np.isnan(estimate.counts_error[0])
    assert np.isfinite(estimate.counts[1])


def soft_map(relative):
    s, v = dense(tiny)
    return s[0] * relative, (v**2 @ (s**2 / (s**2 + (relative * s[0]) ** 2))).reshape(1, 10, 10, 3)


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize("relative", [0.1, 0.03])
def test_map_is_within_its_errors(kind, relative):
    floor, truth = soft_map(relative)
    with compute_in(kind) as dtype:
        found, error = estimate_map(*tiny(dtype), floor=floor, probes=16, steps=120)
    assert found.shape == error.shape == truth.shape
    assert ((found >= 0) & (found <= 1)).all()
    assert np.mean(abs(found - truth) < 3 * error) > 0.97
    assert np.sqrt(np.mean(error**2)) < 0.15


def test_blocks_of_the_map_are_sharper_and_ragged_at_the_edge():
    floor, truth = soft_map(0.03)
    with compute_in("float64") as dtype:
        found, error = estimate_map(*tiny(dtype), floor=floor, probes=16, steps=120, block=4)
    corner = found[0, 8:, 8:, 1]
    assert np.ptp(corner) < 1e-12
    for rows, columns in [(slice(0, 4), slice(4, 8)), (slice(8, 10), slice(8, 10))]:
        gap = abs(found[0, rows, columns].mean((0, 1)) - truth[0, rows, columns].mean((0, 1)))
        assert (gap < 3 * error[0, rows.start, columns.start]).all()
    assert error[0, :8, :8].max() < 0.06


def test_too_few_steps_show_in_the_error_of_the_map():
    floor, truth = soft_map(0.01)
    with compute_in("float64") as dtype:
        found, error = estimate_map(*tiny(dtype), floor=floor, probes=4, steps=3, block=10)
    assert error.max() <= 1.5
    assert (abs(found - truth.mean((1, 2), keepdims=True)) < 3 * error).all()


@pytest.mark.parametrize(
    ("call", "arguments", "named"),
    [
        (estimate_spectrum, {"floor": [1.0, -1.0]}, "floor"),
        (estimate_spectrum, {"floor": [np.nan]}, "floor"),
        (estimate_spectrum, {"floor": [1.0], "probes": 1}, "probes"),
        (estimate_spectrum, {"floor": [1.0], "order": 1}, "order"),
        (estimate_map, {"floor": 0.0}, "floor"),
        (estimate_map, {"floor": 1.0, "steps": 0}, "steps"),
        (estimate_map, {"floor": 1.0, "block": 0}, "block"),
        (estimate_map, {"floor": 1.0, "probes": 1}, "probes"),
    ],
)
def test_bad_input_is_named(call, arguments, named):
    with pytest.raises(InputError, match=named):
        call(None, None, jnp.zeros((1, 2, 2, 1)), None, **arguments)
