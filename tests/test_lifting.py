"""Residual blocks in stages: read, solved one linear system after another, kinked ones included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_nonlinear import SHAPE, Pooled, attacked, psnr, residual

from leakjax import invert, observe
from leakjax.constraints.stages import lifted_rows, look_inside
from leakjax.models.activations import parse_activation
from leakjax.models.reader import read_model
from leakjax.runtime.precision import compute_in
from leakjax.segments.chain import read_segments


class Bottleneck(nnx.Module):
    """A stem and one bottleneck block (1x1, 3x3, 1x1 convolutions) of stride 2, then a dense head."""

    def __init__(self, activation):
        rngs = nnx.Rngs(3)
        self.activation = activation
        self.stem = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.reduce = nnx.Conv(8, 12, (1, 1), rngs=rngs)
        self.conv = nnx.Conv(12, 12, (3, 3), strides=2, rngs=rngs)
        self.expand = nnx.Conv(12, 24, (1, 1), rngs=rngs)
        self.shortcut = nnx.Conv(8, 24, (1, 1), strides=2, rngs=rngs)
        self.head = nnx.Linear(16 * 24, 5, rngs=rngs, bias_init=nnx.initializers.normal(0.3))

    def __call__(self, x):
        x = self.activation(self.stem(x))
        y = self.activation(self.reduce(x))
        y = self.expand(self.activation(self.conv(y)))
        x = self.activation(y + self.shortcut(x))
        return self.head(x.reshape(x.shape[0], -1))


def chain(model, shape=SHAPE):
    read = read_model(model).astype("float64")
    return read, read_segments(read, shape, jnp.float64).segments


def test_a_block_is_read_in_stages_and_its_rows_hold_at_the_truth():
    with compute_in("float64"):
        model, segments = chain(Bottleneck(jnp.tanh))
        variables, block = model.variables, segments[1]
        assert [stage.paths for stage in block.stages] == [
            ("reduce/kernel", "reduce/bias"),
            ("conv/kernel", "conv/bias"),
            ("expand/kernel", "expand/bias", "shortcut/kernel", "shortcut/bias"),
        ]
        rng = np.random.default_rng(0)
        x, dx = jnp.asarray(rng.normal(size=block.input.shape)), jnp.asarray(rng.normal(size=block.output.shape))
        values = [x]
        for stage in block.stages[:-1]:
            values.append(stage.activation.function(variables, stage.function(variables, values)))
        z = block.function(variables, x)
        np.testing.assert_allclose(block.stages[-1].function(variables, values), z, rtol=1e-12)
        out = block.activation.function(variables, z)
        preimage = block.activation.preimage(variables, out)
        dz = preimage.slope * dx
        weights = {path: variables[path] for path in block.paths}
        gradients, pulled = jax.vjp(lambda w, x: block.function({**variables, **w}, x), weights, x)[1](dz)
        for known in range(len(values)):
            behind = values[len(values) - known :][::-1]
            inside = look_inside(block, variables, preimage, dz, behind)
            rows, size = lifted_rows(block, variables, inside, gradients)
            left = jax.tree.leaves(rows(values[: len(values) - known]))
            assert np.sqrt(sum(np.sum(np.square(a)) for a in left)) <= 1e-12 * size
        np.testing.assert_allclose(inside.cotangents[0], pulled, rtol=1e-9)


def test_what_cannot_be_cut_into_affine_stages_is_not():
    def gated(p, x):
        y = jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"])
        y = y * jax.nn.sigmoid(y @ p["gate"])
        return y @ p["head"]

    rng = np.random.default_rng(0)
    params = {k: rng.normal(0, 0.1, size) for k, size in (("w", (128, 20)), ("gate", (20, 20)), ("head", (20, 5)))}
    with compute_in("float64"):
        for model in ((gated, params), Pooled(3)):
            nonlinear = [segment for segment in chain(model)[1] if not segment.linear]
            assert nonlinear
            assert all(segment.stages == () for segment in nonlinear)


@pytest.mark.parametrize("name", [pytest.param("tanh", marks=pytest.mark.slow), "leaky_relu"])
def test_bottlenecks_come_back(name):
    answer, images, labels = attacked(Bottleneck(parse_activation(name)))
    assert psnr(answer.images, images)[0] > 150
    assert answer.labels[0] == labels[0]
    assert answer.certificates[0].status == "exact"


@pytest.mark.slow
def test_rectified_residual_networks_come_back():
    answer, images, labels = attacked(residual(parse_activation("relu"), widths=(12, 24)), victims=2)
    assert np.all(psnr(answer.images, images) > 150)
    assert np.array_equal(answer.labels, labels)
    assert [c.status for c in answer.certificates] == ["exact", "exact"]


@pytest.mark.slow
def test_examples_of_one_gradient_come_back_from_residual_blocks():
    images, labels = np.random.default_rng(5).uniform(size=(2, *SHAPE)), np.array([3, 1])
    model = residual(parse_activation("leaky_relu"), widths=(12, 24))
    answer = invert(observe(model, (images, labels), batch_size=2), attack="copa")
    errors = [np.max(np.abs(images[k] - answer.images), axis=(1, 2, 3)).min() for k in range(2)]
    assert max(errors) < 1e-7
    assert {c.status for c in answer.certificates} == {"exact"}
