"""Transformers on patches: a parameter that is added to a layer's output shows dL/dz there; judged by the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import leakjax
from leakjax.attacks.heads.additive import additive_path, read_sum
from leakjax.metrics import psnr
from leakjax.models.reader import read_model
from leakjax.segments.chain import read_segments

SIDE = 8


class Block(nnx.Module):
    """Pre-norm attention and two dense layers, each with a skip."""

    def __init__(self, width, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Patches, a class token, positions added (learned, or not), a block, a head on the class token or on the mean."""

    def __init__(self, width, *, patch=2, learned=True, token=True, seed=0):
        rngs, count = nnx.Rngs(seed), (SIDE // patch) ** 2 + token
        self.embed = nnx.Conv(3, width, (patch, patch), strides=patch, padding="VALID", rngs=rngs)
        table = 0.02 * jax.random.normal(rngs.params(), (1, count, width))
        self.positions = nnx.Param(table) if learned else nnx.Variable(table)
        self.token = nnx.Param(jnp.zeros((1, 1, width))) if token else None
        self.block, self.norm = Block(width, rngs), nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        if self.token is not None:
            x = jnp.concatenate([jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1])), x], axis=1)
        x = self.norm(self.block(x + self.positions[...]))
        return self.head(x.mean(axis=1) if self.token is None else x[:, 0])


@pytest.fixture
def images(rng):
    return rng.uniform(0.1, 0.9, (2, SIDE, SIDE, 3))


@pytest.mark.parametrize(("token", "dtype", "least"), [(True, "float64", 230), (False, "float32", 70)])
def test_learned_positions_give_the_image(images, token, dtype, least):
    labels = np.array([3, 1])
    result = leakjax.invert(leakjax.observe(Transformer(24, token=token), (images, labels), dtype=dtype))
    assert [c.status for c in result.certificates] == ["exact", "exact"]
    assert [c.proof for c in result.certificates] == ["global", "global"]
    assert result.labels.tolist() == labels.tolist()
    assert min(float(psnr(a, b)) for a, b in zip(result.images, images, strict=True)) > least
    assert [[info.status for info in layers] for layers in result.layers] == [["determined"]] * 2


def test_an_unknown_loss_hinders_nothing(images):
    observed = leakjax.observe(Transformer(24), (images, np.array([3, 1])), loss=lambda z, y: jnp.abs(z[y] - 2.0) ** 3)
    hidden = leakjax.invert(observed)
    assert min(float(psnr(a, b)) for a, b in zip(hidden.images, images, strict=True)) > 230


class Added(nnx.Module):
    """A layer with a parameter of some shape that is added to its output, times a factor."""

    def __init__(self, shape, factor):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 5, (3, 3), use_bias=False, rngs=rngs)
        self.offset, self.factor = nnx.Param(jax.random.normal(rngs.params(), shape)), factor
        self.head = nnx.Linear(SIDE * SIDE * 5, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.conv(x) + self.factor * self.offset[...]).reshape(len(x), -1))


@pytest.mark.parametrize(
    ("shape", "factor", "additive"),
    [
        ((1, SIDE, SIDE, 5), 1.0, True),
        ((1, SIDE, SIDE, 5), -3.0, True),
        ((1, 1, 1, 5), 1.0, False),
        ((1, SIDE, SIDE, 1), 1.0, False),
    ],
)
def test_only_a_parameter_of_its_own_everywhere_is_additive(images, shape, factor, additive):
    with jax.enable_x64(True):
        model = read_model(Added(shape, factor)).astype(np.float64)
        segment, *_ = read_segments(model, (SIDE, SIDE, 3), np.float64).segments
        path = additive_path(segment, model.variables)
        assert path == ("offset" if additive else None)
        if path is not None:
            dz = np.random.default_rng(1).normal(size=(SIDE, SIDE, 5))
            assert np.allclose(read_sum(segment, path, model.variables, factor * dz.reshape(shape)), dz, atol=1e-14)
