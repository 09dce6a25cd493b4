"""Gradients times a factor, sums, unequal weights, targets that are no labels, and wrong counts of examples."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from small_nets import one_layer
from test_property import psnr

from benchmarks.study_judge import judge
from leakjax import InputError, invert, observe, undetermined_directions
from leakjax.captures.capture import read_capture, write_capture
from leakjax.report.reconstruction.figure import draw_figure
from leakjax.report.reconstruction.record import RunInfo, build_report, unit_scale, write_report
from leakjax.report.reconstruction.table import print_report

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


def bias_free(rng, outputs, activation=jax.nn.leaky_relu):
    params = {"hidden/w": rng.normal(size=(36, 60)) / 6, "head/w": rng.normal(size=(60, outputs)) / 5}
    return lambda v, x: activation(x.reshape(len(x), -1) @ v["hidden/w"]) @ v["head/w"], params


@pytest.mark.parametrize("attack", ["copa", "match"])
@pytest.mark.parametrize(("outputs", "loss"), [(2, "softmax_cross_entropy"), (1, "sigmoid_binary_cross_entropy")])
def test_where_no_layer_shows_the_factor_all_multiples_of_an_image_are_open(rng, outputs, loss, attack):
    images, labels = rng.uniform(size=(2, 6, 6, 1)), np.array([0, 1])
    plain = observe(bias_free(rng, outputs), (images, labels), loss=loss)
    for factor in (0.7, 1.3, -1.0):
        sent = times(plain, factor)
        answer = invert(sent, attack=attack)
        assert {c.status for c in answer.certificates} == {"ambiguous"}
        assert {c.symmetry for c in answer.certificates} == {"multiples"}
        assert "tell the factor" in answer.certificates[0].reason
        assert set(answer.label_sources) == {"guessed"}
        assert {v.wrong for v in judge(sent, answer, images, labels)} == {None}
        for k, certificate in enumerate(answer.certificates):
            assert len(undetermined_directions(sent, answer, k)) == 36 - certificate.leaked_dimensions
        told = invert(sent, attack=attack, gradient_scale=factor)
        np.testing.assert_allclose(told.gradient_scale, factor)
        for k, candidates in enumerate(told.candidates):  # one root t of t p(t z), or two
            assert max(psnr(c.image, images[k]) for c in candidates if c.label == labels[k]) > 150
            assert told.certificates[k].status == ("exact" if len(candidates) == 1 else "ambiguous")
            assert told.certificates[k].symmetry is None
    assert not any(c.symmetry for c in invert(plain, attack=attack).certificates)


def test_a_saturated_softmax_shows_no_factor_either(rng):
    apply, params = bias_free(rng, 4)
    steep = apply, {**params, "head/w": params["head/w"] * np.array([30.0, 30.0, -30.0, -30.0])}
    images, labels = rng.uniform(size=(2, 6, 6, 1)), np.array([0, 1])
    for factor in (0.6, 1.5):
        sent = times(observe(steep, (images, labels)), factor)
        verdicts = judge(sent, invert(sent, attack="copa"), images, labels)
        assert {v.wrong for v in verdicts} == {None}


def test_a_layer_behind_which_the_factor_shows_leaves_no_multiples(rng):
    images, labels = rng.uniform(size=(2, 6, 6, 1)), np.array([0, 1])
    sent = times(observe(bias_free(rng, 2, jnp.tanh), (images, labels)), 0.7)
    for certificate in invert(sent, attack="copa").certificates:
        assert certificate.status == "failed"
        assert "multiplied by a factor" in certificate.reason
    told = invert(sent, attack="copa", gradient_scale=0.7)
    assert {c.status for c in told.certificates} == {"exact"}


def test_a_capture_says_what_its_gradient_was_multiplied_by(rng, tmp_path):
    images, labels = rng.uniform(size=(2, 6, 6, 1)), np.array([0, 1])
    plain = observe(bias_free(rng, 2), (images, labels))
    for name, sent, symmetry in (("plain", plain, None), ("times", times(plain, 0.7), "multiples")):
        write_capture(sent, tmp_path / f"{name}.npz")
        with np.load(tmp_path / f"{name}.npz") as file:
            assert ("gradient_scale" in str(file["meta"])) == (name == "plain")
        read = read_capture(tmp_path / f"{name}.npz", sent.model)
        assert {c.symmetry for c in invert(read).certificates} == {symmetry}


@pytest.mark.parametrize("factor", [0, 0.0, np.nan, np.inf, "1", True, [1.0], 1e-200])
def test_a_factor_is_a_number_other_than_zero(rng, factor):
    observation = observe(one_layer(rng, 4), (rng.uniform(size=(1, 6, 6, 1)), np.array([1])))
    with pytest.raises(InputError, match="gradient_scale must be a number other than 0"):
        invert(observation, gradient_scale=factor)


@pytest.mark.parametrize("size", [1, 2])
def test_a_gradient_of_nothing_fails_alone(rng, size):
    images, labels = rng.uniform(size=(3 * size, 6, 6, 1)), np.tile([1, 3, 2], size)
    observation = observe(one_layer(rng, 6), (images, labels), batch_size=size)
    for factor in (0.0, 1e-170):
        weights = np.array([1.0, factor, 1.0])
        sent = {p: g * weights.reshape(-1, *[1] * (g.ndim - 1)) for p, g in observation.gradients.items()}
        answer = invert(dataclasses.replace(observation, gradients=sent), labels=labels if size == 1 else None)
        statuses = np.array([c.status for c in answer.certificates]).reshape(3, size)
        assert set(statuses[1]) == {"failed"}
        assert set(statuses[[0, 2]].ravel()) == {"exact"}
        assert "zero everywhere" in answer.certificates[size].reason
        assert answer.labels[size] == -1
        assert answer.images.shape == images.shape
        assert psnr(answer.images[-size:].mean(axis=0), images[-size:].mean(axis=0)) > 150


def test_the_report_of_a_gradient_of_nothing(rng, tmp_path):
    observation = observe(one_layer(rng, 4), (rng.uniform(size=(2, 6, 6, 1)), np.array([1, 3])))
    sent = {p: g * np.array([1.0, 0.0]).reshape(-1, *[1] * (g.ndim - 1)) for p, g in observation.gradients.items()}
    observation = dataclasses.replace(observation, gradients=sent)
    answer = invert(observation)
    report = build_report(RunInfo("own", "tanh", 0), observation, answer)
    write_report(tmp_path, report, answer)
    print_report(Console(file=(tmp_path / "table").open("w")), report)
    pictures = unit_scale(answer.images, observation.limits)
    draw_figure(tmp_path / "figure.png", report, pictures, None, answer.determined)
    assert [e["certificate"]["status"] for e in json.loads((tmp_path / "report.json").read_text())["examples"]] == [
        "exact",
        "failed",
    ]


@pytest.mark.parametrize("attack", ["copa", "match"])
@pytest.mark.parametrize("target", [[0.92, 0.02, 0.02, 0.02, 0.02], [0.5, 0.0, 0.5, 0.0, 0.0]])
def test_a_target_that_is_no_label_is_returned_instead(rng, attack, target):
    images, model = rng.uniform(size=(1, 6, 6, 1)), one_layer(rng, 5)
    observation = observe(model, (images, np.array([1])))
    sent = weighted(model, images, np.array([target]), np.ones(1))
    other = dataclasses.replace(observation, gradients=sent)
    answer = invert(other, attack=attack, gradient_scale=1.0)
    assert (answer.labels[0], answer.label_sources) == (-1, ("target",))
    np.testing.assert_allclose(answer.targets[0], target, atol=1e-10)
    untold = invert(other, attack=attack)  # p - dz / c is a target for every c
    assert (untold.labels[0], untold.label_sources, untold.targets[0]) == (-1, ("open",), None)
    for found in (answer, untold):
        assert found.certificates[0].status == "exact"
        assert psnr(found.images, images) > 200


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
