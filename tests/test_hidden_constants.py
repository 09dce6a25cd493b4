"""Constants of an input channel that a train-mode norm behind an unpadded first layer hides, named by audit and
certificate."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import leakjax
from leakjax.attacks.certificates.constants import hidden_constants
from leakjax.leakage.structural.index import structural_leaked
from leakjax.segments.chain import read_chain
from leakjax.segments.normalizations import with_normalizations

SHAPE = 7, 7, 2


class Net(nnx.Module):
    def __init__(self, stride, padding):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 6, (3, 3), strides=stride, padding=padding, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6 * (-(-7 // stride) if padding == "SAME" else (7 - 3) // stride + 1) ** 2, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(self.conv(x))).reshape(x.shape[0], -1))


def patterned(x, stride):
    """x with something else added to every channel that repeats every `stride` positions."""
    added = np.random.default_rng(1).uniform(size=(stride, stride, 2))
    return x + np.tile(added, (1, 8, 8, 1))[:, :7, :7]


def problem_of(model, chain, told) -> Any:
    """What a problem holds that the certificate's words are found from."""
    dtype = np.dtype("float32")
    return types.SimpleNamespace(chain=chain, variables=model.variables, dtype=dtype, told=lambda *_: told)


CASES = [(1, "VALID", 2), (2, "VALID", 8), (1, "SAME", 0)]


@pytest.mark.parametrize(("stride", "padding", "hidden"), CASES)
def test_what_the_shapes_say_is_hidden_leaves_no_trace(stride, padding, hidden):
    model, x = leakjax.read_model(Net(stride, padding), train=True), np.random.default_rng(0).uniform(size=(2, *SHAPE))
    chain = read_chain(model, SHAPE, jnp.float32)
    segments = with_normalizations(model, SHAPE, jnp.float32, chain.segments)
    assert [s.geometry.normalization is not None for s in segments] == [False, True, False]
    assert structural_leaked([s.geometry for s in segments]) <= 98 - hidden
    words = hidden_constants(problem_of(model, chain, {}))
    within = {"batch_size": 2, "train": True, "buffers": False, "input_range": (0.0, 2.0)}
    seen = [leakjax.observe(Net(stride, padding), (a, np.array([1, 3])), **within) for a in (x, patterned(x, stride))]
    sizes = [max(float(np.max(np.abs(g))) for g in o.gradients.values()) for o in seen]
    apart = max(float(np.max(np.abs(g - seen[1].gradients[p]))) for p, g in seen[0].gradients.items())
    assert (apart < 1e-10 * sizes[0]) == bool(hidden)
    assert (words is None) == (not hidden)
    assert words is None or "input channels 0, 1" in words


def test_statistics_that_were_sent_hide_nothing():
    model = leakjax.read_model(Net(1, "VALID"), train=True)
    chain = read_chain(model, SHAPE, jnp.float32)
    assert hidden_constants(problem_of(model, chain, {"statistic0": 0.0})) is None


@pytest.mark.parametrize(("stride", "word"), [(1, "a constant added"), (2, "a pattern that repeats")])
def test_the_audit_names_them(stride, word):
    found = leakjax.audit(Net(stride, "VALID"), SHAPE, train=True, shapes_only=True)
    hidden = 2 * stride**2
    assert found.structural_leaked_dimensions <= 98 - hidden
    assert any(word in remark for remark in found.remarks)
    assert word in found.layers[0].sentence
