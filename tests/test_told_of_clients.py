"""What is told of the clients besides their gradient: noise, weight decay, the pixels' normalization."""

import dataclasses
import json

import numpy as np
import pytest

import leakjax
from leakjax.captures.capture import read_capture, write_capture
from leakjax.errors import InputError
from leakjax.report.reconstruction.record import unit_scale

DRAW = np.random.default_rng(3)
SHAPE = (4, 4, 3)
PARAMS = {
    "w": DRAW.normal(size=(48, 60)) / 7,
    "b": DRAW.normal(size=60) / 9,
    "v": DRAW.normal(size=(60, 5)) / 8,
    "c": DRAW.normal(size=5) / 9,
}
IMAGES, LABELS = DRAW.uniform(size=(2, *SHAPE)), np.array([1, 4])
NET = """
import numpy as np
import jax.numpy as jnp


def net():
    draw = np.random.default_rng(3)
    params = {"w": draw.normal(size=(48, 60)) / 7, "b": draw.normal(size=60) / 9}
    params |= {"v": draw.normal(size=(60, 5)) / 8, "c": draw.normal(size=5) / 9}
    return (lambda p, x: jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]), params
"""
WORDS = ("--model", "told_net:net", "--input-shape", "4,4,3")


def apply(p, x):
    import jax.numpy as jnp

    return jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]


MODEL = leakjax.read_model(apply, PARAMS)


def decibel(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


@pytest.fixture
def words(folder):
    (folder / "told_net.py").write_text(NET)
    np.savez(folder / "small.npz", images=(255 * IMAGES).round().astype(np.uint8), labels=LABELS)
    return (*WORDS, "--images", "small.npz")


def answer(run, *words):
    return json.loads(run("invert", *words, "--json", "--out", "out").stdout)


def test_the_noise_is_told_on_the_command_line(run, words):
    assert answer(run, *words)["gradient_noise"] is None
    report = answer(run, *words, "--gradient-noise", "1e-6")
    assert report["gradient_noise"] == 1e-6
    assert report["examples"][0]["certificate"]["status"] == "approximate"


def test_weight_decay_is_added_and_subtracted():
    plain = leakjax.observe(MODEL, (IMAGES, LABELS))
    decayed = leakjax.observe(MODEL, (IMAGES, LABELS), weight_decay=0.1)
    for path, theta in PARAMS.items():
        np.testing.assert_allclose(decayed.gradients[path], plain.gradients[path] + 0.1 * theta[None])
    told = leakjax.invert(decayed)
    assert [c.status for c in told.certificates] == ["exact"] * 2
    assert decibel(told.images, IMAGES) > 200
    untold = leakjax.invert(dataclasses.replace(decayed, weight_decay=0.0))
    assert {c.status for c in untold.certificates} <= {"failed", "approximate"}  # random weights look like noise


def test_weight_decay_goes_with_the_capture(tmp_path, run, words):
    decayed = leakjax.observe(MODEL, (IMAGES, LABELS), weight_decay=0.01)
    write_capture(decayed, tmp_path / "c.npz")
    assert read_capture(tmp_path / "c.npz", MODEL).weight_decay == 0.01
    for given in ((), ("--weight-decay", "0.01")):
        report = answer(run, *WORDS, "--capture", "c.npz", *given)
        assert report["weight_decay"] == 0.01
        assert {e["certificate"]["status"] for e in report["examples"]} == {"exact"}
    refused = run("invert", *WORDS, "--capture", "c.npz", "--weight-decay", "0.02")
    assert refused.exit_code == 2
    assert "contradicts the capture's own 0.01" in refused.stderr


def test_weight_decay_is_told_of_a_capture_without_it(tmp_path, run, words):
    decayed = leakjax.observe(MODEL, (IMAGES, LABELS), weight_decay=0.01)
    write_capture(dataclasses.replace(decayed, weight_decay=0.0), tmp_path / "c.npz")
    report = answer(run, *WORDS, "--capture", "c.npz", "--weight-decay", "0.01")
    assert {e["certificate"]["status"] for e in report["examples"]} == {"exact"}


def test_weight_decay_that_the_command_line_captures(run, folder, words):
    assert run("capture", *words, "--weight-decay", "0.02", "--out", "out").exit_code == 0
    with np.load(folder / "out/capture.npz") as file:
        assert json.loads(str(file["meta"]))["weight_decay"] == 0.02
    report = answer(run, *words, "--weight-decay", "0.02", "--index", "0,1")
    assert {e["certificate"]["status"] for e in report["examples"]} == {"exact"}


def test_weight_decay_and_nothing_else_is_refused():
    gradients = {p: 0.5 * theta[None] for p, theta in PARAMS.items()}
    observation = dataclasses.replace(leakjax.observe(MODEL, (IMAGES, LABELS)), gradients=gradients, weight_decay=0.5)
    with pytest.raises(InputError, match=r"weight_decay 0\.5"):
        leakjax.invert(observation)


MEAN, STD = (0.485, 0.456, 0.406), (0.6, 0.224, 0.05)
NORMALIZED = (IMAGES - np.array(MEAN)) / np.array(STD)
TYPED = ("--input-mean", ",".join(map(str, MEAN)), "--input-std", ",".join(map(str, STD)))


def normalized(**options):
    return leakjax.observe(MODEL, (NORMALIZED, LABELS), input_mean=MEAN, input_std=STD, **options)


def test_pixels_are_normalized_channel_by_channel():
    observation = normalized()
    low, high = observation.limits
    np.testing.assert_allclose(low * STD + MEAN, 0, atol=1e-12)
    np.testing.assert_allclose(high * STD + MEAN, 1)
    assert observation.input_range == (low.min(), high.max())
    found = leakjax.invert(observation)
    assert [c.status for c in found.certificates] == ["exact"] * 2
    assert decibel(unit_scale(found.images, observation.limits), IMAGES) > 200
    with pytest.raises(InputError, match=r"those of channel 2 would be in"):
        leakjax.observe(MODEL, (NORMALIZED, LABELS), input_mean=MEAN, input_std=STD[::-1])


def test_an_answer_outside_one_channels_range_is_none():
    observation = normalized()
    hull = dataclasses.replace(observation, input_mean=None, input_std=None)
    outside = NORMALIZED.copy()
    outside[..., 0] = outside[..., 1]  # in the hull of all channels, not in the first one's
    gradients = leakjax.observe(MODEL, (outside, LABELS), input_range=hull.input_range).gradients
    assert leakjax.invert(dataclasses.replace(hull, gradients=gradients)).certificates[0].status == "exact"
    told = leakjax.invert(dataclasses.replace(observation, gradients=gradients))
    assert [c.status for c in told.certificates] == ["failed"] * 2


def test_the_estimate_is_of_pixels_between_0_and_1():
    observation = normalized(defense="gaussian:1e-4")
    found = leakjax.invert(observation)
    pictures = unit_scale(found.images, observation.limits)
    for k, certificate in enumerate(found.certificates):
        assert certificate.status == "approximate"
        assert abs(certificate.psnr_estimate - decibel(pictures[k], IMAGES[k])) < 3


def test_the_normalization_goes_with_the_capture(run, folder, words):
    assert run("capture", *words, *TYPED, "--out", "out").exit_code == 0
    with np.load(folder / "out/capture.npz") as file:
        meta = json.loads(str(file["meta"]))
    assert (tuple(meta["input_mean"]), tuple(meta["input_std"])) == (MEAN, STD)
    np.savez(folder / "first.npz", images=(255 * IMAGES[:1]).round().astype(np.uint8), labels=LABELS[:1])
    for given in ((*WORDS, "--capture", "out/capture.npz", "--truth", "first.npz"), (*words, *TYPED)):
        report = answer(run, *given)
        assert (tuple(report["input_mean"]), tuple(report["input_std"])) == (MEAN, STD)
        assert report["input_range"] == meta["input_range"]
        assert report["examples"][0]["psnr"] > 200
    answer(run, *WORDS, "--capture", "out/capture.npz", *TYPED)
    for typed in ((*TYPED[:3], "1"), ("--input-mean", "0", *TYPED[2:])):
        refused = run("invert", *WORDS, "--capture", "out/capture.npz", *typed)
        assert refused.exit_code == 2
        assert "contradicts the capture's own" in refused.stderr


def test_one_number_goes_for_all_channels(run, words):
    report = answer(run, *words, "--input-mean", "0.5", "--input-std", "0.25")
    assert report["input_range"] == [-2, 2]
    assert report["input_mean"] == [0.5] * 3
    assert report["examples"][0]["psnr"] > 200
