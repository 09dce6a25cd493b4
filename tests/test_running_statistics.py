"""Train-mode batch norm with the client's new running statistics: read, undone, certified."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import leakjax
from leakjax.captures.capture import read_capture, write_capture
from leakjax.models.reader import read_model
from leakjax.runtime.precision import compute_in
from leakjax.segments.sent_statistics import read_sent_statistics
from leakjax.segments.tracing.network import read_network

DRAW = np.random.default_rng(3)
SHAPE = (8, 8, 2)
IMAGES, LABELS = DRAW.uniform(size=(2, *SHAPE)), np.array([2, 0])


class Net(nnx.Module):
    def __init__(self, activation=nnx.tanh, momentum=0.99):
        rngs, draw = nnx.Rngs(1), np.random.default_rng(4)
        self.activation = activation
        self.conv1 = nnx.Conv(2, 8, (3, 3), rngs=rngs, use_bias=False)
        self.bn1 = nnx.BatchNorm(8, rngs=rngs, momentum=momentum)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
        self.bn2 = nnx.BatchNorm(8, rngs=rngs, momentum=momentum)
        self.bn2.scale[...] = jnp.asarray(draw.uniform(0.5, 1.5, 8), jnp.float32)
        self.bn2.bias[...] = jnp.asarray(draw.normal(size=8), jnp.float32)
        self.head = nnx.Linear(8 * 16, 4, rngs=rngs)

    def __call__(self, x):
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.activation(self.bn2(self.conv2(x)))
        return self.head(x.reshape(len(x), -1))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        for stride in (1, 2):
            x = linen.Conv(8, (3, 3), strides=stride, use_bias=False)(x)
            x = linen.tanh(linen.BatchNorm(use_running_average=not train, use_fast_variance=False, momentum=0.9)(x))
        return linen.Dense(4)(x.reshape(len(x), -1))


def linen_net():
    module = Linen()
    return module, module.init(jax.random.key(0), IMAGES, False)


def decibels(found, images):
    """Of each image, the examples of a gradient in whichever order they came back."""
    errors = np.mean((found.images[:, None] - images[None]) ** 2, axis=(2, 3, 4))
    return -10 * np.log10(errors.min(axis=0))


@pytest.mark.parametrize("make", [Net, linen_net], ids=["nnx, fast variance", "linen, two passes"])
@pytest.mark.parametrize("images", [IMAGES, 0 * IMAGES], ids=["noise", "black"])
def test_the_sums_over_a_batch_are_read_off_new_buffers(make, images):
    with compute_in("float64"):
        model = read_model(make(), train=True).astype("float64")
        assert model.step is not None
        _, new = model.step(model.variables, jnp.asarray(images))
        sent = {path: np.asarray(a)[None] for path, a in new.items()}
        read, _ = read_sent_statistics(model, sent, SHAPE, (0.0, 1.0), 2, "float64", 2.2e-16)
        truth = read_network(model, SHAPE, 2, "float64").measure(model.variables, jnp.asarray(images))
    assert len(truth) == 4
    assert read.keys() == truth.keys()
    for name, value in truth.items():
        assert np.allclose(read[name][0], value, rtol=1e-10, atol=1e-10 * max(1.0, np.abs(value).max()))


@pytest.mark.parametrize("activation", [nnx.tanh, lambda z: nnx.leaky_relu(z, 0.2)], ids=["tanh", "leaky_relu"])
@pytest.mark.parametrize("examples", [1, 2])
def test_images_come_back_with_the_new_buffers(activation, examples):
    images, labels = IMAGES[:examples], LABELS[:examples]
    observation = leakjax.observe(Net(activation), (images, labels), batch_size=examples, train=True)
    assert set(observation.buffers) == {"bn1/mean", "bn1/var", "bn2/mean", "bn2/var"}
    found = leakjax.invert(observation)
    assert [c.status for c in found.certificates] == ["exact"] * examples
    assert decibels(found, images).min() > 200
    assert sorted(found.labels) == sorted(labels)
    status = {layer.name: layer.status for layer in found.layers[0]}
    assert status["bn2"] == "determined"
    assert status["bn1"] == ("determined" if examples == 1 else "pulled_back")  # conv2 has too few rows for two


def test_one_image_is_proved_to_be_the_only_one_by_linear_systems_alone():
    observation = leakjax.observe(Net(), (IMAGES[:1], LABELS[:1]), train=True)
    found = leakjax.invert(observation, attack="rgap")
    assert found.certificates[0].proof == "global"
    assert decibels(found, IMAGES[:1]).min() > 200


def test_several_clients_have_statistics_of_their_own():
    found = leakjax.invert(leakjax.observe(linen_net(), (IMAGES, LABELS), train=True))
    assert [c.status for c in found.certificates] == ["exact", "exact"]
    assert decibels(found, IMAGES).min() > 200


class Twice(nnx.Module):
    """A batch norm behind another: its mean is 0, and the gradient of the first one's bias is rounding."""

    def __init__(self):
        rngs = nnx.Rngs(2)
        self.conv = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.bn1, self.bn2 = (nnx.BatchNorm(8, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(8 * 64, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.bn2(self.bn1(self.conv(x)))).reshape(len(x), -1))


def test_what_is_zero_but_for_rounding_is_no_contradiction():
    found = leakjax.invert(leakjax.observe(Twice(), (IMAGES, LABELS), batch_size=2, train=True))
    assert [c.status for c in found.certificates] == ["exact", "exact"]
    assert decibels(found, IMAGES).min() > 200


@pytest.mark.parametrize("attack", ["match", "copa"])
def test_clients_in_float32(attack):
    observation = leakjax.observe(Net(), (IMAGES[:1], LABELS[:1]), train=True, dtype="float32")
    found = leakjax.invert(observation, attack=attack)
    (certificate,) = found.certificates
    assert certificate.status != "failed"
    assert decibels(found, IMAGES[:1]).min() > 60
    if certificate.psnr_estimate is not None:
        assert abs(certificate.psnr_estimate - decibels(found, IMAGES[:1]).min()) < 6


def test_running_statistics_of_an_equinox_state():
    equinox = pytest.importorskip("equinox")

    class Normed(equinox.Module):
        conv: equinox.nn.Conv2d
        norm: equinox.nn.BatchNorm
        head: equinox.nn.Linear

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.conv = equinox.nn.Conv2d(2, 8, 3, padding=1, key=a)
            self.norm = equinox.nn.BatchNorm(8, "batch", mode="batch")
            self.head = equinox.nn.Linear(512, 4, key=b)

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.head(jnp.tanh(x).ravel()), state

    model = equinox.nn.make_with_state(Normed)(jax.random.key(0))
    observation = leakjax.observe(model, (IMAGES, LABELS), batch_size=2, train=True, layout="NCHW")
    assert observation.buffers
    found = leakjax.invert(observation)
    assert [c.status for c in found.certificates] == ["exact", "exact"]
    assert decibels(found, IMAGES).min() > 200


def test_a_capture_keeps_the_new_buffers(tmp_path):
    observation = leakjax.observe(Net(), (IMAGES[:1], LABELS[:1]), train=True)
    write_capture(observation, tmp_path / "capture.npz")
    again = read_capture(tmp_path / "capture.npz", read_model(Net(), train=True))
    assert again.buffers.keys() == observation.buffers.keys()
    for path, a in observation.buffers.items():
        assert np.array_equal(again.buffers[path], a)


def test_buffers_that_no_step_leaves_are_refused():
    observation = leakjax.observe(Net(), (IMAGES[:1], LABELS[:1]), train=True)
    below = {path: a - 1.0 if path == "bn2/var" else a for path, a in observation.buffers.items()}
    with pytest.raises(leakjax.InputError, match="no step of the model leaves 'bn2/"):
        leakjax.invert(dataclasses.replace(observation, buffers=below))
    with pytest.raises(leakjax.InputError, match="no buffer of the model"):
        dataclasses.replace(observation, buffers={"bn3/mean": np.zeros((1, 8))})
    with pytest.raises(leakjax.InputError, match="victims first"):
        dataclasses.replace(observation, buffers={"bn1/mean": np.zeros(8)})


def test_what_says_that_a_model_trains_is_checked():
    with pytest.raises(leakjax.InputError, match="train must be True, False"):
        leakjax.observe(Net(), (IMAGES[:1], LABELS[:1]), train="yes")
    with pytest.raises(leakjax.InputError, match="takes no argument train"):
        read_model(lambda p, x: x @ p["w"], {"w": np.ones((3, 2))}, train=True)
    with pytest.raises(leakjax.InputError, match="buffers: the model has none"):
        leakjax.observe(
            (lambda p, x: x.reshape(len(x), -1) @ p["w"], {"w": np.ones((128, 3))}),
            (IMAGES[:1], LABELS[:1]),
            buffers=True,
        )
    silent = leakjax.observe(Net(), (IMAGES[:1], LABELS[:1]), train=True, buffers=False)
    assert silent.buffers == {}
