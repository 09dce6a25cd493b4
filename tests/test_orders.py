"""PyTorch modules of one shape that are defined in another order than they are used."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_torch_capture import SHAPE, conv, leaky, softmax

import leakjax
from leakjax.captures.orders import MOST_ORDERS, reorderings
from leakjax.interop.torch import read_torch_capture
from leakjax.models.reader import read_model

LABEL = 2


class Three(nnx.Module):
    """Three convolutions, the last two of one shape."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 6, (3, 3), padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(6, 6, (3, 3), padding=1, rngs=rngs)
        self.conv3 = nnx.Conv(6, 6, (3, 3), padding=1, rngs=rngs)
        self.head = nnx.Linear(480, 4, rngs=rngs)

    def __call__(self, x):
        for layer in (self.conv1, self.conv2, self.conv3):
            x = jax.nn.leaky_relu(layer(x), 0.2)
        return self.head(x.reshape(x.shape[0], -1))


def forward(state, x):
    for name in ("first", "second", "third"):
        x = conv(x, state[f"{name}.weight"], 1, 1) + state[f"{name}.bias"][None, :, None, None]
        x = leaky(0.2)(x)
    return x.reshape(1, -1) @ state["head.weight"].T + state["head.bias"][None]


@pytest.fixture
def capture(tmp_path, rng):
    def make(order, dtype=np.float64):
        shapes = {"first": (6, 3, 3, 3), "second": (6, 6, 3, 3), "third": (6, 6, 3, 3), "head": (4, 480)}
        state = {}
        for name, shape in shapes.items():
            bound = 1 / np.sqrt(np.prod(shape[1:]))
            state[f"{name}.weight"] = rng.uniform(-bound, bound, shape).astype(dtype)
            state[f"{name}.bias"] = rng.uniform(-bound, bound, shape[0]).astype(dtype)
        x = rng.random(SHAPE)
        image = jnp.asarray(np.moveaxis(x, -1, 0)[None], dtype)
        gradient = jax.jit(jax.grad(lambda state: softmax(forward(state, image), LABEL)))(state)
        names = [f"{name}.{leaf}" for name in order for leaf in ("weight", "bias")]
        meta = {"loss": "softmax_cross_entropy", "input_shape": list(SHAPE), "input_range": [0, 1]}
        arrays = {"names": np.array(names), "meta": np.array(json.dumps(meta))}
        arrays |= {f"param/{k}": v for k, v in state.items()}
        arrays |= {f"grad/{k}": np.asarray(v) for k, v in gradient.items()}
        np.savez(tmp_path / "c.npz", **arrays)
        return read_torch_capture(tmp_path / "c.npz", read_model(Three())), x

    return make


def decibel(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


def test_the_right_order_needs_no_words(capture):
    observation, x = capture(("first", "second", "third", "head"))
    assert observation.interchangeable == (("conv2", "conv3"),)
    found = leakjax.invert(observation)
    assert found.remarks == ()
    assert found.certificates[0].status == "exact"
    assert decibel(found.images[0], x) > 150


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_order_that_the_gradient_is_consistent_with_is_found(capture, dtype):
    observation, x = capture(("first", "third", "second", "head"), dtype)
    found = leakjax.invert(observation)
    assert found.certificates[0].status != "failed"
    assert decibel(found.images[0], x) > 70
    (remark,) = found.remarks
    assert "conv2 has the weights read for conv3" in remark


def test_layers_that_could_be_exchanged_are_named_where_no_order_helps(capture):
    observation, _ = capture(("first", "second", "third", "head"))
    gradients = dict(observation.gradients)
    gradients["conv3/kernel"] = gradients["conv3/kernel"][:, ::-1]
    spoiled = dataclasses.replace(observation, gradients=gradients)
    certificate = leakjax.invert(spoiled, attack="rgap").certificates[0]
    assert certificate.status == "failed"
    assert "conv2, conv3 have one shape" in certificate.reason


@pytest.mark.parametrize("sizes", [(2,), (3, 2), (5,), (40,), (4, 4, 12)])
def test_the_orders_tried_are_few_and_differ(capture, sizes):
    observation, _ = capture(("first", "second", "third", "head"))
    names = iter(range(99))
    groups = tuple(tuple(f"layer{next(names)}" for _ in range(size)) for size in sizes)
    told = dataclasses.replace(observation, interchangeable=groups)
    found = [moved for moved, _ in reorderings(told)]
    assert 0 < len(found) < MOST_ORDERS
    assert len({tuple(sorted(moved.items())) for moved in found}) == len(found)
    for moved in found:
        assert sorted(moved) == sorted(moved.values())
    assert len(found) == {(2,): 1, (3, 2): 11, (5,): 10}.get(sizes, MOST_ORDERS - 1)
