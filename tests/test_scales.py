"""Gradients times a factor, sums, unequal weights, targets that are no labels, and wrong counts of examples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_nets import one_layer
from test_property import psnr

from leakjax import InputError, invert, observe

LABELS = np.array([1, 3, 2])


def times(observation, factor):
    return dataclasses.replace(observation, gradients={p: factor * g for p, g in observation.gradients.items()})


def weighted(model, images, targets, weights):
    """sum_b weights_b dL_b/dtheta, in float64, with a leading victim axis."""
    apply, params = model

    def loss(p):
        each = jax.vmap(optax.softmax_cross_entropy)(apply(p, jnp.asarray(images)), jnp.asarray(targets))
        return jnp.sum(jnp.asarray(weights) * each)

    found = jax.grad(loss)({p: jnp.asarray(a) for p, a in params.items()})
    return {p: np.asarray(g)[None] for p, g in found.items()}


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "squared_error"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_factor_of_a_gradient_is_read_with_its_labels(rng, loss, bias):
    images = rng.uniform(size=(3, 6, 6, 1))
    plain = observe(one_layer(rng, 4, bias=bias), (images, LABELS), loss=loss)
    for factor in (1.0, 0.01, -0.1, 32.0):
        answer = invert(times(plain, factor), attack="rgap")
        np.testing.assert_allclose(answer.gradient_scale, factor, rtol=1e-5)
        assert [c.status for c in answer.certificates] == ["exact"] * 3
        np.testing.assert_array_equal(answer.labels, LABELS)
        assert set(answer.label_sources) == {"recovered"}
        assert min(psnr(found, truth) for found, truth in zip(answer.images, images, strict=True)) > 120


@pytest.mark.parametrize(("outputs", "loss"), [(2, "softmax_cross_entropy"), (1, "sigmoid_binary_cross_entropy")])
def test_with_two_labels_factor_and_label_are_known_together_only(rng, outputs, loss):
    images = rng.uniform(size=(1, 6, 6, 1))
    plain = observe(one_layer(rng, outputs), (images, np.array([1])), loss=loss)
    answer = invert(times(plain, -0.1), attack="rgap")
    assert answer.certificates[0].status == "ambiguous"
    assert sorted(c.label for c in answer.candidates[0]) == [0, 1]
    assert answer.label_sources == ("guessed",)
    assert psnr(answer.images, images) > 200
    told = invert(times(plain, -0.1), attack="rgap", labels=np.array([1]))
    assert told.certificates[0].status == "exact"
    np.testing.assert_allclose(told.gradient_scale, -0.1)


@pytest.mark.parametrize("attack", ["copa", "match"])
@pytest.mark.parametrize("target", [[0.92, 0.02, 0.02, 0.02, 0.02], [0.5, 0.0, 0.5, 0.0, 0.0]])
def test_a_target_that_is_no_label_is_returned_instead(rng, attack, target):
    images, model = rng.uniform(size=(1, 6, 6, 1)), one_layer(rng, 5)
    observation = observe(model, (images, np.array([1])))
    sent = weighted(model, images, np.array([target]), np.ones(1))
    answer = invert(dataclasses.replace(observation, gradients=sent), attack=attack)
    assert (answer.labels[0], answer.label_sources) == (-1, ("target",))
    np.testing.assert_allclose(answer.targets[0], target, atol=1e-10)
    assert answer.certificates[0].status == "exact"
    assert psnr(answer.images, images) > 200


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.8, 0.2), (-0.05, -0.05)])
def test_examples_that_are_summed_or_weighted_come_back_with_their_weights(rng, weights):
    images, model = rng.uniform(size=(2, 6, 6, 1)), one_layer(rng, 6)
    labels = np.array([1, 4])
    observation = observe(model, (images, labels), batch_size=2)
    sent = weighted(model, images, np.eye(6)[labels], np.array(weights))
    answer = invert(dataclasses.replace(observation, gradients=sent), attack="copa")
    assert [c.status for c in answer.certificates] == ["exact", "exact"]
    order = np.argsort(answer.labels)
    np.testing.assert_array_equal(answer.labels[order], labels)
    np.testing.assert_allclose(answer.gradient_scale[order], 2 * np.array(weights), rtol=1e-6)
    assert min(psnr(found, truth) for found, truth in zip(answer.images[order], images, strict=True)) > 150


def test_the_rank_of_the_head_says_how_many_examples_there_are(rng):
    images, model = rng.uniform(size=(3, 6, 6, 1)), one_layer(rng, 6)
    pair = observe(model, (images[:2], np.array([1, 4])), batch_size=2)
    (certificate,) = invert(dataclasses.replace(pair, examples=1), attack="rgap").certificates
    assert certificate.status == "failed"
    assert "give examples=2" in certificate.reason
    three = observe(model, (images, np.array([1, 4, 1])), batch_size=3)
    certificates = invert(dataclasses.replace(three, examples=2), attack="copa").certificates
    assert all("give examples=3" in c.reason for c in certificates)
    with pytest.raises(InputError, match="its rank is 2"):
        invert(dataclasses.replace(pair, examples=3), attack="copa")


def test_clipping_of_the_norm_is_a_factor_to_layer_wise_attacks(rng):
    images = rng.uniform(size=(1, 6, 6, 1))
    observation = observe(one_layer(rng, 5), (images, np.array([2])), defense="clip:0.1")
    answer = invert(observation, attack="copa")
    assert answer.certificates[0].status == "exact"
    assert answer.gradient_scale[0] < 1
    assert psnr(answer.images, images) > 200
