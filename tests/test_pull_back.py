"""The pull-back constraint: exact where a layer alone is rank-deficient, honest where even the whole network is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leakjax import invert, observe
from leakjax.constraints.pull_back import pulled_back
from leakjax.runtime.precision import compute_in
from leakjax.segments.chain import read_segments
from leakjax.solvers.gauss_newton import continuation, levenberg_marquardt

SHAPE = (8, 8, 2)


def convolve(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(activation, filters, stride=1, padding="SAME"):
    """Two convolutions and a head; the second, with few filters, does not determine its own input."""

    def apply(p, x):
        x = activation(convolve(x, p["a"], stride, padding))
        x = activation(convolve(x, p["b"], 2, "SAME"))
        return x.reshape(x.shape[0], -1) @ p["c"] + p["d"][None]

    rng = np.random.default_rng(3)
    params = {"a": rng.normal(0, 0.3, (3, 3, 2, 8)), "b": rng.normal(0, 0.2, (3, 3, 8, filters))}
    size = jax.eval_shape(lambda p, x: activation(convolve(x, p, stride, padding)), params["a"], np.zeros((1, *SHAPE)))
    side = -(-size.shape[1] // 2)
    params["c"] = rng.normal(0, 0.3, (side * side * filters, 5))
    params["d"] = rng.normal(0, 0.1, 5)
    return apply, params


def psnr(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2) + 1e-35)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.softplus])
def test_what_one_layer_leaves_open_the_one_before_closes(activation):
    model = network(activation, filters=3)
    images = np.random.default_rng(0).uniform(size=(2, *SHAPE))
    observation = observe(model, (images, np.array([1, 4])))
    alone, pulled = invert(observation, attack="rgap"), invert(observation, attack="copa")
    assert all(layers[1].rank < layers[1].unknowns for layers in alone.layers)
    assert all(c.status != "exact" for c in alone.certificates)
    assert psnr(alone.images, images) < 40
    for layers, certificate in zip(pulled.layers, pulled.certificates, strict=True):
        assert (layers[1].status, layers[1].pull_back_depth) == ("pulled_back", 1)
        assert (certificate.status, certificate.leaked_dimensions) == ("exact", 128)
    assert psnr(pulled.images, images) > 200
    assert np.all(pulled.determined == 1)


def test_what_no_layer_sees_is_named():
    """A first layer of stride 3 without padding never reads the image's last rows and columns."""
    model = network(jnp.tanh, filters=2, stride=3, padding="VALID")
    images = np.random.default_rng(1).uniform(size=(1, *SHAPE))
    answer = invert(observe(model, (images, np.array([2]))), attack="copa")
    assert answer.certificates[0].status != "exact"


def test_a_determined_network_is_solved_as_by_rgap():
    model = network(jnp.tanh, filters=40)
    batch = np.random.default_rng(2).uniform(size=(1, *SHAPE)), np.array([0])
    observation = observe(model, batch)
    first, second = (invert(observation, attack=name) for name in ("rgap", "copa"))
    np.testing.assert_array_equal(first.images, second.images)
    assert all(info.pull_back_depth == 0 for info in second.layers[0])


def test_the_residual_vanishes_at_the_truth_alone():
    apply, params = network(jnp.tanh, filters=3)
    image = np.random.default_rng(4).uniform(size=(1, *SHAPE))
    observation = observe((apply, params), (image, np.array([3])))
    with compute_in("float64"):
        first, second, head = read_segments(observation.model, SHAPE, jnp.float64).segments
        variables = dict(observation.model.variables)
        x, dx = jnp.asarray(image), None
        z1 = first.function(variables, x)
        z2 = second.function(variables, jnp.tanh(z1))
        z3 = head.function(variables, jnp.tanh(z2))
        dz3 = jax.nn.softmax(z3) - jax.nn.one_hot(3, 5)[None]
        dx = jax.vjp(lambda x: head.function(variables, x), jnp.tanh(z2))[1](dz3)[0]
        gradients = {p: jnp.asarray(g[0]) for p, g in observation.gradients.items()}
        preimage = second.activation.preimage(variables, jnp.tanh(z2))
        residual = pulled_back(
            (first, second), variables, preimage, preimage.slope * dx, {p: gradients[p] for p in ("a", "b")}
        )

        def norm(u):
            return float(jnp.sqrt(sum(jnp.sum(r**2) for r in jax.tree.leaves(residual.function(u, None)))))

        assert norm(x) < 1e-11 * float(residual.size)
        assert norm(x + 1e-3) > 1e-5 * float(residual.size)


def test_levenberg_marquardt_and_continuation_on_kinks(rng):
    """|z| made smooth and sharp again: the truth is found from afar, and divergence is no option."""
    matrix, truth = rng.normal(size=(40, 12)), rng.normal(size=12)

    def fit(smoothing, x):
        z = matrix @ x
        width = 0.0 if smoothing is None else smoothing
        return jnp.sqrt(z**2 + width**2) + 0.1 * z - (np.abs(matrix @ truth) + 0.1 * (matrix @ truth))

    with compute_in("float64"):
        size = jnp.linalg.norm(fit(None, jnp.zeros(12)))
        start = jnp.asarray(truth + 0.3 * rng.normal(size=12))
        options = {"size": size, "max_inner": 100}
        smooth = continuation(
            lambda x, s: fit(s, x), start, smoothing=1.0, sharpest=1e-8, tolerance=1e-7, max_steps=200, **options
        )
        found = levenberg_marquardt(lambda x: fit(None, x), smooth.x, tolerance=1e-14, max_steps=50, **options)
        np.testing.assert_allclose(found.x, truth, atol=1e-10)
        lost = levenberg_marquardt(lambda x: jnp.log(x - 2.0), jnp.ones(3), tolerance=1e-9, max_steps=9, **options)
        assert np.all(np.isfinite(lost.x))
