"""Normalizations by the data's own statistics that nobody sent: batch norm, group norm, layer norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import leakjax
from leakjax.attacks.layerwise import waiting
from leakjax.models.reader import read_model
from leakjax.runtime.precision import compute_in

DRAW = np.random.default_rng(5)
IMAGES, LABELS = DRAW.uniform(size=(2, 8, 8, 2)), np.array([2, 0])
NORMS = {
    "batch": lambda channels, rngs: nnx.BatchNorm(channels, rngs=rngs),
    "group": lambda channels, rngs: nnx.GroupNorm(channels, num_groups=4, rngs=rngs),
    "layer": lambda channels, rngs: nnx.LayerNorm(channels, rngs=rngs),
}


def leaky(z):
    return nnx.leaky_relu(z, 0.2)


class Net(nnx.Module):
    """Two convolutions, each with a norm; the first of them of any stride."""

    def __init__(self, norm, activation, stride=1, widths=(8, 8)):
        rngs, draw = nnx.Rngs(1), np.random.default_rng(4)
        self.activation = activation
        self.conv1 = nnx.Conv(2, widths[0], (3, 3), strides=stride, padding=1, use_bias=False, rngs=rngs)
        self.norm1 = NORMS[norm](widths[0], rngs)
        self.conv2 = nnx.Conv(widths[0], widths[1], (3, 3), rngs=rngs)
        self.norm2 = NORMS[norm](widths[1], rngs)
        self.norm2.scale[...] = jnp.asarray(draw.uniform(0.5, 1.5, widths[1]), jnp.float32)
        self.head = nnx.Linear(widths[1] * (8 // stride) ** 2, 4, rngs=rngs)

    def __call__(self, x):
        x = self.activation(self.norm1(self.conv1(x)))
        x = self.activation(self.norm2(self.conv2(x)))
        return self.head(x.reshape(len(x), -1))


def inverted(net, examples):
    batch = IMAGES[:examples], LABELS[:examples]
    observation = leakjax.observe(net, batch, batch_size=examples, train=True, buffers=False)
    assert not observation.buffers
    found = leakjax.invert(observation, attack="copa")
    errors = np.mean((found.images[:, None] - batch[0][None]) ** 2, axis=(2, 3, 4))
    return found, -10 * np.log10(errors.min(axis=0))


@pytest.mark.parametrize(
    ("norm", "activation", "examples"),
    [("group", nnx.tanh, 1), ("batch", leaky, 2)],
    ids=["group norm", "batch norm of two"],
)
def test_images_come_back_without_buffers(norm, activation, examples):
    found, decibels = inverted(Net(norm, activation, widths=(8, 8 + 4 * (examples - 1))), examples)
    assert [c.status for c in found.certificates] == ["exact"] * examples
    assert decibels.min() > 150
    assert {layer.status for layer in found.layers[0]} == {"determined"}
    assert next(layer for layer in found.layers[0] if layer.name == "norm2").solver == "lsmr"


class Unpinned(nnx.Module):
    """A norm whose epsilon is so small that rounding hides the size of what it normalizes."""

    def __init__(self):
        rngs = nnx.Rngs(1)
        self.conv = nnx.Conv(2, 12, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(12, epsilon=1e-12, use_scale=False, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(12 * 64, 6, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(self.conv(x))).reshape(len(x), -1))


def test_a_size_that_rounding_hides_is_not_called_exact():
    found, decibels = inverted(Unpinned(), 1)
    (certificate,) = found.certificates
    assert decibels.max() < 150  # else the claim would be true
    assert certificate.status != "exact"
    assert found.layers[0][0].condition > 1e9


def test_what_no_window_at_the_border_sees_is_named():
    """Of the positions that a kernel of 3 by 3 with stride 2 and padding 1 sees by its center alone, the mean."""
    net = Net("batch", nnx.tanh, stride=2, widths=(12, 8))
    found, _ = inverted(net, 1)
    (certificate,) = found.certificates
    assert certificate.status == "ambiguous"
    with compute_in("float64"):
        model = read_model(net, train=True).astype("float64")

        def loss(params, x):
            return -jax.nn.log_softmax(model.apply({**model.variables, **params}, x))[0, LABELS[0]]

        def gradient(x):
            return jax.grad(loss)(dict(model.params), x)

        jacobian = jax.jacrev(gradient)(jnp.asarray(IMAGES[:1]))
    rows = np.concatenate([np.asarray(a).reshape(-1, IMAGES[0].size) for a in jacobian.values()])
    open_directions = int(np.sum(np.linalg.svd(rows, compute_uv=False) < 1e-12 * np.linalg.norm(rows)))
    assert open_directions == 2
    assert found.layers[0][0].rank_deficiency == -open_directions


def test_where_rows_leave_directions_open_newton_begins_at_what_agrees_with_them(monkeypatch):
    """The guess is the input of the norm, that waits, no output that an activation would have to be undone for."""
    begun = []
    plain = waiting.pull_back

    def noted(problem, segments, known, guesses, **options):
        found = plain(problem, segments, known, guesses, **options)
        guess, x = np.asarray(guesses[0]), np.asarray(found.x)
        begun.append((segments[0].normalizes, np.linalg.norm(x - guess) / np.linalg.norm(x)))
        return found

    monkeypatch.setattr(waiting, "pull_back", noted)
    found, _ = inverted(Net("batch", nnx.tanh, stride=2, widths=(12, 8)), 1)
    assert found.certificates[0].status == "ambiguous"
    normalizes, moved = begun[0]
    assert normalizes
    assert moved < 1e-3  # from an output that is undone once more: 0.5
