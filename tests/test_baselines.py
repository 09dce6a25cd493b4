"""The baselines as their papers define them: objectives, schedules, labels, and gradient constraints alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_match import batch
from test_pull_back import SHAPE, convolve, network, psnr

from leakjax import InputError, invert, observe
from leakjax.attacks import ATTACKS
from leakjax.attacks.heads.labelings import likeliest_labels
from leakjax.attacks.matching.descent import cosine_distance, harden, soften, squared_distance
from leakjax.attacks.matching.dlg import DLG
from leakjax.attacks.matching.inverting_gradients import (
    ALPHA,
    INVERTING_GRADIENTS,
    STEPS,
    learning_rate,
    mean_variation,
    signed_adam,
)
from leakjax.models.losses import LOSSES
from leakjax.report.pairing import pair_with_truth
from leakjax.segments.tracing.network import batch_gradient

model = functools.cache(network)  # compiled once for all tests


def dense(rng, outputs=4):
    """A dense layer with softmax cross-entropy, its mean gradient for soft labels written out by hand."""
    params = {"w": rng.normal(size=(6, outputs)), "b": rng.normal(size=outputs)}

    def logits(p, x):
        return x @ p["w"] + p["b"][None]

    def by_hand(x, targets):
        z = x @ params["w"] + params["b"]
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        dz = (p - targets) / len(x)
        return {"w": x.T @ dz, "b": dz.sum(axis=0)}

    return params, batch_gradient(logits, "softmax_cross_entropy", ("b", "w")), by_hand


def test_dlg_s_objective_and_its_gradient(rng):
    params, gradient, by_hand = dense(rng)
    sent = by_hand(rng.normal(size=(2, 6)), np.eye(4)[[1, 3]])
    x, tags = rng.normal(size=(2, 6)), rng.normal(size=(2, 4))

    def objective(u):
        return DLG.distance(gradient(params, u[0], soften(u[1])), sent)

    def expected(x, tags):
        targets = np.exp(tags) / np.exp(tags).sum(axis=1, keepdims=True)
        found = by_hand(x, targets)
        return sum(np.sum((found[p] - sent[p]) ** 2) for p in sent)

    value, (of_x, of_tags) = jax.value_and_grad(objective)((jnp.asarray(x), jnp.asarray(tags)))
    np.testing.assert_allclose(value, expected(x, tags), rtol=1e-12)
    for array, derivative in ((x, of_x), (tags, of_tags)):
        for place in np.ndindex(*array.shape):
            step = np.zeros_like(array)
            step[place] = 1e-6
            ahead, behind = (
                expected(x + s * step, tags) if array is x else expected(x, tags + s * step) for s in (1, -1)
            )
            np.testing.assert_allclose(derivative[place], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_soft_label_that_is_certain_is_a_label(loss, outputs, rng):
    logits, label = jnp.asarray(rng.normal(size=outputs)), jnp.asarray(1)
    hard = jnp.ones(1) if outputs == 1 else jnp.eye(outputs)[1]
    np.testing.assert_allclose(LOSSES[loss](logits, hard), LOSSES[loss](logits, label), rtol=1e-14)
    certain = jnp.where(jnp.arange(max(outputs, 2))[-outputs:] == 1, 60.0, -60.0)[None]
    np.testing.assert_allclose(soften(certain)[0], hard, atol=1e-20)
    assert harden(certain).tolist() == [1]


def test_cosine_and_total_variation_by_numpy(rng):
    found, sent = ({"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)} for _ in range(2))
    a, b = (np.concatenate([g["a"].ravel(), g["b"]]) for g in (found, sent))
    cosine = 1 - a @ b / np.sqrt((a @ a) * (b @ b))
    np.testing.assert_allclose(cosine_distance(found, sent), cosine, rtol=1e-12)
    np.testing.assert_allclose(squared_distance(found, sent), np.sum((a - b) ** 2), rtol=1e-12)
    x = rng.normal(size=(2, 5, 4, 3))
    down = np.mean([abs(x[n, i + 1, j, c] - x[n, i, j, c]) for n, i, j, c in np.ndindex(2, 4, 4, 3)])
    across = np.mean([abs(x[n, i, j + 1, c] - x[n, i, j, c]) for n, i, j, c in np.ndindex(2, 5, 3, 3)])
    np.testing.assert_allclose(mean_variation(jnp.asarray(x)), down + across, rtol=1e-12)
    np.testing.assert_allclose(INVERTING_GRADIENTS.prior(jnp.asarray(x)), ALPHA * (down + across), rtol=1e-12)


def test_the_rate_falls_at_three_five_and_seven_eighths():
    assert STEPS == 4800
    for count, rate in (
        (0, 1e-1),
        (1799, 1e-1),
        (1800, 1e-2),
        (2999, 1e-2),
        (3000, 1e-3),
        (4199, 1e-3),
        (4200, 1e-4),
        (4799, 1e-4),
    ):
        np.testing.assert_allclose(learning_rate(jnp.asarray(count), STEPS), rate, rtol=1e-12)


def test_signed_adam_sees_signs_and_stays_in_the_box():
    optimizer, x = signed_adam(8, (0.0, 1.0)), jnp.asarray([0.5, 0.5, 0.95])
    state, rates = optimizer.init(x), []
    for _ in range(8):
        update, state = optimizer.update(jnp.asarray([1e-9, 1e3, -1.0]), state, x)
        rates.append(float(-update[0]))
        np.testing.assert_allclose(update[0], update[1], rtol=1e-6)
        x = x + update
        assert x.min() >= 0
        assert x.max() <= 1 + 1e-15
    np.testing.assert_allclose(rates, [1e-1] * 3 + [1e-2] * 2 + [1e-3] * 2 + [1e-4], rtol=1e-6)
    np.testing.assert_allclose(x[2], 1.0)


@pytest.mark.parametrize("attack", ["dlg", "idlg"])
def test_deep_leakage_of_a_sigmoid_net(attack):
    images, labels = batch(1), np.array([3])
    observation = observe(model(jax.nn.sigmoid, filters=12), (images, labels))
    answer = invert(observation, attack=attack, steps=150)
    assert answer.labels.tolist() == [3]
    assert psnr(answer.images, images) > 40
    assert (answer.certificates[0].status == "exact") == (answer.gradient_residual[0] < 1e-6)
    early = invert(observation, attack=attack, steps=20)
    assert early.certificates[0].status == "failed"
    assert psnr(early.images, images) < 40
    assert np.all(early.determined == 0)


def test_inverting_gradients_keeps_the_box_and_claims_nothing():
    images, labels = batch(2), np.array([3, 0])
    observation = observe(model(jnp.tanh, filters=12), (images, labels))
    answer = invert(observation, attack="inverting_gradients", steps=400)
    assert answer.labels.tolist() == [3, 0]
    assert answer.images.min() >= 0
    assert answer.images.max() <= 1
    assert min(psnr(a, b) for a, b in zip(answer.images, images, strict=True)) > 25
    assert [c.status for c in answer.certificates] == ["failed"] * 2
    together = invert(observation, attack="inverting_gradients", steps=400, chunk=2)
    np.testing.assert_allclose(together.images, answer.images, atol=1e-6)


def test_starts_and_seeds():
    """Another seed is another start, and of several starts the best is kept."""
    images = batch(1)
    observation = observe(model(jax.nn.sigmoid, filters=12), (images, np.array([3])))
    options = {"attack": "idlg", "steps": 15}
    one, other = (invert(observation, seed=seed, **options) for seed in (0, 1))
    assert np.abs(one.images - other.images).max() > 1e-6
    np.testing.assert_array_equal(one.images, invert(observation, **options).images)
    several = invert(observation, starts=4, **options)
    assert several.gradient_residual[0] <= one.gradient_residual[0] * (1 + 1e-6)
    for option, value in (("steps", 0), ("steps", 1.5), ("seed", -1), ("seed", 0.5)):
        with pytest.raises(InputError, match=f"{option} must be"):
            invert(observation, attack="idlg", **{option: value})


def test_labels_of_every_gradient(monkeypatch):
    """iDLG's rule for one example, whatever the sign of what the head sees; counts for batches."""
    seen = []

    def spy(problem, monitor):
        seen.append(likeliest_labels(problem))
        raise StopIteration

    for room in ("preparation", "inversion"):
        monkeypatch.setattr(f"leakjax.{room}.ATTACKS", {"spy": ATTACKS["rgap"]._replace(run=spy)})
    options = {}, {"batch_size": 2}, {}
    for k, option in enumerate(options):
        observation = observe(model(jnp.tanh, filters=12), (batch(4), np.array([4, 0, 2, 2])), **option)
        with pytest.raises(StopIteration):
            invert(observation, attack="spy", labels=[1, 1, 1, 1] if k == 2 else None)
    np.testing.assert_array_equal(seen[0], [[4], [0], [2], [2]])
    np.testing.assert_array_equal(seen[1], [[0, 4], [2, 2]])
    np.testing.assert_array_equal(seen[2], [[1]] * 4)


@pytest.mark.parametrize("attack", ["dlg", "idlg", "inverting_gradients"])
def test_batches(attack):
    images, labels = batch(2), np.array([1, 4])
    observation = observe(model(jax.nn.sigmoid, filters=12), (images, labels), batch_size=2)
    answer = invert(observation, attack=attack, steps=400)
    assert answer.images.shape == images.shape
    assert answer.images.dtype == np.float64
    assert np.all(np.isfinite(answer.images))
    if attack == "inverting_gradients":
        assert sorted(answer.labels) == [1, 4]
        assert psnr(answer.images, pair_with_truth(images, answer.images, 2)) > 14


LEAKY = {"tanh": jnp.tanh, "leaky_relu": lambda z: jax.nn.leaky_relu(z, 0.2), "relu": jax.nn.relu}


@pytest.mark.parametrize("activation", LEAKY)
def test_gradient_constraints_alone(activation):
    images = batch(1)
    answer = invert(observe(model(LEAKY[activation], filters=24), (images, np.array([1]))), attack="rconv")
    assert psnr(answer.images, images) > 100
    assert answer.certificates[0].status == "exact"
    assert answer.labels[0] == 1


def test_a_layer_that_needs_its_forward_rows(rng):
    """Gradient rows by the parity of the pixel they see: 4 (9 + 9 + 9 + 6) = 132 independent ones, of 144 unknowns."""
    params = {
        "a": rng.normal(0, 0.5, (3, 3, 1, 4)),
        "b": rng.normal(0, 0.3, (3, 3, 4, 6)),
        "c": rng.normal(0, 0.3, (54, 5)),
        "d": rng.normal(0, 0.1, 5),
    }

    def apply(p, x):
        x = jnp.tanh(convolve(x, p["a"], 1, "SAME"))
        x = jnp.tanh(convolve(x, p["b"], 2, "SAME"))
        return x.reshape(x.shape[0], -1) @ p["c"] + p["d"][None]

    images = rng.uniform(size=(1, 6, 6, 1))
    observation = observe((apply, params), (images, np.array([1])))
    both, alone = invert(observation, attack="rgap"), invert(observation, attack="rconv")
    assert (both.certificates[0].status, alone.certificates[0].status) == ("exact", "failed")
    assert (both.layers[0][1].rank, alone.layers[0][1].rank) == (144, 4 * (9 + 9 + 9 + 6))
    assert alone.layers[0][1].status == "deficient"
    assert psnr(both.images, images) > 200
    assert psnr(alone.images, images) < 40


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_keeps_the_contract(attack):
    images, labels = batch(2), np.array([2, 0])
    observation = observe(model(jnp.tanh, filters=24), (images, labels))
    answer = invert(observation, attack=attack, steps=30, dtype="float64")
    assert answer.attack == attack
    assert answer.images.shape == answer.determined.shape == (2, *SHAPE)
    assert np.all(np.isfinite(answer.images))
    assert answer.determined.min() >= 0
    assert answer.determined.max() <= 1
    assert answer.gradient_residual.shape == (2,)
    for found, truth, certificate in zip(answer.images, images, answer.certificates, strict=True):
        assert certificate.status in ("exact", "ambiguous", "failed")
        assert certificate.status != "exact" or psnr(found, truth) > 60
        assert certificate.unknowns == found.size
    assert all(layers for layers in answer.layers)
