"""A target is told only where no other explains the gradient: losses that hide it, judged by the truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_nets import one_layer

import leakjax
from leakjax import InputError
from leakjax.attacks.heads.unique import solve_bits
from leakjax.metrics import psnr


def of_teacher_logits(outputs, teacher):
    return -jnp.sum(jax.nn.softmax(teacher) * jax.nn.log_softmax(outputs))


def of_squares(outputs, target):
    return jnp.sum((outputs - target**2) ** 2)


def periodic(outputs, target):
    return jnp.sum(jnp.cos(9 * (outputs - target)))


def clipped(outputs, target):
    return jnp.sum(jnp.clip(outputs - target, -0.3, 0.3) ** 2)


def of_signs(outputs, target):
    return jnp.sum(jnp.abs(outputs - target))


def times(observation, factor):
    return dataclasses.replace(observation, gradients={p: factor * g for p, g in observation.gradients.items()})


def is_exact(result, images):
    assert {c.status for c in result.certificates} == {"exact"}
    return min(float(psnr(a, b)) for a, b in zip(result.images, images, strict=True)) > 150


@pytest.fixture
def images(rng):
    return rng.uniform(0.1, 0.9, (2, 6, 6, 1))


@pytest.mark.parametrize("loss", [of_teacher_logits, of_squares, periodic, clipped])
def test_a_loss_that_is_not_affine_in_its_target_tells_none(loss, rng, images):
    model, targets = one_layer(rng, 5), rng.normal(size=(2, 5))
    result = leakjax.invert(leakjax.observe(model, (images, targets), loss=loss))
    assert is_exact(result, images)
    assert result.label_sources == ("open", "open")
    assert [t is None for t in result.targets] == [True, True]


def test_only_what_is_told_to_be_probabilities_sums_to_one(rng, images):
    model, bits = one_layer(rng, 5), np.array([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 1]])
    result = leakjax.invert(leakjax.observe(model, (images, bits), loss="softmax_cross_entropy"))
    assert is_exact(result, images)
    assert result.label_sources == ("open", "open")
    halves = leakjax.observe(model, (images, bits / 2), loss="softmax_cross_entropy")
    assert halves.target == "probabilities"
    np.testing.assert_allclose(np.stack(leakjax.invert(halves).targets), bits / 2, atol=1e-7)  # pyright: ignore[reportArgumentType]
    values = dataclasses.replace(halves, target="values")
    assert leakjax.invert(values).label_sources == ("open", "open")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", ["huber_loss:delta=0.1", of_signs])
def test_labels_that_a_flat_loss_hides_are_not_told(loss, bias, images):
    draw = np.random.default_rng(6)
    model, bits = one_layer(np.random.default_rng(1), 5, bias=bias), draw.integers(0, 2, (2, 5))
    result = leakjax.invert(leakjax.observe(model, (images, bits), loss=loss))
    assert is_exact(result, images)
    for target, truth in zip(result.targets, bits, strict=True):
        assert target is None or np.array_equal(target, truth)
    assert "open" in result.label_sources


LOSSES_OF_BITS = [
    "squared_error",
    "log_cosh",
    "softmax_cross_entropy",
    "poly_loss_cross_entropy",
    "sigmoid_binary_cross_entropy:label_smoothing=0.9",
]


@pytest.mark.parametrize("loss", LOSSES_OF_BITS)
def test_several_labels_need_not_be_the_signs(loss, rng, images):
    bits = rng.integers(0, 2, (2, 5))
    bits[:, 0] = 1
    result = leakjax.invert(leakjax.observe(one_layer(rng, 5), (images, bits), loss=loss))
    assert is_exact(result, images)
    for target, truth in zip(result.targets, bits, strict=True):
        assert target is None or np.array_equal(target, truth)
    assert "target" in result.label_sources


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_several_labels_at_every_position(factor, bias, rng, images):
    apply, params = one_layer(rng, 12, bias=bias)
    bits = rng.integers(0, 2, (2, 4, 3))
    model = (lambda p, x: apply(p, x).reshape(len(x), 4, 3)), params
    observation = leakjax.observe(model, (images, bits), loss="sigmoid_binary_cross_entropy")
    result = leakjax.invert(times(observation, factor), gradient_scale=None if bias else factor)
    assert is_exact(result, images)
    np.testing.assert_array_equal(np.stack(result.targets), bits)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(result.gradient_scale, factor, rtol=1e-6)


def test_an_autoencoder_whose_loss_sees_no_size(images):
    apply, params = one_layer(np.random.default_rng(3), 36, bias=False, activation="leaky_relu")
    model = (lambda p, x: apply(p, x).reshape(x.shape)), params
    for loss in (
        lambda z, t: 1 - jnp.sum(z * t) / jnp.linalg.norm(z) / jnp.linalg.norm(t),
        lambda z, t: jnp.sum((z - t) ** 2) / jnp.sum(t**2),
    ):
        result = leakjax.invert(leakjax.observe(model, (images, images), loss=loss))
        for k, certificate in enumerate(result.certificates):
            assert (certificate.status, certificate.symmetry) == ("ambiguous", "multiples")
            shown = result.images[k].ravel()
            assert shown @ images[k].ravel() > (1 - 1e-9) * np.linalg.norm(shown) * np.linalg.norm(images[k])
            assert shown.min() + 1e-9 >= 0
            assert shown.max() <= 1 + 1e-9


def test_a_class_that_is_none_is_open_where_the_factor_is(rng, images):
    observation = leakjax.observe(one_layer(rng, 5), (images, rng.dirichlet(np.ones(5), 2)))
    result = leakjax.invert(times(dataclasses.replace(observation, target="class", target_shape=()), 0.5))
    assert is_exact(result, images)
    assert result.label_sources == ("open", "open")
    assert np.all(np.isnan(result.gradient_scale))


@pytest.mark.parametrize("loss", ["hinge_loss", "huber_loss:delta=0.1"])
def test_a_hinge_under_a_factor_that_nobody_told(loss):
    """Before its margin is met a hinge sees no size: the brightness is open, and so is the label where others fit."""
    model = one_layer(np.random.default_rng(0), 5, bias=False, activation="leaky_relu")
    images, labels = np.random.default_rng(5).uniform(0.1, 0.9, (6, 6, 6, 1)), np.arange(6) % 5
    result = leakjax.invert(times(leakjax.observe(model, (images, labels), loss=loss), 0.3))
    for k, certificate in enumerate(result.certificates):
        if certificate.status == "exact":
            assert float(psnr(result.images[k], images[k])) > 100
        if result.label_sources[k] == "recovered":
            assert result.labels[k] == labels[k]
        if certificate.status == "ambiguous":
            assert certificate.symmetry == "multiples"
            assert np.isnan(result.gradient_scale[k])
            shown = [c.image.ravel() / np.linalg.norm(c.image) for c in result.candidates[k]]
            assert max(u @ images[k].ravel() for u in shown) > (1 - 1e-6) * np.linalg.norm(images[k])
    assert "ambiguous" in {c.status for c in result.certificates}


def test_bits_are_told_if_there_are_no_others(rng):
    truth = rng.integers(0, 2, 20)
    z = rng.normal(size=20)

    def separate(targets):
        return 1 / (1 + np.exp(-z)) - targets

    def mixed(targets):
        return (targets @ (np.arange(15).reshape(5, 3) % 7)) * 1.0

    def blind(targets):
        return np.where(np.arange(20) < 19, separate(targets), 0.3)

    for factor in (1.0, -0.4):
        bits, found = solve_bits(separate, factor * separate(truth), (20,), scaled=True, fit=1e-9)
        np.testing.assert_array_equal(bits, truth)
        assert abs(found - factor) < 1e-9
    assert solve_bits(separate, 0.9 * separate(truth), (20,), scaled=False, fit=1e-9)[0] is None
    assert solve_bits(blind, blind(truth), (20,), scaled=False, fit=1e-9)[0] is None
    some = truth[:5].reshape(5)
    every = [np.array(list(np.binary_repr(k, 5)), int) for k in range(32)]
    alike = sum(np.allclose(mixed(one), mixed(some)) for one in every)
    assert (solve_bits(mixed, mixed(some), (5,), scaled=False, fit=1e-9)[0] is None) == (alike > 1)
    assert solve_bits(lambda t: mixed(t[:, :5]), mixed(some), (20,), scaled=False, fit=1e-9)[0] is None


def test_targets_that_a_file_may_claim_are_checked(rng, images):
    observation = leakjax.observe(one_layer(rng, 5), (images, np.array([1, 2])))
    for kind, shape, words in (
        ("input", (5,), r"must be \(6, 6, 1\)"),
        ("several", (4,), r"must be \(5,\)"),
        ("class", (5,), r"must be \(\)"),
        ("values", (3,), "cannot be compared"),
    ):
        with pytest.raises(InputError, match=words):
            leakjax.invert(dataclasses.replace(observation, target=kind, target_shape=shape))
    numbers = leakjax.observe(
        one_layer(rng, 5),
        (images, rng.normal(size=(2, 5))),
        loss="squared_error",
        local_steps=2,
        learning_rate=0.1,
    )
    with pytest.raises(InputError, match="local_steps says nothing of targets"):
        leakjax.invert(numbers, attack="match")
