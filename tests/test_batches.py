"""Gradients of several examples, inverted layer by layer: the head separates them, the recursion does the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_heads import observed
from test_match import batch
from test_pull_back import network, psnr

from leakjax import InputError, invert, observe
from leakjax.attacks.heads.batch import read_dense_head, separate_examples
from leakjax.models.losses import LOSSES
from leakjax.models.reader import read_model
from leakjax.report.pairing import pair_with_truth
from leakjax.segments.chain import read_segments

ACTIVATIONS = {"tanh": jnp.tanh, "leaky_relu": lambda z: jax.nn.leaky_relu(z, 0.2), "relu": jax.nn.relu}
SIZE = 9


def head_gradient(kind, loss, x, labels, outputs, rng):
    """A dense head, its kernel stored in several ways, as (segment for the batch, variables, mean gradients)."""
    kernel, bias = rng.normal(0, 0.5, (SIZE, outputs)), rng.normal(0, 0.3, outputs)
    order = rng.permutation(SIZE)
    params = {"kernel": kernel.T if kind == "transposed" else kernel}
    if kind != "no bias":
        params["bias"] = bias

    def apply(p, x):
        w = p["kernel"].T if kind == "transposed" else p["kernel"]
        z = (x[:, order] if kind == "permuted" else x) @ w
        return z + p["bias"][None] if "bias" in p else z

    model = read_model((apply, params)).astype(jnp.float64)

    def value(p):
        return jnp.mean(jax.vmap(LOSSES[loss])(apply(p, x), jnp.asarray(labels)))

    gradients = {path: np.asarray(g) for path, g in jax.grad(value)(dict(model.params)).items()}
    (segment,) = read_segments(model, (SIZE,), jnp.float64, len(x)).segments
    return segment, model, gradients


def separate(segment, model, gradients, loss, labelings):
    head = read_dense_head(segment, model.variables, loss)
    options = {"labelings": labelings, "rounding": 2e-16, "accept": 1e-6}
    return separate_examples(head, model.variables, gradients, loss, **options)


@pytest.mark.parametrize("kind", ["plain", "no bias", "transposed", "permuted"])
@pytest.mark.parametrize("labels", [[0, 1, 2], [3, 3, 4], [1, 1, 1]])
def test_a_head_separates_its_examples(kind, labels, rng):
    x = rng.uniform(size=(3, SIZE))
    segment, model, gradients = head_gradient(kind, "softmax_cross_entropy", x, labels, 6, rng)
    wrong = np.array([5, 5, 5])
    (head,) = separate(segment, model, gradients, "softmax_cross_entropy", [wrong, np.array(labels)])
    np.testing.assert_array_equal(head.labels, labels)
    truth = x[[np.argmin(np.linalg.norm(x - found, axis=1)) for found in head.x]]
    assert len(np.unique(truth, axis=0)) == 3
    np.testing.assert_allclose(head.x, truth, atol=1e-7)
    error = np.linalg.norm(head.x - truth) / np.linalg.norm(truth)
    assert error <= 100 * head.condition * max(head.residual, 2e-16)


@pytest.mark.parametrize("loss", ["sigmoid_binary_cross_entropy", "squared_error"])
def test_other_losses(loss, rng):
    x = rng.uniform(size=(2, SIZE))
    segment, model, gradients = head_gradient("plain", loss, x, [2, 0], 5, rng)
    heads = separate(segment, model, gradients, loss, [np.array([0, 2])])
    assert min(np.abs(head.x - x[::-1]).max() for head in heads) < 1e-8


@pytest.mark.parametrize("examples", ["as many as outputs", "two alike"])
def test_a_head_that_cannot_separate_them_says_so(examples, rng):
    x = (
        rng.uniform(size=(6, SIZE))
        if examples == "as many as outputs"
        else np.tile(rng.uniform(size=(1, SIZE)), (2, 1))
    )
    labels = np.arange(len(x)) if len(x) == 6 else np.array([1, 1])
    segment, model, gradients = head_gradient("plain", "softmax_cross_entropy", x, labels, 6, rng)
    assert separate(segment, model, gradients, "softmax_cross_entropy", [labels]) is None


@pytest.mark.parametrize("bias", [True, False])
def test_dense_layers_give_a_batch_back(bias, rng):
    images = rng.uniform(size=(2, 4, 3, 1))
    answer = invert(observed(bias, images, [2, 2], batch_size=2), attack="rgap")
    assert psnr(answer.images, pair_with_truth(images, answer.images, 2)) > 150
    assert [c.status for c in answer.certificates] == ["exact", "exact"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batches_of_convolutions(activation):
    model = network(ACTIVATIONS[activation], filters=24)
    images, labels = batch(4), np.array([0, 3, 2, 2])
    answer = invert(observe(model, (images, labels), batch_size=2), attack="copa")
    assert [sorted(answer.labels[:2]), sorted(answer.labels[2:])] == [[0, 3], [2, 2]]
    assert psnr(answer.images, pair_with_truth(images, answer.images, 2)) > 150
    assert [c.status for c in answer.certificates] == ["exact"] * 4
    assert {c.unknowns for c in answer.certificates} == {2 * 128}


def test_match_refines_what_the_layers_gave():
    model = network(ACTIVATIONS["leaky_relu"], filters=16)
    images, labels = batch(3), np.array([4, 1, 1])
    answer = invert(observe(model, (images, labels), batch_size=3), attack="match")
    assert psnr(answer.images, pair_with_truth(images, answer.images, 3)) > 200
    assert [c.status for c in answer.certificates] == ["exact"] * 3


@pytest.mark.slow
def test_the_prior_chooses_for_every_image_of_a_batch():
    """One filter does not determine the images: matched all the same, and nothing claimed."""
    model = network(jnp.tanh, filters=1)
    images, labels = batch(3), np.arange(3)
    answer = invert(observe(model, (images, labels), batch_size=3), attack="copa")
    assert {c.status for c in answer.certificates} == {"ambiguous"}
    assert np.all(answer.gradient_residual < 1e-9)
    assert psnr(answer.images, pair_with_truth(images, answer.images, 3)) < 60


def test_a_batch_that_no_head_separates_names_the_remedy(rng):
    images = np.tile(rng.uniform(size=(1, 4, 3, 1)), (2, 1, 1, 1))
    for attack in ("rgap", "copa", "hybrid"):
        with pytest.raises(InputError, match=r'does not separate the 2 examples.*use attack="match"'):
            invert(observed(True, images, [1, 1], batch_size=2), attack=attack)


@pytest.mark.parametrize("outputs", [3, 4])
def test_as_many_equations_as_unknowns_are_refused(outputs, rng):
    """Without a bias, softmax and one example fewer than outputs: isolated roots, but several."""
    count = outputs - 1
    x, labels = rng.uniform(size=(count, SIZE)), np.arange(count)
    segment, model, gradients = head_gradient("no bias", "softmax_cross_entropy", x, labels, outputs, rng)
    assert separate(segment, model, gradients, "softmax_cross_entropy", [labels]) is None
    segment, model, gradients = head_gradient("plain", "softmax_cross_entropy", x, labels, outputs, rng)
    (head,) = separate(segment, model, gradients, "softmax_cross_entropy", [labels])
    assert np.abs(head.x - x[[np.argmin(np.linalg.norm(x - f, axis=1)) for f in head.x]]).max() < 1e-7


def odd_net(mixing, outputs, rng):
    params = {"a": rng.normal(0, 0.5, (12, 30)), "w": rng.normal(0, 0.5, (30, outputs))}

    def apply(p, x):
        h = jnp.tanh(x.reshape(len(x), -1) @ p["a"])
        return (h - 0.5 * jnp.mean(h, axis=0, keepdims=True) if mixing else h) @ p["w"]

    return apply, params


@pytest.mark.parametrize(("mixing", "outputs"), [(False, 2), (True, 1), (False, 1)])
def test_flipped_signs_and_labels_are_never_exact(mixing, outputs, rng):
    options = {"loss": "sigmoid_binary_cross_entropy", "input_range": (-3.0, 3.0), "batch_size": 2}
    images, labels = rng.uniform(-1, 1, (2, 4, 3, 1)), np.array([0, 1])
    observation = observe(odd_net(mixing, outputs, rng), (images, labels), **options)
    answer = invert(observation, attack="match")
    for b in range(2):
        errors = [min(np.abs(c.image - x).max() for c in answer.candidates[b]) for x in images]
        assert answer.certificates[b].status != "exact" or min(errors) < 1e-6
    if outputs == 2:
        with pytest.raises(InputError, match="does not separate the 2 examples"):
            invert(observation, attack="copa")
