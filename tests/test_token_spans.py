"""Tokens in the spans of gradients: images of transformers, several a gradient or without positions to read; judged by
the truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_segmentation import problem_of

import leakjax
from leakjax.attacks.adaptive import tell
from leakjax.attacks.matching.outcome import misfit
from leakjax.attacks.matching.spans import can_span
from leakjax.metrics import psnr
from leakjax.models.reader import read_model
from leakjax.segments.tracing.network import read_network

SIDE, PATCH, WIDTH = 8, 4, 64
COUNT = (SIDE // PATCH) ** 2


def attention(query, key, value, **_):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1]).astype(query.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Transformer(nnx.Module):
    """Patches, positions that are learned or not, one pre-norm block, a head on the mean; where it `mixes`, the
    examples of a batch depend on each other."""

    def __init__(self, *, learned=False, mixes=False, width=WIDTH, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Conv(3, width, (PATCH, PATCH), strides=PATCH, padding="VALID", rngs=rngs)
        table = 0.5 * jax.random.normal(rngs.params(), (1, COUNT, width))
        self.positions = nnx.Param(table) if learned else nnx.Variable(table)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs, attention_fn=attention)
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)
        self.head, self.mixes = nnx.Linear(width, 4, rngs=rngs), mixes

    def __call__(self, x):
        x = self.embed(x).reshape(len(x), COUNT, -1) + self.positions[...]
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        x = x - 0.5 * x.mean(axis=0, keepdims=True) if self.mixes else x
        return self.head(x.mean(axis=1))


@pytest.fixture
def images(rng):
    return rng.uniform(0.2, 0.8, (3, SIDE, SIDE, 3))


@pytest.mark.parametrize(("learned", "examples"), [(False, 1), (True, 3)])
def test_every_image_comes_back_with_its_label(images, learned, examples):
    labels = np.array([3, 1, 3])[:examples]
    observed = leakjax.observe(
        Transformer(learned=learned), (images[:examples], labels), batch_size=examples, dtype="float64"
    )
    result = leakjax.invert(observed)
    assert [c.status for c in result.certificates] == ["exact"] * examples
    assert result.labels.tolist() == sorted(labels)
    for image, label in zip(result.images, result.labels, strict=True):
        assert max(float(psnr(image, x)) for x, y in zip(images, labels, strict=False) if y == label) > 150


def test_given_labels_keep_their_order(images):
    labels = np.array([3, 1])
    observed = leakjax.observe(Transformer(), (images[:2], labels), batch_size=2, dtype="float64")
    result = leakjax.invert(observed, labels=labels)
    assert min(float(psnr(a, b)) for a, b in zip(result.images, images, strict=False)) > 150


def test_columns_of_a_gradient_lie_in_the_span_of_the_tokens(images):
    with jax.enable_x64(True):
        model = read_model(Transformer()).astype(np.float64)
        observed = leakjax.observe(model, (images[:2], np.array([3, 1])), batch_size=2, dtype="float64")
        tokens = read_network(model, (SIDE, SIDE, 3), 1, np.float64).tokens
        assert tokens is not None
        gradient = {p: g[0] for p, g in observed.gradients.items()}
        values = [tokens.values(model.variables, jnp.asarray(x[None]), len(tokens.reads)) for x in images[:2]]
        assert [read.tokens for read in tokens.reads] == [COUNT] * 4 + [1]
        assert [len(read.paths) for read in tokens.reads] == [3, 1, 1, 1, 1]
        for k, read in enumerate(tokens.reads):
            rows = np.concatenate([np.asarray(v[k]) for v in values])
            assert rows.shape == (2 * read.tokens, read.width)
            basis = np.linalg.qr(rows.T)[0]
            for matrix in read.matrices(gradient):
                matrix = np.asarray(matrix)
                outside = matrix - basis @ (basis.T @ matrix)
                assert np.linalg.norm(outside) < 1e-12 * np.linalg.norm(matrix)


class Tied(nnx.Module):
    """One matrix at both ends of a hidden layer: its gradient is a sum over both."""

    def __init__(self):
        self.inner, self.head = nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        x = x.reshape(len(x), -1, 6)
        return self.head(self.inner(jnp.tanh(self.inner(x))).mean(axis=1))


def test_a_weight_that_is_used_twice_reads_no_tokens():
    tokens = read_network(read_model(Tied()), (4, 3, 3), 1, np.float32).tokens
    assert tokens is not None
    assert [read.paths for read in tokens.reads] == [("head/kernel",)]


def prepared(module, images, **changes):
    labels = np.arange(len(images)) % 4
    with jax.enable_x64(True):
        observed = leakjax.observe(module, (images, labels), batch_size=len(images), dtype="float64")
        return dataclasses.replace(problem_of(observed), **changes)


def test_what_has_no_span_of_its_own_is_left_to_other_attacks(images):
    with jax.enable_x64(True):
        assert can_span(prepared(Transformer(), images))
        assert not can_span(prepared(Transformer(mixes=True), images))
        assert not can_span(prepared(Transformer(width=4), images))  # as many tokens as there are dimensions
        assert not can_span(prepared(Transformer(), images, local_steps=2, learning_rate=0.1))
        assert not can_span(prepared(nnx.Linear(SIDE, 4, rngs=nnx.Rngs(0)), images[:, 0, :, :1].reshape(3, SIDE)))


def test_a_gradient_that_is_rounding_hides_no_match(images):
    """Softmax does not see a key's bias: in float32 its gradient is 1e-9 of all, and nothing of it is right."""
    labels = np.array([3])
    observed = leakjax.observe(Transformer(), (images[:1], labels), dtype="float32")
    with jax.enable_x64(True):
        problem = problem_of(observed)
        told = tell(problem, 0)
        assert misfit(problem, told, labels, images[:1]) <= told.matched
        assert misfit(problem, told, labels, images[1:2]) > 100 * told.matched
