"""Residual blocks and max-pooling: inverted to the last digits by copa, refused by rgap, never certified wrongly."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leakjax import UnreadableModelError, invert, observe
from leakjax.models.activations import parse_activation
from leakjax.models.residual import ResNet

SHAPE = (8, 8, 2)


class Pooled(nnx.Module):
    """A convolution of `width` filters, tanh, max-pooling and a dense head."""

    def __init__(self, width):
        rngs = nnx.Rngs(1)
        self.conv = nnx.Conv(2, width, (3, 3), rngs=rngs, bias_init=nnx.initializers.normal(0.3))
        self.head = nnx.Linear(16 * width, 5, rngs=rngs, bias_init=nnx.initializers.normal(0.3))

    def __call__(self, x):
        x = jnp.tanh(self.conv(x))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))  # here: max pool
        return self.head(x.reshape(x.shape[0], -1))


def residual(activation, blocks=1, **options):
    return ResNet(
        blocks,
        rngs=nnx.Rngs(0),
        activation=activation,
        **{"widths": (4, 6), "input_shape": SHAPE, "outputs": 5, **options},
    )


def attacked(model, *, victims=1, **options):
    images = np.random.default_rng(7).uniform(size=(victims, *SHAPE))
    labels = np.arange(victims) % 5
    answer = invert(observe(model, (images, labels)), attack="copa", **options)
    return answer, images, labels


def psnr(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2, axis=(1, 2, 3)) + 1e-35)


@pytest.mark.parametrize(
    "name",
    ["tanh", pytest.param("softplus", marks=pytest.mark.slow), pytest.param("leaky_relu", marks=pytest.mark.slow)],
)
def test_residual_networks_are_inverted_block_by_block(name):
    answer, images, labels = attacked(residual(parse_activation(name)))
    assert np.all(psnr(answer.images, images) > 100)
    assert np.array_equal(answer.labels, labels)
    assert np.all(answer.determined == 1)
    for certificate, layers in zip(answer.certificates, answer.layers, strict=True):
        assert (certificate.status, certificate.leaked_dimensions) == ("exact", images[0].size)
        assert [info.name for info in layers] == ["stem/conv+stem/norm", "block1", "block2", "head"]
        assert all(info.status in ("determined", "pulled_back") for info in layers)
        assert all(np.isfinite(info.residual) for info in layers)


def test_max_pooling_is_pulled_back_through_the_convolution():
    answer, images, labels = attacked(Pooled(32))
    assert psnr(answer.images, images)[0] > 100
    assert answer.labels[0] == labels[0]
    assert (answer.certificates[0].status, answer.certificates[0].leaked_dimensions) == ("exact", images[0].size)
    conv, pool, _ = answer.layers[0]
    assert (pool.status, pool.pull_back_depth) == ("pulled_back", 1)
    assert conv.residual == pool.residual < 1e-12


@pytest.mark.slow
def test_what_pooling_hides_is_not_certified():
    """With two filters the gradient holds fewer numbers than the image."""
    answer, images, _ = attacked(Pooled(2))
    assert psnr(answer.images, images)[0] < 60
    assert answer.certificates[0].status != "exact"


@pytest.mark.slow
def test_a_pooled_residual_network_is_matched_by_dense_steps():
    """The recursion cannot start behind global average pooling; matching the whole gradient can."""
    images = np.random.default_rng(7).uniform(size=(1, *SHAPE))
    model = residual(parse_activation("tanh"), widths=(6, 12), pooled=True)
    told = []
    answer = invert(observe(model, (images, np.array([3]))), attack="match", solver="dense", progress=told.append)
    assert psnr(answer.images, images)[0] > 150
    assert (answer.labels[0], answer.certificates[0].status) == (3, "exact")
    assert any("dense step 2" in text for text in told)


def test_rgap_refuses_by_name_line_and_remedy():
    images = np.random.default_rng(0).uniform(size=(1, *SHAPE))
    observation = observe(Pooled(4), (images, np.array([1])))
    with pytest.raises(UnreadableModelError) as caught:
        invert(observation, attack="rgap")
    (line,) = [
        k for k, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# here: max pool")
    ]
    message = str(caught.value)
    assert "\n" not in message
    for word in ("segment2", "`reduce_window_max`", f"{Path(__file__).name}:{line}", 'attack="copa"'):
        assert word in message, message


def test_a_nonlinear_last_map_has_no_head():
    def apply(p, x):
        x = x.reshape(x.shape[0], -1)
        return x @ p["w"] + jnp.tanh(x @ p["v"]) @ p["u"]

    rng = np.random.default_rng(0)
    params = {k: rng.normal(0, 0.1, size) for k, size in (("w", (128, 5)), ("v", (128, 4)), ("u", (4, 5)))}
    observation = observe((apply, params), (np.full((1, *SHAPE), 0.5), np.array([1])))
    with pytest.raises(UnreadableModelError, match="last map is nonlinear"):
        invert(observation, attack="rgap")


def test_a_gradient_in_which_x_has_no_part_is_not_taken_for_a_misfit():
    """An affine map with a bias alone: its gradient is known beforehand, and rounding is all that is left of it."""

    def apply(p, x):
        x = jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"])
        return jnp.tanh(x + p["b"][None]) @ p["head"] + p["c"][None]

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(0, 0.1, (128, 150)), "b": rng.normal(0, 0.1, 150)}
    params |= {"head": rng.normal(0, 0.1, (150, 5)), "c": rng.normal(0, 0.1, 5)}
    images = rng.uniform(size=(1, *SHAPE))
    answer = invert(observe((apply, params), (images, np.array([1]))), attack="rgap")
    assert psnr(answer.images, images)[0] > 200
    assert answer.certificates[0].status == "exact"
