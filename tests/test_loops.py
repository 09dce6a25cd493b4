"""Loops: iterations that are layers, weights that are stacked or tied, recurrent nets; judged by the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import leakjax
from leakjax import InputError
from leakjax.metrics import psnr
from leakjax.report.names import shortened
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing import evaluation, jaxprs

SHAPE = (4, 4, 3)
LABELS = np.array([1, 3])


@pytest.fixture
def images(rng):
    return rng.uniform(0.1, 0.9, (2, *SHAPE))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(60)(x)), None


class Scanned(linen.Module):
    """Three layers of one kind, their weights stacked."""

    remat: bool = False

    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(60)(x.reshape(len(x), -1)))
        block = linen.remat(Block) if self.remat else Block
        scan = linen.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return linen.Dense(5)(scan(name="layers")(x, None)[0])


def initialized(module):
    with compute_in("float32"):
        return module, module.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))


@pytest.mark.parametrize("remat", [False, True])
def test_each_iteration_over_stacked_weights_is_a_layer(remat, images):
    model = initialized(Scanned(remat))
    observation = leakjax.observe(model, (images, LABELS))
    result = leakjax.invert(observation)
    assert [c.status for c in result.certificates] == ["exact", "exact"]
    assert result.labels.tolist() == LABELS.tolist()
    assert min(float(psnr(a, b)) for a, b in zip(result.images, images, strict=True)) > 200
    names = [info.name for info in result.layers[0]]
    assert names == ["Dense_0", *(f"layers/Dense_0[{i}]" for i in range(3)), "Dense_1"]
    audit = leakjax.audit(model, SHAPE, images=images[:1], labels=LABELS[:1], noise=())
    assert [layer.name for layer in audit.layers] == names
    assert audit.leaked_dimensions == 48


def test_rows_of_a_stack_that_are_taken_one_by_one_are_layers(rng, images):
    params = {
        "first": rng.normal(size=(48, 60)) / 7,
        "bias": rng.normal(size=60) / 9,
        "stack": rng.normal(size=(2, 60, 60)) / 8,
        "head": rng.normal(size=(60, 5)) / 8,
        "shift": np.zeros(5),
    }

    def apply(p, x):
        x = jnp.tanh(x.reshape(len(x), -1) @ p["first"] + p["bias"][None])
        for k in range(2):
            x = jnp.tanh(x @ p["stack"][k])
        return x @ p["head"] + p["shift"][None]

    result = leakjax.invert(leakjax.observe((apply, params), (images, LABELS)))
    assert [c.status for c in result.certificates] == ["exact", "exact"]
    assert [info.name for info in result.layers[0]][1:3] == ["stack[0]", "stack[1]"]


class Tied(linen.Module):
    @linen.compact
    def __call__(self, x):
        dense = linen.Dense(48)
        return linen.Dense(5)(jnp.tanh(dense(jnp.tanh(dense(x.reshape(len(x), -1))))))


def test_tied_weights_are_matched_as_one_map(images):
    observation = leakjax.observe(initialized(Tied()), (images[:1], LABELS[:1]))
    with pytest.raises(InputError, match="attack='match'"):
        leakjax.invert(observation)
    result = leakjax.invert(observation, attack="match", starts=2)
    if result.certificates[0].status == "exact":
        assert float(psnr(result.images[0], images[0])) > 100


class Recurrent(linen.Module):
    """A state that begins in float32, whatever the weights are in."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(5)(linen.RNN(linen.SimpleCell(24))(x.reshape(len(x), 4, 12)).reshape(len(x), -1))


def test_a_recurrent_net_is_inverted_in_the_attacks_dtype(images):
    model = initialized(Recurrent())
    with pytest.raises(InputError, match='dtype="float32"'):
        leakjax.observe(model, (images, LABELS))
    observation = leakjax.observe(model, (images[:1], LABELS[:1]), dtype="float32")
    result = leakjax.invert(observation)
    assert result.images.dtype == np.float64
    assert result.certificates[0].status in ("exact", "approximate")
    assert float(psnr(result.images[0], images[0])) > 90


@pytest.mark.parametrize("reverse", [False, True])
def test_an_unrolled_loop_is_the_loop(reverse, rng):
    def function(variables, x):
        def body(carry, row):
            weight, k = row
            carry = jnp.tanh(carry @ weight + k)
            return carry, carry.sum()

        last, sums = jax.lax.scan(body, x, (variables[0], jnp.arange(3.0)), reverse=reverse)
        return last * sums[0] - sums[2]

    weights, x = jnp.asarray(rng.normal(size=(3, 4, 4))), jnp.asarray(rng.normal(size=(2, 4)))
    graph = jaxprs.trace(function, [weights], x)
    assert "scan" not in {e.name for e in graph.equations}
    env = {graph.variables[0]: weights, graph.input: x}
    found = evaluation.evaluate(graph.needed(graph.output, list(env)), env, graph.output, {})
    np.testing.assert_allclose(found, function([weights], x), rtol=1e-5)


def test_names_lose_what_they_share_and_are_cut_from_the_left():
    assert shortened(["net/a/conv", "net/a/norm+net/a/scale", "net/b"]) == ["a/conv", "a/norm+a/scale", "b"]
    assert shortened(["net/conv"]) == ["net/conv"]
    assert shortened(["conv1", "conv2"]) == ["conv1", "conv2"]
    assert shortened(["x" * 50, "y"], 10) == [".." + "x" * 8, "y"]
