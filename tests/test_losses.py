"""Losses: names with parameters, functions, targets of any kind, and what comes back of each, judged by the truth."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_nets import one_layer

import leakjax
from leakjax import InputError
from leakjax.captures import read_capture, write_capture
from leakjax.metrics import psnr
from leakjax.models.losses import LOSSES, loss_name, read_loss
from leakjax.models.targets import read_targets

OUTPUTS = 5


def distilled(outputs, teacher):
    return 4 * optax.softmax_cross_entropy(outputs / 2, teacher)


def scaled(outputs, label):
    return 3 * optax.softmax_cross_entropy_with_integer_labels(outputs, label)


def targets_of(rng, kind, count=2):
    return {
        "class": rng.integers(0, OUTPUTS, count),
        "several": np.array([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]])[:count],
        "soft": rng.dirichlet(np.ones(OUTPUTS), count),
        "numbers": rng.normal(size=(count, OUTPUTS)),
    }[kind]


CASES = [
    ("softmax_cross_entropy", "class"),
    ("softmax_cross_entropy:label_smoothing=0.1", "class"),
    ("softmax_cross_entropy:class_weights=1/2/3/1/0.5", "class"),
    ("sigmoid_focal_loss:gamma=2,alpha=0.25", "class"),
    ("poly_loss_cross_entropy:epsilon=1", "class"),
    ("hinge_loss", "class"),
    ("multiclass_hinge_loss", "class"),
    (scaled, "class"),
    ("sigmoid_binary_cross_entropy", "several"),
    ("sigmoid_focal_loss", "several"),
    ("hinge_loss", "several"),
    (distilled, "soft"),
    ("softmax_cross_entropy", "soft"),
    ("squared_error", "numbers"),
    ("log_cosh", "numbers"),
]


def client(rng, loss, kind, *, bias, activation="tanh"):
    apply, params = one_layer(rng, OUTPUTS, bias=bias, activation=activation)
    while True:
        images, targets = rng.uniform(0.1, 0.9, (2, 6, 6, 1)), targets_of(rng, kind)
        with contextlib.suppress(InputError):  # a hinge of which the margin is met has no gradient
            return images, targets, leakjax.observe((apply, params), (images, targets), loss=loss)


def came_back(result, images):
    return [float(psnr(a, b)) for a, b in zip(result.images, images, strict=True)]


@pytest.mark.parametrize(("loss", "kind"), CASES, ids=[f"{loss_name(loss)}-{kind}" for loss, kind in CASES])
def test_with_a_bias_image_and_target_come_back_whatever_the_loss_is(loss, kind, rng):
    images, targets, observation = client(rng, loss, kind, bias=True)
    result = leakjax.invert(observation)
    assert [c.status for c in result.certificates] == ["exact", "exact"]
    assert min(came_back(result, images)) > 150
    if kind == "class":
        assert result.labels.tolist() == targets.tolist()
        assert result.label_sources == ("recovered",) * 2
    else:
        assert result.labels.tolist() == [-1, -1]
        assert result.label_sources == ("target",) * 2
        np.testing.assert_allclose(np.stack(result.targets), targets, atol=1e-7)  # pyright: ignore[reportArgumentType]
    unknown = leakjax.invert(dataclasses.replace(observation, loss="unknown"))
    assert [c.status for c in unknown.certificates] == ["exact", "exact"]
    assert min(came_back(unknown, images)) > 150


@pytest.mark.parametrize(("loss", "kind"), [case for case in CASES if case[1] in ("class", "several")])
def test_without_a_bias_the_loss_says_the_scale(loss, kind, rng):
    images, targets, observation = client(rng, loss, kind, bias=False)
    result = leakjax.invert(observation, gradient_scale=1.0)
    for k, certificate in enumerate(result.certificates):
        shown = [float(psnr(c.image, images[k])) for c in result.candidates[k]]
        assert certificate.status in ("exact", "ambiguous")
        assert max(shown) > 150
        if certificate.status == "exact":
            told = result.labels[k] if kind == "class" else result.targets[k]
            np.testing.assert_array_equal(told, targets[k])


@pytest.mark.parametrize("kind", ["soft", "numbers"])
def test_without_a_bias_free_targets_leave_the_brightness_open(kind, rng):
    """On a homogeneous network every multiple has this gradient, and the certificate says so; the target decides."""
    loss = "softmax_cross_entropy" if kind == "soft" else "squared_error"
    images, targets, observation = client(rng, loss, kind, bias=False, activation="leaky_relu")
    result = leakjax.invert(observation)
    for k, certificate in enumerate(result.certificates):
        assert certificate.status == "ambiguous"
        assert certificate.symmetry == "multiples"
        assert "targets" in str(certificate.reason)
        best = [c.image.ravel() @ images[k].ravel() / np.linalg.norm(c.image) for c in result.candidates[k]]
        assert max(best) > (1 - 1e-9) * np.linalg.norm(images[k])
        assert result.images[k].min() >= -1e-9
        assert result.images[k].max() <= 1 + 1e-9
    assert result.label_sources == ("open",) * 2
    given = leakjax.invert(observation, labels=targets)
    assert [c.status for c in given.certificates] == ["exact", "exact"]
    assert min(came_back(given, images)) > 150
    assert given.label_sources == ("given",) * 2


def autoencoder(rng, *, bias):
    apply, params = one_layer(rng, 36, bias=bias, activation="tanh" if bias else "leaky_relu")
    return lambda p, x: apply(p, x).reshape(x.shape), params


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", ["squared_error", "huber_loss:delta=0.1"])
def test_an_autoencoder_is_compared_with_its_input(loss, bias, rng):
    images = rng.uniform(0.1, 0.9, (2, 6, 6, 1))
    observation = leakjax.observe(autoencoder(rng, bias=bias), (images, images), loss=loss)
    assert (observation.target, observation.target_shape) == ("input", (6, 6, 1))
    result = leakjax.invert(observation)
    assert [c.status for c in result.certificates] == ["exact", "exact"]
    assert min(came_back(result, images)) > 150
    other = dataclasses.replace(observation, gradients={p: 1.3 * g for p, g in observation.gradients.items()})
    found = leakjax.invert(other)  # a factor that nobody told is another brightness, where no bias shows dL/dz
    assert [c.status for c in found.certificates] == ["failed" if bias else "ambiguous"] * 2
    if not bias:
        assert {c.symmetry for c in found.certificates} == {"multiples"}
        told = leakjax.invert(other, gradient_scale=1.3)
        assert [c.status for c in told.certificates] == ["exact", "exact"]
        assert min(came_back(told, images)) > 150


def test_a_target_that_others_explain_as_well_is_not_claimed(rng):
    """Beyond delta a Huber loss shows the side of its target alone."""
    images, _, observation = client(rng, "huber_loss:delta=0.05", "numbers", bias=True)
    result = leakjax.invert(observation)
    assert min(came_back(result, images)) > 150
    assert [target is None for target in result.targets] == [True, True]
    assert result.label_sources == ("open", "open")


@pytest.mark.parametrize(("loss", "kind"), [case for case in CASES if case[1] != "class"])
def test_no_target_is_claimed_that_another_factor_would_change(loss, kind, rng):
    """-0.4 g: the image does not depend on the factor, numbers do, and so do bits of which both signs fit."""
    images, targets, observation = client(rng, loss, kind, bias=True)
    other = dataclasses.replace(observation, gradients={p: -0.4 * g for p, g in observation.gradients.items()})
    result = leakjax.invert(other)
    assert min(came_back(result, images)) > 150
    for k, (target, source) in enumerate(zip(result.targets, result.label_sources, strict=True)):
        assert source in (("open",) if kind != "several" else ("open", "target"))
        if target is not None:
            np.testing.assert_array_equal(target, targets[k])
            assert abs(result.gradient_scale[k] + 0.4) < 1e-9
    told = leakjax.invert(other, gradient_scale=-0.4)
    np.testing.assert_allclose(np.stack(told.targets), targets, atol=1e-7)  # pyright: ignore[reportArgumentType]


def nothing_false(result, images):
    """Claims judged by the truth: `exact` is 90 dB and more, estimates hold within 3.5 dB, `failed` has no target."""
    for k, certificate in enumerate(result.certificates):
        reached = float(psnr(result.images[k], images[k]))
        if certificate.status == "exact":
            assert reached > 90
        if certificate.psnr_estimate is not None:
            assert abs(reached - certificate.psnr_estimate) < 3.5
        assert certificate.status != "failed" or (result.targets[k] is None and result.label_sources[k] == "guessed")


NOISY = [
    ("squared_error", "numbers"),
    ("softmax_cross_entropy", "soft"),
    ("sigmoid_binary_cross_entropy", "several"),
]


@pytest.mark.parametrize(("loss", "kind"), NOISY)
@pytest.mark.parametrize("bias", [True, False])
def test_noise_leaves_no_false_word_of_images_or_targets(loss, kind, bias, rng):
    activation = "tanh" if bias else "leaky_relu"
    apply, params = one_layer(rng, OUTPUTS, bias=bias, activation=activation)
    images, targets = rng.uniform(0.1, 0.9, (2, 6, 6, 1)), targets_of(rng, kind)
    observation = leakjax.observe((apply, params), (images, targets), loss=loss, defense="gaussian:1e-4")
    for told in (loss, "unknown"):
        result = leakjax.invert(dataclasses.replace(observation, loss=told))
        nothing_false(result, images)
        known = bias or (kind == "several" and told != "unknown")
        assert {c.status for c in result.certificates} <= ({"approximate"} if known else {"failed", "ambiguous"})
        if told == loss and kind != "several":
            assert [target is None for target in result.targets] == [True, True]


@pytest.mark.parametrize("bias", [True, False])
def test_an_autoencoder_under_noise(bias, rng):
    images = rng.uniform(0.1, 0.9, (2, 6, 6, 1))
    given = autoencoder(rng, bias=bias), (images, images)
    observation = leakjax.observe(*given, loss="squared_error", defense="gaussian:1e-4")
    result = leakjax.invert(observation)
    nothing_false(result, images)
    assert {c.status for c in result.certificates} == {"approximate" if bias else "failed"}


def test_rounded_gradients_and_free_targets(rng):
    for bias in (True, False):
        apply, params = one_layer(rng, OUTPUTS, bias=bias, activation="leaky_relu")
        images, targets = rng.uniform(0.1, 0.9, (2, 6, 6, 1)), targets_of(rng, "numbers")
        result = leakjax.invert(
            leakjax.observe((apply, params), (images, targets), loss="squared_error", dtype="float32")
        )
        nothing_false(result, images)
        assert {c.status for c in result.certificates} == {"exact" if bias else "ambiguous"}


@pytest.mark.parametrize("seed", range(4))
def test_several_labels_and_a_factor_that_nobody_told(seed):
    """Without a bias dL/dz is known up to a factor: its sign decides the labels, its size the brightness."""
    rng = np.random.default_rng(seed)
    images, targets, observation = client(rng, "sigmoid_binary_cross_entropy", "several", bias=False)
    other = dataclasses.replace(observation, gradients={p: -0.4 * g for p, g in observation.gradients.items()})
    result = leakjax.invert(other)
    for k, certificate in enumerate(result.certificates):
        shown = [float(psnr(c.image, images[k])) for c in result.candidates[k]]
        if certificate.status == "exact":
            assert shown[0] > 150
            np.testing.assert_array_equal(result.targets[k], targets[k])
        if certificate.status == "ambiguous" and certificate.symmetry is None:
            assert max(shown) > 150


@pytest.mark.parametrize("bias", [True, False])
def test_a_capture_of_numbers_keeps_the_factor_that_tells_them(bias, rng, tmp_path):
    activation = "tanh" if bias else "leaky_relu"
    _, targets, observation = client(rng, "squared_error", "numbers", bias=bias, activation=activation)
    write_capture(observation, tmp_path / "c.npz")
    again = read_capture(tmp_path / "c.npz", observation.model)
    here, there = (leakjax.invert(one) for one in (observation, again))
    assert [c.status for c in here.certificates] == [c.status for c in there.certificates]
    assert here.label_sources == there.label_sources == (("target",) * 2 if bias else ("open",) * 2)
    if bias:
        np.testing.assert_allclose(np.stack(there.targets), targets, atol=1e-7)  # pyright: ignore[reportArgumentType]


def test_a_given_number_has_two_images_where_the_network_is_homogeneous(rng):
    """(z - t) z has one value at z and at t - z: both images are shown, whatever the attack."""
    apply, params = one_layer(rng, 1, bias=False, activation="leaky_relu")
    images = rng.uniform(0.2, 0.8, (1, 6, 6, 1))
    outputs = float(np.asarray(apply(params, jnp.asarray(images))).ravel()[0])
    targets = np.array([[2.3 * outputs]])  # t - z = 1.3 z: 1.3 x is an image as well
    observation = leakjax.observe((apply, params), (images, targets), loss="squared_error", input_range=(0.0, 1.5))
    for attack in ("copa", "match"):
        result = leakjax.invert(observation, labels=targets, attack=attack)
        assert result.certificates[0].status in ("ambiguous", "failed")
        if result.certificates[0].status == "ambiguous":
            shown = [float(psnr(c.image, images[0])) for c in result.candidates[0]]
            assert max(shown) > 90
            assert len(shown) > 1


def test_sums_and_weights_of_examples(rng):
    apply, params = one_layer(rng, OUTPUTS)
    images, labels = rng.uniform(0.1, 0.9, (2, 6, 6, 1)), np.array([0, 3])
    mean, total, weights = (
        leakjax.observe((apply, params), (images, labels), batch_size=2, reduction=r)
        for r in ("mean", "sum", [1.0, 2.0])
    )
    for path, g in mean.gradients.items():
        np.testing.assert_allclose(total.gradients[path], 2 * g, rtol=1e-12)
    assert total.reduction == "sum"
    each = [leakjax.observe((apply, params), (images[k : k + 1], labels[k : k + 1])).gradients["c"] for k in range(2)]
    np.testing.assert_allclose(weights.gradients["c"], (each[0] + 2 * each[1]) / 2, rtol=1e-12)
    for observation in (mean, total):
        result = leakjax.invert(observation)
        order = np.argsort(result.labels)
        assert min(came_back(dataclasses.replace(result, images=result.images[order]), images)) > 100


def test_a_capture_holds_no_code(rng, tmp_path):
    images, _, observation = client(rng, distilled, "soft", bias=True)
    write_capture(observation, tmp_path / "c.npz")
    with pytest.raises(InputError, match="function that the file does not hold"):
        read_capture(tmp_path / "c.npz", observation.model)
    for loss in (distilled, "unknown"):
        again = read_capture(tmp_path / "c.npz", observation.model, loss=loss)
        assert (again.target, again.target_shape) == ("probabilities", (OUTPUTS,))
        assert min(came_back(leakjax.invert(again), images)) > 150


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_optaxs_own(loss, rng):
    z, y = jnp.asarray(rng.normal(size=OUTPUTS)), 3
    hot = jax.nn.one_hot(y, OUTPUTS, dtype=z.dtype)
    expected = {
        "softmax_cross_entropy": lambda: optax.softmax_cross_entropy(z, hot),
        "sigmoid_binary_cross_entropy": lambda: optax.sigmoid_binary_cross_entropy(z, hot).sum(),
        "squared_error": lambda: optax.squared_error(z, hot).mean(),
        "l2_loss": lambda: optax.l2_loss(z, hot).mean(),
        "huber_loss": lambda: optax.huber_loss(z, hot).mean(),
        "log_cosh": lambda: optax.log_cosh(z, hot).mean(),
        "sigmoid_focal_loss": lambda: optax.sigmoid_focal_loss(z, hot).sum(),
        "poly_loss_cross_entropy": lambda: optax.losses.poly_loss_cross_entropy(z, hot),
        "hinge_loss": lambda: optax.hinge_loss(z, 2 * hot - 1).sum(),
        "multiclass_hinge_loss": lambda: optax.losses.multiclass_hinge_loss(z, jnp.asarray(y)),
    }[loss]()
    np.testing.assert_allclose(LOSSES[loss](z, y), expected, rtol=1e-12)


def test_parameters_are_optaxs_own(rng):
    z, y = jnp.asarray(rng.normal(size=OUTPUTS)), 1
    hot = jax.nn.one_hot(y, OUTPUTS, dtype=z.dtype)
    smooth = optax.softmax_cross_entropy(z, optax.smooth_labels(hot, 0.3))
    np.testing.assert_allclose(read_loss("softmax_cross_entropy:label_smoothing=0.3")(z, y), smooth, rtol=1e-12)
    weighted = read_loss("softmax_cross_entropy:class_weights=1/7/1/1/1")(z, y)
    np.testing.assert_allclose(weighted, 7 * optax.softmax_cross_entropy(z, hot), rtol=1e-12)
    focal = read_loss("sigmoid_focal_loss:gamma=1,alpha=0.3")(z, y)
    np.testing.assert_allclose(focal, optax.sigmoid_focal_loss(z, hot, alpha=0.3, gamma=1).sum(), rtol=1e-12)
    maps = jnp.asarray(rng.normal(size=(4, 3, OUTPUTS)))
    classes = jnp.asarray(rng.integers(0, OUTPUTS, (4, 3)))
    everywhere = optax.softmax_cross_entropy_with_integer_labels(maps, classes).mean()
    np.testing.assert_allclose(read_loss("softmax_cross_entropy")(maps, classes), everywhere, rtol=1e-12)


BAD = [
    ("softmax_cross_entropy:label_smoothing=1", "label_smoothing must be a number from 0 below 1"),
    ("softmax_cross_entropy:label_smoothing=x", "label_smoothing must be a number"),
    ("softmax_cross_entropy:gamma=1", "takes label_smoothing=VALUE, class_weights=VALUE"),
    ("softmax_cross_entropy:class_weights=1/2", "class_weights must hold 5 numbers"),
    ("hinge_loss:margin=1", "takes no parameters"),
    ("huber_loss:delta=1/2", "delta is one number"),
    ("unknown", "needs the loss that the client takes"),
    ("softmax", "did you mean"),
    (lambda outputs, label: outputs - label, "one real number an example"),
    (optax.squared_error, "cannot take outputs of shape"),
    (lambda outputs: outputs.sum(), "must be a name"),
]


@pytest.mark.parametrize(("loss", "words"), BAD)
def test_a_loss_that_cannot_be_is_one_clear_error(loss, words, rng):
    apply, params = one_layer(rng, OUTPUTS)
    with pytest.raises(InputError, match=words) as caught:
        leakjax.observe((apply, params), (np.full((1, 6, 6, 1), 0.5), np.array([1])), loss=loss)
    assert len(str(caught.value).splitlines()) == 1


def test_batches_need_targets_that_are_no_classes(rng):
    apply, params = one_layer(rng, OUTPUTS)
    images, targets = rng.uniform(size=(2, 6, 6, 1)), targets_of(rng, "numbers")
    observation = leakjax.observe((apply, params), (images, targets), loss="squared_error", batch_size=2)
    with pytest.raises(InputError, match="give them"):
        leakjax.invert(observation)


def test_targets_are_read_by_their_shape():
    images = np.full((2, 4, 4, 1), 0.5)
    kinds = {
        "class": (np.array([0, 2]), (3,)),
        "several": (np.array([[0, 1, 1], [1, 0, 0]]), (3,)),
        "values": (np.zeros((2, 3)), (3,)),
        "classes": (np.zeros((2, 4, 4), int), (4, 4, 3)),
        "input": (images, (4, 4, 1)),
    }
    for kind, (given, outputs) in kinds.items():
        assert read_targets(given, images, outputs).kind == kind


def test_an_audit_takes_any_loss(rng):
    images = rng.uniform(0.1, 0.9, (1, 6, 6, 1))
    for loss, labels in (("squared_error", images), (lambda a, b: jnp.sum((a - b) ** 4), "input")):
        model = autoencoder(rng, bias=True)
        found = leakjax.audit(model, (6, 6, 1), images=images, labels=labels, loss=loss, noise=())
        assert found.leaked_dimensions == 36
    with pytest.raises(InputError, match="give images and labels"):
        leakjax.audit(one_layer(rng, OUTPUTS), (6, 6, 1), loss=lambda z, y: jnp.sum((z - y["a"]) ** 2), noise=())
