"""The guard: its scores against a dense Jacobian, what it lets pass, and a federated loop over real digits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from leakjax.errors import InputError
from leakjax.guard import guard, loss_of
from leakjax.models.reader import read_model

PRIOR = 0.25


@pytest.fixture(autouse=True)
def _strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def dense(sizes, rng, dtype=jnp.float64):
    """Weights of a tanh network as a user would keep them: a list of dictionaries."""
    pairs = itertools.pairwise(sizes)
    return [
        {"w": jnp.asarray(rng.normal(size=(a, b)) / a**0.5, dtype), "b": jnp.asarray(rng.normal(size=b) * 0.1, dtype)}
        for a, b in pairs
    ]


def logits(params, images):
    x = images.reshape(images.shape[0], -1)
    for k, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"][None]
        x = jnp.tanh(x) if k + 1 < len(params) else x
    return x


def loss_fn(params, images, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels))


def score_by(*batch, loss=loss_fn, **how):
    """The score of the batch as numpy's numbers."""
    made = guard(loss, **how) if loss is not None else guard(**how)
    return jax.device_get(made.score(*batch))


def batch_of(rng, examples, side=4, classes=5, dtype=jnp.float64):
    images = jnp.asarray(rng.uniform(size=(examples, side, side, 1)), dtype)
    return images, jnp.asarray(rng.integers(classes, size=examples))


def dense_jacobian(params, images, labels, loss=loss_fn):
    """By jax.jacfwd and numpy: an oracle that shares nothing with the guard."""
    jacobian = jax.jacfwd(jax.grad(loss), argnums=1)(params, images, labels)
    return np.concatenate([np.asarray(leaf).reshape(-1, images.size) for leaf in jax.tree.leaves(jacobian)])


def singular_values(params, images, labels):
    s = np.linalg.svd(dense_jacobian(params, images, labels), compute_uv=False)
    return np.concatenate([s, np.zeros(images.size - s.size)])


def psnr_of(s, noise):
    return -10 * np.log10(np.mean(1 / (s**2 / noise**2 + 1 / PRIOR**2)))


@pytest.mark.parametrize(("sizes", "examples", "noise"), [((16, 12, 5), 1, 1e-3), ((16, 2, 2, 5), 3, 0.02)])
def test_exact_is_the_svd_of_the_dense_jacobian(rng, sizes, examples, noise):
    params, (images, labels) = dense(sizes, rng), batch_of(rng, examples)
    s = singular_values(params, images, labels)
    rank = np.sum(s > 1e-12 * s[0])
    score = score_by(params, images, labels, max_leaked_fraction=1.0, noise=noise, method="exact")
    assert score.leaked_dimensions == rank
    assert score.leaked_fraction == pytest.approx(rank / images.size)
    assert score.predicted_psnr == pytest.approx(psnr_of(s, noise), abs=1e-4)


def test_exact_keeps_the_rank_in_float32(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 3)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (params, images))
    score = score_by(*single, labels, max_leaked_fraction=0.9, noise=0.01, method="exact")
    s = singular_values(params, images, labels)
    assert score.leaked_dimensions == np.sum(s > 1e-12 * s[0])
    assert score.predicted_psnr == pytest.approx(psnr_of(s, 0.01), abs=1e-2)


def test_without_noise_the_error_is_what_the_prior_leaves(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 8)
    score = score_by(params, images, labels, max_leaked_fraction=1.0)
    expected = -10 * np.log10(PRIOR**2 * (1 - float(score.leaked_fraction)))
    assert score.predicted_psnr == pytest.approx(expected, abs=1e-4)
    params, (images, labels) = dense((16, 16, 5), rng), batch_of(rng, 1)
    assert score_by(params, images, labels, max_psnr=30.0, method="exact").predicted_psnr == 350


def uneven_loss(params, images, labels):
    """The second image of three counts most."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
    return jnp.sum(losses * jnp.asarray([1.0, 6.0, 1.0], losses.dtype))


def every_image(params, images, labels, noise):
    """Each image's share of the row space and its PSNR, by numpy from the dense Jacobian."""
    j = dense_jacobian(params, images, labels, uneven_loss)
    _, s, v = np.linalg.svd(j)
    projector = v[: np.sum(s > 1e-12 * s[0])]
    covariance = np.linalg.inv(j.T @ j / noise**2 + np.eye(images.size) / PRIOR**2)
    shares, errors = np.sum(projector**2, axis=0), np.diag(covariance)
    return shares.reshape(3, -1).mean(1), -10 * np.log10(errors.reshape(3, -1).mean(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-5), (jnp.float32, 1e-2)])
@pytest.mark.parametrize("noise", [0.003, 0.3])
def test_the_worst_image_is_that_of_the_dense_jacobian(rng, dtype, tolerance, noise):
    params, (images, labels) = dense((16, 1, 5), rng), batch_of(rng, 3)
    shares, psnrs = every_image(params, images, labels, noise)
    assert (shares.argmax(), psnrs.argmax()) == (1, 1)
    batch = (*jax.tree.map(lambda a: a.astype(dtype), (params, images)), labels)
    score = score_by(*batch, loss=uneven_loss, max_leaked_fraction=1.0, noise=noise, method="exact")
    assert score.worst_leaked_fraction == pytest.approx(shares.max(), abs=0.1 * tolerance)
    assert score.worst_psnr == pytest.approx(psnrs.max(), abs=tolerance)
    assert score.leaked_fraction == pytest.approx(shares.mean(), abs=1e-6)
    assert score.worst_leaked_fraction > score.leaked_fraction + 0.05
    clear = score_by(*batch, loss=uneven_loss, max_leaked_fraction=1.0, method="exact")
    assert clear.worst_psnr == pytest.approx(-10 * np.log10(PRIOR**2 * (1 - shares.max())), abs=tolerance)


def test_the_limits_are_on_the_worst_image_unless_on_the_batch(rng):
    params, batch = dense((16, 1, 5), rng), batch_of(rng, 3)
    shares, psnrs = every_image(params, *batch, 0.1)
    for limit in (
        {"max_leaked_fraction": 0.5 * float(shares.max() + shares.mean())},
        {
            "max_psnr": 0.5
            * float(psnrs.max() + psnr_of(np.linalg.svd(dense_jacobian(params, *batch, uneven_loss))[1], 0.1))
        },
    ):
        how = {"loss": uneven_loss, "noise": 0.1, "method": "exact", **limit}
        assert not score_by(params, *batch, **how).allowed
        assert score_by(params, *batch, per="batch", **how).allowed


@pytest.mark.parametrize("noise", [None, 0.02, 0.3])
def test_a_sketch_is_never_below_the_worst_image(rng, noise):
    params, (images, labels) = dense((16, 1, 5), rng), batch_of(rng, 3)
    how = {"loss": uneven_loss, "max_psnr": 40.0, "noise": noise, "probes": 64}
    truth = score_by(params, images, labels, method="exact", **how)
    two, six = (score_by(params, images, labels, steps=k, **how) for k in (2, 6))
    batch = score_by(params, images, labels, per="batch", **how)
    for bound in (two, six, batch):
        assert bound.worst_leaked_fraction >= truth.worst_leaked_fraction
    sampling = 0.0 if noise is None else deviation(truth.worst_psnr, images.size // 3, 64)
    assert two.worst_psnr >= six.worst_psnr - 1e-4 >= truth.worst_psnr - sampling - 2e-4
    assert batch.worst_psnr >= truth.worst_psnr - sampling
    if noise == 0.3:
        assert abs(six.worst_psnr - truth.worst_psnr) <= sampling + 0.1


def deviation(psnr, pixels, probes):
    """Three standard deviations in dB of a bound sampled by so many probes, at most."""
    left = pixels * 10 ** (-0.1 * float(psnr)) / PRIOR**2
    return 10 * np.log10(1 + 3 * np.sqrt(2 / (probes * left)))


@pytest.mark.parametrize(("sizes", "examples", "noise"), [((16, 12, 5), 1, 0.2), ((16, 2, 5), 8, 0.01)])
def test_a_sketch_is_never_below_what_leaks(rng, sizes, examples, noise):
    params, (images, labels) = dense(sizes, rng), batch_of(rng, examples)
    truth, *bounds = (
        score_by(params, images, labels, max_psnr=40.0, noise=noise, probes=16, **how)
        for how in ({"method": "exact"}, {"steps": 1}, {"steps": 3}, {"steps": 10})
    )
    assert all(b.leaked_dimensions >= truth.leaked_dimensions for b in bounds)
    one, three, ten = (float(b.predicted_psnr) for b in bounds)
    assert one >= three - 1e-4 >= ten - 2e-4  # each Lanczos step makes the bound closer
    sampling = deviation(truth.predicted_psnr, images.size, 16)
    assert abs(ten - truth.predicted_psnr) <= sampling + 0.1
    assert three >= truth.predicted_psnr - sampling


def test_a_sketch_counts_the_parameters_that_see_data_or_finds_a_small_rank(rng):
    params, (images, labels) = dense((16, 1, 5), rng), batch_of(rng, 8)
    count = sum(a.size for a in jax.tree.leaves(params))
    assert count < images.size
    few, many = (score_by(params, images, labels, max_leaked_fraction=0.2, probes=k) for k in (2, 40))
    exact = score_by(params, images, labels, max_leaked_fraction=0.2, method="exact")
    assert few.leaked_dimensions == count
    assert many.leaked_dimensions == exact.leaked_dimensions < count


def test_what_is_sent_may_be_any_function(rng):
    """Only the head's gradient is sent: fewer dimensions leak than by all of it."""
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 1)

    def head(params, images, labels):
        return jax.grad(loss_fn)(params, images, labels)[-1]

    whole = score_by(params, images, labels, max_leaked_fraction=0.5, method="exact")
    part = score_by(params, images, labels, loss=None, update_fn=head, max_leaked_fraction=0.5, method="exact")
    assert whole.leaked_dimensions > part.leaked_dimensions == 3  # the head's gradient is that of its three inputs
    assert part.allowed
    assert not whole.allowed


def test_an_update_that_does_not_depend_on_the_images_leaks_nothing(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 1)
    for method in ("sketch", "exact"):
        how = {"update_fn": lambda params, images, labels: params, "method": method}
        score = score_by(params, images, labels, loss=None, max_leaked_fraction=0.1, **how)
        assert score.leaked_dimensions == 0
        assert score.allowed
    dead = [{"w": jnp.zeros_like(p["w"]), "b": p["b"]} for p in params]
    score = score_by(dead, images, labels, max_leaked_fraction=0.1, method="exact")
    assert score.leaked_dimensions == np.sum(singular_values(dead, images, labels) > 0)


def test_not_a_number_is_blocked(rng):
    params, (images, labels) = dense((16, 12, 5), rng), batch_of(rng, 1)
    broken = jax.tree.map(lambda a: a * jnp.nan, params)
    for how in ({"method": "exact"}, {"method": "sketch"}, {"noise": 0.1, "method": "exact"}, {"noise": 0.1}):
        assert not score_by(broken, images, labels, max_leaked_fraction=0.9, max_psnr=30.0, **how).allowed


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 4, rngs=rngs, param_dtype=jnp.float64)
        self.head = nnx.Linear(4, 5, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.head(nnx.tanh(self.first(x.reshape(x.shape[0], -1))))


def test_models_and_states_of_flax(rng):
    net, (images, labels) = Net(nnx.Rngs(0)), batch_of(rng, 2)
    graphdef, state = nnx.split(net)

    def of_state(state, images, labels):
        z = nnx.merge(graphdef, state)(images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, labels))

    one = score_by(state, images, labels, loss=of_state, max_leaked_fraction=0.5, noise=0.1)
    other = score_by(read_model(net).params, images, labels, loss=loss_of(net), max_leaked_fraction=0.5, noise=0.1)
    np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), rtol=1e-5)


@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_pixels_of_any_range_are_judged_in_its_unit(rng, noise):
    """Images of 0..255 with the division inside the loss are those of 0..1: the same gradient, the same score."""
    params, (images, labels) = dense((16, 12, 5), rng), batch_of(rng, 1)

    def divided(params, images, labels):
        return loss_fn(params, images / 255, labels)

    how = {"max_psnr": 20.0, "noise": noise, "method": "exact"}
    unit = score_by(params, images, labels, **how)
    wide = score_by(params, 255 * images, labels, loss=divided, input_range=(0, 255), **how)
    np.testing.assert_allclose(np.asarray(wide, float), np.asarray(unit, float), rtol=1e-5)


def test_pixels_outside_the_range_are_refused_and_blocked_where_they_cannot_be_seen(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 8)
    protect = guard(loss_fn, max_psnr=20.0, noise=9.0)
    with pytest.raises(InputError, match="outside input_range"):
        protect.score(params, 255 * images, labels)
    score = jax.jit(protect.score)(params, 255 * images, labels)
    assert not score.allowed
    assert "outside input_range" in protect.explain(score)
    allowed = jax.jit(protect.score)(params, images, labels)
    assert allowed.allowed
    assert protect.explain(allowed) == "allowed"


def test_a_derivative_that_vanishes_and_numbers_that_are_none_are_blocked(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 1)
    protect = guard(loss_fn, max_leaked_fraction=0.9)
    zero = protect.score(jax.tree.map(jnp.zeros_like, params), images, labels)
    broken = protect.score(jax.tree.map(lambda a: a * jnp.nan, params), images, labels)
    assert not zero.allowed
    assert "derivative at them is zero" in protect.explain(zero)
    assert not broken.allowed
    assert "not finite" in protect.explain(broken)


def test_zeros_above_the_limit_and_counts(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 8)
    tx = guard(loss_fn, max_leaked_fraction=0.9, method="exact").transformation
    state = tx.init(params)
    gradients = jax.grad(loss_fn)(params, images, labels)
    sent, state = tx.update(gradients, state, params, images=images, labels=labels)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, sent, gradients))
    assert (state.sent, state.blocked) == (1, 0)
    blocked, state = tx.update(gradients, state, params, images=images[:1], labels=labels[:1])
    assert not any(map(jnp.any, jax.tree.leaves(blocked)))
    assert (state.sent, state.blocked) == (1, 1)
    assert not state.score.allowed


def test_in_a_chain_under_jit_and_scan(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 12)
    protect = guard(loss_fn, max_leaked_fraction=0.5, noise=0.05, per="batch")
    tx = optax.chain(protect.transformation, optax.sgd(0.1, momentum=0.9))
    tx = optax.with_extra_args_support(tx)

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params, images=batch[0], labels=batch[1])
        return (optax.apply_updates(params, updates), state), state[0].score

    batches = jnp.broadcast_to(images, (3, *images.shape)), jnp.broadcast_to(labels, (3, *labels.shape))
    (moved, state), scores = jax.jit(lambda c, b: jax.lax.scan(step, c, b))((params, tx.init(params)), batches)
    assert scores.allowed.tolist() == [True] * 3
    assert (state[0].sent, state[0].blocked) == (3, 0)
    assert not jnp.array_equal(moved[0]["w"], params[0]["w"])
    singles = jax.tree.map(lambda a: a[:, :1], batches)
    (kept, state), scores = jax.jit(lambda c, b: jax.lax.scan(step, c, b))((params, tx.init(params)), singles)
    assert scores.allowed.tolist() == [False] * 3
    assert (state[0].sent, state[0].blocked) == (0, 3)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, kept, params))


def test_the_chain_of_the_readme(rng):
    """Eight noisy images are sent while the noise covers the worst of them; with less of it nothing is."""
    net, (images, labels) = Net(nnx.Rngs(0)), batch_of(rng, 8)
    loss, params = loss_of(net), read_model(net).params
    for noise, sent in ((0.5, 1), (1e-4, 0)):
        protect = guard(loss, max_psnr=20.0, noise=noise)
        tx = optax.chain(protect.transformation, optax.sgd(0.1))
        state = tx.init(params)
        updates, state = tx.update(jax.grad(loss)(params, images, labels), state, params, images=images, labels=labels)
        moved = optax.apply_updates(params, updates)
        assert int(state[0].sent) == sent
        assert any(jnp.any(moved[k] != params[k]) for k in params) == bool(sent)


def test_bad_input_is_named(rng):
    params, (images, labels) = dense((16, 3, 5), rng), batch_of(rng, 2)
    for kwargs, words in (
        ({}, "max_leaked_fraction, max_psnr or both"),
        ({"max_leaked_fraction": 0.0}, "max_leaked_fraction must be in"),
        ({"max_leaked_fraction": 1.5}, "max_leaked_fraction must be in"),
        ({"max_psnr": 5.0}, "max_psnr must be above the 12.04 dB"),
        ({"max_psnr": float("nan")}, "max_psnr must be above"),
        ({"max_psnr": 30.0, "noise": -0.1}, "noise must be"),
        ({"max_psnr": 30.0, "prior": 0.0}, "prior must be"),
        ({"max_psnr": 30.0, "method": "skech"}, "did you mean 'sketch'"),
        ({"max_psnr": 30.0, "per": "images"}, "did you mean 'image'"),
        ({"max_psnr": 30.0, "probes": 0}, "probes must be"),
        ({"max_psnr": 30.0, "steps": 0}, "steps must be"),
        ({"max_psnr": 30.0, "input_range": (1.0, 0.0)}, "input_range must be"),
        ({"max_psnr": 30.0, "input_range": 255}, "input_range must be"),
        ({"max_psnr": 30.0, "update_fn": loss_fn}, "either loss_fn or update_fn"),
    ):
        with pytest.raises(InputError, match=words):
            guard(loss_fn, **kwargs)
    with pytest.raises(InputError, match="unknown loss"):
        loss_of(Net(nnx.Rngs(0)), "hinge")
    checked = guard(loss_fn, max_leaked_fraction=0.5, method="exact")
    for batch, words in (
        ((images[:0], labels[:0]), "batch"),
        ((images, labels[:1]), "labels must be one for each of 2"),
        (((255 * images).astype(jnp.uint8), labels), "divide by 255"),
        ((jnp.zeros((5, 32, 32, 1)), jnp.zeros(5, int)), "more than the 4096"),
    ):
        with pytest.raises(InputError, match=words):
            checked.score(params, *batch)
    tx = checked.transformation
    with pytest.raises(InputError, match="params is missing"):
        tx.update(params, tx.init(params), images=images, labels=labels)


@functools.cache
def digits():
    """Scikit-learn's 1,797 handwritten digits, 8x8, pixels in [0, 1]: four clients' parts and a test set."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = found.images[order][..., None] / 16, found.target[order]
    parts = [(images[k * 300 : (k + 1) * 300], labels[k * 300 : (k + 1) * 300]) for k in range(4)]
    return parts, (jnp.asarray(images[1200:]), labels[1200:])


def test_federated_averaging_over_real_digits(rng):
    """Three clients send updates of 128 images, a fourth would send one of a single image: only it is blocked."""
    parts, (test_images, test_labels) = digits()
    params = dense((64, 8, 10), rng)
    protect = guard(loss_fn, max_leaked_fraction=0.2, per="batch")
    tx = optax.chain(protect.transformation, optax.sgd(1.0))

    @jax.jit
    def client(params, state, images, labels):
        gradients = jax.grad(loss_fn)(params, images, labels)
        updates, state = tx.update(gradients, state, params, images=images, labels=labels)
        return optax.apply_updates(params, updates), state

    def accuracy(params):
        return float(np.mean(np.argmax(np.asarray(logits(params, test_images)), 1) == test_labels))

    states, history = [tx.init(params) for _ in parts], [accuracy(params)]
    for _ in range(5):
        local = []
        for k, ((images, labels), size) in enumerate(zip(parts, (128, 128, 128, 1), strict=True)):
            chosen = rng.choice(len(labels), size, replace=False)
            weights, states[k] = client(params, states[k], jnp.asarray(images[chosen]), jnp.asarray(labels[chosen]))
            local.append(weights)
        params = jax.tree.map(lambda *w: sum(w) / len(w), *local)
        history.append(accuracy(params))
    assert [(int(s[0].sent), int(s[0].blocked)) for s in states] == [(5, 0)] * 3 + [(0, 5)]
    assert [float(s[0].score.leaked_fraction) for s in states] == [610 / (128 * 64)] * 3 + [1.0]
    assert history[-1] > history[0] + 0.2
