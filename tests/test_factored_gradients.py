"""Gradients in fewer numbers: the same J^T J, by the plain Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leakjax import read_model
from leakjax.leakage.factored import factored
from leakjax.models.networks import Conv, ConvNet
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing.network import batch_gradient, read_network

SHAPE = (6, 6, 2)


class Attention(nnx.Module):
    """One head over nine patches, wide beside them, and a dense head on their mean."""

    def __init__(self, rngs, width=40):
        self.embed = nnx.Linear(8, width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        patches = x.reshape(-1, 3, 2, 3, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 9, 8)
        x = self.embed(patches)
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        x = x + jax.nn.softmax(q @ k.mT / np.sqrt(q.shape[-1])) @ v
        return self.head(x.mean(1))


def dense(rngs):
    return nnx.Sequential(
        lambda x: x.reshape(len(x), -1), nnx.Linear(72, 50, rngs=rngs), jnp.tanh, nnx.Linear(50, 30, rngs=rngs)
    )


def convolutions(rngs):
    """The second has one output position, and many filters."""
    return ConvNet(
        [Conv(8, 3, 2, 1), Conv(64, 3, 3, 1)], rngs=rngs, activations=[jnp.tanh] * 2, input_shape=SHAPE, outputs=5
    )


MODELS = {"dense": dense, "convolutions": convolutions, "attention": Attention}


@pytest.mark.parametrize(
    ("name", "examples"), [("dense", 1), ("dense", 2), ("convolutions", 1), ("convolutions", 2), ("attention", 1)]
)
def test_the_gram_matrix_is_that_of_the_jacobian(name, examples, rng):
    with compute_in("float64"):
        model = read_model(MODELS[name](nnx.Rngs(0))).astype("float64")
        logits = read_network(model, SHAPE, examples, jnp.float64).logits
        gradient = batch_gradient(logits, "softmax_cross_entropy", tuple(model.params))
        x, labels = jnp.asarray(rng.uniform(size=(examples, *SHAPE))), jnp.arange(examples)
        variables = dict(model.variables)
        found = jacobian(lambda x: factored(gradient, variables, x, labels), x)
        plain = jacobian(lambda x: lambda u: gradient(variables, u, labels), x)
        assert len(found) < len(plain)
        np.testing.assert_allclose(found.T @ found, plain.T @ plain, rtol=0, atol=1e-13 * np.max(plain.T @ plain))


def test_what_is_no_product_of_few_positions_stays():
    def gradient(variables, x, labels):
        w = variables["w"]
        return {"w": jnp.tanh(x * w), "unmoved": w, "many": x.reshape(12, 6).T @ jnp.sin(x.reshape(12, 6))}

    with compute_in("float64"):
        x = jnp.linspace(0.0, 1.0, 72).reshape(1, *SHAPE)
        variables = {"w": jnp.full((1, *SHAPE), 2.0)}
        function = factored(gradient, variables, x, jnp.zeros(1, int))
        found = {jnp.shape(a) for a in function(x)}
        assert found == {(6, 6), (1, *SHAPE)}  # what no image moves is left out
        rows, plain = jacobian(lambda _: function, x), jacobian(lambda _: lambda u: gradient(variables, u, None), x)
        np.testing.assert_allclose(rows.T @ rows, plain.T @ plain, atol=1e-12)


def jacobian(function_at, x):
    """(numbers, entries) of the function that `function_at` gives at x."""
    parts = jax.jit(lambda x: jax.jacfwd(function_at(x))(x))(x)
    return np.concatenate([np.asarray(part).reshape(-1, x.size) for part in jax.tree.leaves(parts)])
