"""Full gradient matching: batches, labels as counts, symmetries, and honest certificates."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pull_back import SHAPE, convolve, network, psnr

from leakjax import InputError, invert, observe
from leakjax.attacks.adaptive import Sent
from leakjax.attacks.certificates.certificate import certify, certify_together
from leakjax.attacks.certificates.symmetries import twins
from leakjax.attacks.heads.labels import likely_counts
from leakjax.attacks.problem import Problem
from leakjax.client.update import mean_loss
from leakjax.report.pairing import pair_with_truth
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing.network import Network, batch_gradient, read_network


def batch(count, seed=0):
    return np.random.default_rng(seed).uniform(size=(count, *SHAPE))


def test_the_network_s_gradient_is_the_client_s():
    apply, params = network(jnp.tanh, filters=9)
    images, labels = batch(3), np.array([0, 2, 2])
    observation = observe((apply, params), (images, labels), batch_size=3)
    with compute_in("float64"):
        read = read_network(observation.model, SHAPE, 3, jnp.float64)
        gradient = batch_gradient(read.logits, "softmax_cross_entropy", tuple(params))
        found = gradient(dict(observation.model.variables), jnp.asarray(images), jnp.asarray(labels))
        direct = jax.grad(mean_loss(observation.model, "softmax_cross_entropy"))(
            dict(observation.model.params), {}, jnp.asarray(images), jnp.asarray(labels)
        )
    for path in params:
        np.testing.assert_allclose(found[path], direct[path], rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found[path], observation.gradients[path][0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("count", "labels"), [(1, [4]), pytest.param(3, [0, 3, 1], marks=pytest.mark.slow), (2, [2, 2])]
)
def test_a_batch_comes_back_from_noise(count, labels):
    model = network(jnp.tanh, filters=12)
    images = batch(count)
    observation = observe(model, (images, np.array(labels)), batch_size=count)
    answer = invert(observation, attack="match")
    assert sorted(answer.labels) == sorted(labels)
    assert psnr(answer.images, pair_with_truth(images, answer.images, count)) > 180
    for certificate in answer.certificates:
        assert (certificate.status, certificate.leaked_dimensions, certificate.unknowns) == (
            "exact",
            count * 128,
            count * 128,
        )
    assert np.all(answer.determined == 1)


def test_several_gradients_of_batches_keep_their_order():
    model = network(jnp.tanh, filters=12)
    images, labels = batch(4), np.array([0, 1, 2, 3])
    observation = observe(model, (images, labels), batch_size=2)
    answer = invert(observation, attack="match", labels=labels, starts=2)
    assert answer.label_source == "given"
    assert psnr(answer.images, pair_with_truth(images, answer.images, 2)) > 180
    with pytest.raises(InputError, match="labels must be 4 integers"):
        invert(observation, attack="match", labels=labels[:2])
    with pytest.raises(InputError, match="starts must be a positive integer"):
        invert(observation, attack="match", starts=0)


@pytest.mark.slow
def test_a_model_that_is_no_chain_is_matched_too():
    """Two examples meet in train-mode batch norm, and attention mixes all places: no segment could say so."""

    def apply(p, x):
        h = jnp.tanh(convolve(x, p["a"], 1, "SAME"))
        h = (h - h.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(h.var((0, 1, 2), keepdims=True) + 1e-3)
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        h = h + jax.nn.softmax(h @ jnp.swapaxes(h, 1, 2) / 8) @ h
        return h.reshape(h.shape[0], -1) @ p["c"] + p["d"][None]

    rng = np.random.default_rng(1)
    params = {"a": rng.normal(0, 0.3, (3, 3, 2, 16)), "c": rng.normal(0, 0.05, (1024, 5)), "d": rng.normal(0, 0.1, 5)}
    images = batch(2)
    answer = invert(observe((apply, params), (images, np.array([3, 1])), batch_size=2), attack="match")
    assert sorted(answer.labels) == [1, 3]
    assert psnr(answer.images, pair_with_truth(images, answer.images, 2)) > 120


def test_what_a_gradient_does_not_determine_is_counted():
    def apply(p, x):
        return jnp.tanh(convolve(x, p["a"], 1, "VALID")).reshape(x.shape[0], -1) @ p["c"] + p["d"][None]

    rng = np.random.default_rng(1)
    params = {"a": rng.normal(0, 0.3, (3, 3, 2, 1)), "c": rng.normal(0, 0.2, (36, 5)), "d": rng.normal(0, 0.1, 5)}
    answer = invert(observe((apply, params), (batch(1), np.array([3]))), attack="match")
    (certificate,) = answer.certificates
    assert certificate.status == "ambiguous"
    assert certificate.leaked_dimensions == 36 + 18 - 1
    np.testing.assert_allclose(answer.determined.sum(), 53, atol=1e-6)


@pytest.mark.slow
def test_an_odd_network_s_other_answer_is_known():
    """z(-x) = -z(x) and one logit: -x with the other label has the very same gradient."""

    def apply(p, x):
        return jnp.tanh(jnp.tanh(convolve(x, p["a"], 1, "SAME")).reshape(x.shape[0], -1) @ p["c"])

    rng = np.random.default_rng(1)
    params = {"a": rng.normal(0, 0.3, (3, 3, 2, 9)), "c": rng.normal(0, 0.2, (576, 1))}
    images = batch(1) - 0.5
    options = {"loss": "sigmoid_binary_cross_entropy"}
    inside = observe((apply, params), (images, np.array([1])), input_range=(-0.5, 0.5), **options)
    answer = invert(inside, attack="match")
    assert answer.certificates[0].status == "ambiguous"
    assert sorted(c.label for c in answer.candidates[0]) == [0, 1]
    assert max(psnr(c.image, images[0]) for c in answer.candidates[0]) > 180
    outside = observe((apply, params), (images + 0.5, np.array([1])), **options)
    answer = invert(outside, attack="match")
    assert answer.certificates[0].status == "exact"
    assert psnr(answer.images, images + 0.5) > 180


def test_the_second_root_of_a_homogeneous_network():
    """u -> u' with u / (1 + e^u) the same: a scaled image with the same gradient, found from the logit alone."""

    def logits(p, x):
        return jnp.where(x > 0, x, 0.2 * x).reshape(x.shape[0], -1) @ p["c"]

    params = {"c": jnp.asarray(np.random.default_rng(3).normal(size=(4, 1)))}
    x = np.array([[0.3, 0.1, 0.2, 0.4]])
    x *= 0.5 / float(logits(params, np.abs(x))[0, 0])  # u = 0.5 for label 1: a second root is near 2.5
    gradient = batch_gradient(logits, "sigmoid_binary_cross_entropy", ("c",))
    others = twins(logits, gradient, "sigmoid_binary_cross_entropy", params, x, np.array([1]), 1e-9)
    assert others
    for other, labels in others:
        assert not np.allclose(other, x)
        np.testing.assert_allclose(gradient(params, other, labels)["c"], gradient(params, x, np.array([1]))["c"])


def test_counts_are_whole_and_the_nearest_come_first():
    found = likely_counts(np.array([1.9, 0.2, -0.3, 1.1]), 3, 5)
    assert [counts.sum() for counts in found] == [3] * 5
    assert all(counts.min() >= 0 for counts in found)
    np.testing.assert_array_equal(found[0], [2, 0, 0, 1])
    assert len({tuple(c) for c in found}) == 5


def test_pairing_is_by_least_error_within_each_gradient(rng):
    truth = rng.uniform(size=(6, 2, 2, 1))
    shuffled = truth[[2, 0, 1, 5, 4, 3]] + 0.01
    np.testing.assert_array_equal(pair_with_truth(truth, shuffled, 3), truth[[2, 0, 1, 5, 4, 3]])
    np.testing.assert_array_equal(pair_with_truth(truth, shuffled, 1), truth)


def two_answers(monkeypatch, ranks):
    """Certificates of one gradient of two examples, from two answers, each outside the range in one of them."""
    module = importlib.import_module("leakjax.attacks.matching.outcome")
    answers = iter([(rank, np.full((2, 1, 1, 2), rank / 4), 1.0) for rank in ranks])
    monkeypatch.setattr(module, "_local_rank", lambda *_: next(answers))
    monkeypatch.setattr(module, "twins", lambda *_: [])
    monkeypatch.setattr(module, "same_open_set", lambda *_: False)
    monkeypatch.setattr(module, "predicted", lambda _: None)
    inside, outside = np.full((1, 1, 2), 0.5), np.full((1, 1, 2), 3.0)
    trials = [
        module.Found(np.stack(pair), np.array([0, 1]), 0.0, 0) for pair in ((inside, outside), (outside, 0.4 * inside))
    ]
    problem = Problem(
        chain=None,
        network=Network(lambda *_: None, np.float64, has_kinks=False),
        variables={},
        gradients={"w": np.ones((1, 1))},
        loss="squared_error",
        input_shape=(1, 1, 2),
        input_range=(0.0, 1.0),
        labels=None,
        dtype=np.float64,
        noise=1e-16,
        examples=2,
    )
    told = module.Told(Sent({}, {}), matched=1e-6)
    outcomes = module.matched_outcomes(problem, told, trials)
    return certify_together([certify(problem, outcome, 4) for outcome in outcomes], outcomes, 2)


def test_answers_of_a_batch_stand_and_fall_as_a_whole(monkeypatch):
    certificates = two_answers(monkeypatch, [4, 4])
    assert "exact" not in [c.status for c in certificates]


def test_an_undetermined_answer_among_several_is_not_exact(monkeypatch):
    for ranks in ([4, 2], [2, 4]):
        assert [c.status for c in two_answers(monkeypatch, ranks)] == ["ambiguous", "ambiguous"]
