"""Gradients whose factor no layer shows: nothing is claimed that another factor would contradict."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_nets import one_layer
from test_scales import bias_free, times

from benchmarks.study_judge import judge
from leakjax import InputError, invert, observe
from leakjax.captures.capture import read_capture, write_capture

LABELS = np.array([0, 1, 0])


def noisy(observation, sigma, rng):
    changed = {p: g + sigma * rng.normal(size=g.shape) for p, g in observation.gradients.items()}
    return dataclasses.replace(observation, gradients=changed)


def nothing_wrong(observation, images, labels=LABELS, **options):
    answer = invert(observation, **options)
    assert {v.wrong for v in judge(observation, answer, images, labels)} == {None}
    return answer


@pytest.fixture
def images(rng):
    return rng.uniform(size=(3, 6, 6, 1))


@pytest.mark.parametrize("factor", [0.9, 0.99, 1.3])
def test_a_factor_is_not_taken_for_noise(rng, images, factor):
    sent = times(observe(one_layer(rng, 2, bias=False), (images, LABELS)), factor)
    for certificate in nothing_wrong(sent, images).certificates:
        assert certificate.psnr_estimate is None
        assert "--gradient-scale" in certificate.reason
    assert {c.status for c in nothing_wrong(sent, images, gradient_scale=factor).certificates} == {"exact"}


def test_noise_does_not_hide_the_second_root():
    """Of one label t p(t z) has two roots: without noise the answer is two images, with it none has an estimate."""
    rng = np.random.default_rng(12)
    images = rng.uniform(size=(3, 6, 6, 1))
    one_layer(rng, 2, bias=False)
    model = one_layer(rng, 2, bias=False, activation="leaky_relu")
    for sent, options in (
        (observe(model, (images, LABELS), defense="gaussian:1e-6"), {}),
        (noisy(observe(model, (images, LABELS)), 1e-6, rng), {"gradient_scale": 1}),
    ):
        nothing_wrong(sent, images, **options)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"defense": "gaussian:1e-5"}, 0.7),
        ({"defense": "soteria:0.2"}, 0.8),
        ({"defense": "clip:0.1"}, 0.5),
        ({"local_steps": 2, "learning_rate": 1e-9}, 0.9),
    ],
)
def test_a_defense_says_nothing_of_a_factor(rng, images, options, factor):
    sent = observe(bias_free(rng, 2), (images, LABELS), **options)
    for status in (c.status for c in nothing_wrong(times(sent, factor), images, attack="match").certificates):
        assert status in ("ambiguous", "failed")
    nothing_wrong(sent, images, attack="match")


def test_noise_that_was_told_and_a_factor(rng, images):
    plain = observe(bias_free(rng, 2), (images, LABELS))
    sent = noisy(times(plain, 0.7), 1e-6, rng)
    for attack in ("copa", "match"):
        assert {
            c.psnr_estimate for c in nothing_wrong(sent, images, attack=attack, gradient_noise=1e-6).certificates
        } == {None}
        told = nothing_wrong(sent, images, attack=attack, gradient_noise=1e-6, gradient_scale=0.7)
        assert "approximate" in {c.status for c in told.certificates}


@pytest.mark.parametrize(("dtype", "gap"), [("float64", 24), ("float64", 28), ("float32", 18)])
def test_a_softmax_that_is_nearly_saturated(dtype, gap):
    rng = np.random.default_rng(2)
    apply, params = bias_free(rng, 3)
    images = rng.uniform(size=(1, 6, 6, 1))
    z = np.sort(np.asarray(apply(params, images))[0])
    steep = {**params, "head/w": params["head/w"] * gap / (z[-1] - z[-2])}
    labels = np.array([int(np.argmin(apply(params, images)[0]))])
    sent = observe((apply, steep), (images, labels), dtype=dtype)
    nothing_wrong(times(sent, 0.6), images, labels, attack="copa")
    assert {c.status for c in nothing_wrong(sent, images, labels, attack="copa").certificates} == {"exact"}


def test_noise_and_a_factor_that_would_have_to_be_read_from_it(rng, images):
    plain = observe(bias_free(rng, 4), (images, LABELS))
    for factor in (1.0, 0.6):
        for certificate in nothing_wrong(noisy(times(plain, factor), 1e-4, rng), images).certificates:
            assert certificate.psnr_estimate is None


def test_an_image_that_fills_a_range_without_zero(rng):
    images, labels = rng.uniform(0.5, 1, (1, 6, 6, 1)), np.array([1])
    images.flat[:2] = 0.5, 1.0
    plain = observe(bias_free(rng, 2), (images, labels), input_range=(0.5, 1.0))
    for factor in (1.001, 0.999, 0.995, 0.8):
        nothing_wrong(times(plain, factor), images, labels)


def test_an_image_that_moves_with_the_factor_though_not_along_its_multiples(rng):
    """As many equations as unknowns: some other image has 0.98 of the gradient."""
    params = {"w": rng.normal(size=(3, 3)), "head": rng.normal(size=(3, 2))}
    alpha = jnp.asarray(rng.normal(size=(4, 3)))

    def apply(v, x):
        return jnp.sum(alpha[None] * jnp.tanh(x[..., 0] @ v["w"]), axis=1) @ v["head"]

    images = rng.uniform(size=(1, 4, 3, 1))
    plain = observe((apply, params), (images, np.array([1])))
    for factor in (0.98, 0.9):
        nothing_wrong(times(plain, factor), images, np.array([1]), attack="match")


def test_clipping_is_a_factor_itself_to_an_attack_that_is_not_told(rng, images):
    sent = observe(bias_free(rng, 2), (images, LABELS), defense="clip:0.1")
    with pytest.raises(InputError, match="a factor itself"):
        invert(sent, attack="copa", gradient_scale=1)
    nothing_wrong(sent, images, attack="copa")
    nothing_wrong(sent, images, attack="match")


def test_weight_decay_alone_fails_alone_in_float32(rng, images):
    sent = observe(one_layer(rng, 4), (images, LABELS), dtype="float32", weight_decay=0.01)
    theta = sent.model.params
    changed = {
        p: np.concatenate([g[:2], np.float32(0.01) * np.asarray(theta[p])[None]]) for p, g in sent.gradients.items()
    }
    answer = invert(dataclasses.replace(sent, gradients={p: g.astype(np.float32) for p, g in changed.items()}))
    assert [c.status for c in answer.certificates] == ["exact", "exact", "failed"]
    assert "weight_decay" in answer.certificates[2].reason


def test_labels_beside_a_gradient_of_nothing(rng, images):
    plain = observe(one_layer(rng, 4), (images, LABELS))
    sent = dataclasses.replace(
        plain,
        gradients={p: g * np.array([1, 0, 1]).reshape(-1, *[1] * (g.ndim - 1)) for p, g in plain.gradients.items()},
    )
    assert invert(sent, labels=LABELS).label_sources == ("given", "guessed", "given")
    for labels in (LABELS[:2], LABELS[:, None]):
        with pytest.raises(InputError, match="labels must be 3 integers"):
            invert(sent, labels=labels)


@pytest.mark.parametrize("factors", [[1], "x", 5, None, {1: 0.0}, {1: "a"}, {1: None}])
def test_known_factors_are_a_mapping_of_numbers(rng, images, factors):
    plain = observe(one_layer(rng, 4), (images, LABELS))
    with pytest.raises(InputError, match=r"observation\.factors"):
        dataclasses.replace(plain, factors=factors)


def test_one_output_and_a_slope_of_one_number(rng, images, tmp_path):
    """A parameter of one number is no bias that shows the factor."""
    apply, params = bias_free(rng, 1)
    model = (lambda v, x: v["slope"][None] * apply(v, x), {**params, "slope": np.ones(1)})
    plain = observe(model, (images, LABELS), loss="sigmoid_binary_cross_entropy")
    write_capture(plain, tmp_path / "c.npz")
    assert read_capture(tmp_path / "c.npz", plain.model).factors == plain.factors
