"""Bounds of whole networks with train-mode norms, by shapes, against ranks of their Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from leakjax.leakage.structural.index import structural_leaked
from leakjax.models.reader import read_model
from leakjax.segments.chain import read_chain
from leakjax.segments.normalizations import with_normalizations


class Network(nnx.Module):
    """Convolutions (filters, size, stride, padding, norm) with tanh, and a dense head."""

    def __init__(self, side, channels, layers, rngs):
        self.layers, self.norms = nnx.List([]), nnx.List([])
        for filters, size, stride, padding, norm in layers:
            strides = {"strides": stride, "padding": padding}
            self.layers.append(nnx.Conv(channels, filters, (size, size), rngs=rngs, **strides))
            self.norms.append(self.norm(norm, filters, rngs))
            side = -(-side // stride) if padding == "SAME" else (side - size) // stride + 1
            channels = filters
        self.head = nnx.Linear(side * side * channels, 5, rngs=rngs)

    def norm(self, kind, filters, rngs):
        if kind == "batch":
            return nnx.BatchNorm(filters, use_running_average=False, rngs=rngs)
        if kind == "layer":
            return nnx.LayerNorm(filters, rngs=rngs)
        return nnx.GroupNorm(filters, num_groups=filters if kind == "instance" else 1, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = jnp.tanh(norm(layer(x)))
        return self.head(x.reshape(len(x), -1))


def random_network(rng):
    """(side, channels, layers) of one or two layers, each output at least 2 wide."""
    side, channels, layers = int(rng.integers(5, 7)), int(rng.integers(1, 4)), []
    left = side
    for _ in range(int(rng.integers(1, 3))):
        size, stride, padding = int(rng.integers(1, 4)), int(rng.integers(1, 3)), str(rng.choice(["SAME", "VALID"]))
        smaller = -(-left // stride) if padding == "SAME" else (left - size) // stride + 1
        if smaller < 2:
            break
        left, kind = smaller, str(rng.choice(["batch", "batch", "layer", "group", "instance"]))
        layers.append((int(rng.integers(2, 9)), size, stride, padding, kind))
    return side, channels, layers


def measured(model, x, labels):
    """The rank of the gradient's Jacobian: singular values above 1e-10 of the largest. Gradients that are rounding, as
    those of biases before a norm, have rows of no size."""

    def gradient(x):
        def loss(params):
            logits = model.apply({**model.buffers, **params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        parts = jax.grad(loss)(dict(model.params)).values()
        sizes = [jnp.maximum(jnp.linalg.norm(jnp.ravel(jax.lax.stop_gradient(a))), 1e-3) for a in parts]
        return jnp.concatenate([jnp.ravel(a) / size for a, size in zip(parts, sizes, strict=True)])

    jacobian = np.asarray(jax.jit(jax.jacfwd(gradient))(x)).reshape(-1, x.size)
    values = np.linalg.svd(np.linalg.qr(jacobian, mode="r"), compute_uv=False)
    return int(np.sum(values > 1e-10 * values[0]))


@pytest.mark.parametrize("seeds", [range(1, 3), range(100, 112)], ids=["1-3", "100-112"])
def test_random_networks_tell_no_more_than_their_shapes(seeds):
    met = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        side, channels, layers = random_network(rng)
        examples, shape = int(rng.integers(1, 3)), (side, side, channels)
        with jax.enable_x64(True):
            model = read_model(Network(side, channels, layers, nnx.Rngs(seed))).astype(np.float64)
            params = {
                p: jnp.asarray(rng.normal(size=a.shape) * 0.5 + p.endswith("scale")) for p, a in model.params.items()
            }
            model = model.with_arrays(params, model.buffers)
            segments = read_chain(model, shape, jnp.float64, 1, checked=False).segments
            geometries = [s.geometry for s in with_normalizations(model, shape, jnp.float64, segments)]
            bound = structural_leaked(geometries, examples=examples)
            x, labels = rng.normal(size=(examples, *shape)), rng.integers(0, 5, examples)
            rank = measured(model, jnp.asarray(x), jnp.asarray(labels))
        assert rank <= bound <= examples * np.prod(shape), (seed, layers, examples, rank, bound)
        met += rank == bound
    assert met >= len(seeds) // 3


class Pair(nnx.Module):
    """A dense layer and a batch norm of two numbers a channel."""

    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(20, 9, rngs=rngs), nnx.BatchNorm(9, use_running_average=False, rngs=rngs)
        self.head = nnx.Linear(9, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.dense(x))))


def test_two_numbers_a_channel_still_tell_their_difference(rng):
    """Epsilon leaves some of dL/dz in the direction (1, -1), which the kernel's gradient shows."""
    with jax.enable_x64(True):
        model = read_model(Pair(nnx.Rngs(0))).astype(np.float64)
        segments = read_chain(model, (20,), jnp.float64, 1, checked=False).segments
        geometries = [s.geometry for s in with_normalizations(model, (20,), jnp.float64, segments)]
        bound = structural_leaked(geometries, examples=2)
        rank = measured(model, jnp.asarray(rng.normal(size=(2, 20))), jnp.array([1, 3]))
    assert rank == 20 <= bound <= 40
