"""Nothing is reassuring where a derivative is blind: rounding, thresholds, casts, stopped gradients, integers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from leakjax import audit
from leakjax.guard.online import guard
from leakjax.report.percentage import percentage
from leakjax.segments.tracing.blindness import blind_spots, seen_through
from leakjax.solvers.jacobian import rank_tolerance, row_space

SHAPE = (4, 4, 1)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"w": (16, 8), "b": (8,), "v": (8, 5), "e": (20, 8)}
    return {name: rng.normal(size=size) / size[0] ** 0.5 for name, size in sizes.items()}


def logits(front, act=jnp.tanh):
    def apply(p, x):
        return act(front(x).reshape(len(x), -1) @ p["w"] + p["b"][None]) @ p["v"]

    return apply


def tokens(p, x):
    found = jnp.take(p["e"], (x * 19).astype(jnp.int32).reshape(len(x), -1), axis=0)
    return jnp.tanh(found).mean(1) @ p["v"]


@jax.custom_vjp
def unfollowed(x):
    return 2 * x


unfollowed.defvjp(lambda x: (2 * x, None), lambda _, g: (jnp.zeros_like(g),))


@jax.custom_jvp
def straight_through(x):
    return jnp.round(255 * x) / 255


straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), tangents[0]))


def scanned(x):
    return jax.lax.scan(lambda c, _: (jax.lax.stop_gradient(c) * 1.1, None), x, None, length=2)[0]


ROUNDED = {
    "round": lambda x: jnp.round(255 * x) / 255,
    "floor": lambda x: jnp.floor(255 * x) / 255,
    "uint8": lambda x: (255 * x).astype(jnp.uint8).astype(x.dtype) / 255,
    "threshold": lambda x: (x > 0.5).astype(x.dtype),
    "where": lambda x: jnp.where(x > 0.5, 1.0, 0.0),
    "sign": lambda x: jnp.sign(x - 0.5),
    "straight through": lambda x: x + jax.lax.stop_gradient(jnp.round(255 * x) / 255 - x),
    "custom straight through": straight_through,
}
STOPPED = {
    "stop_gradient": jax.lax.stop_gradient,
    "of a tree": lambda x: jax.tree.map(jax.lax.stop_gradient, x),
    "in a loop": scanned,
    "custom derivative of zero": unfollowed,
}
SEEN = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "hard_swish": jax.nn.hard_swish,
    "abs": jnp.abs,
    "sort": lambda z: jnp.sort(z, axis=-1),
    "softmax": jax.nn.softmax,
    "clip": lambda z: jnp.clip(z, -0.5, 0.5),
    "standardize": jax.nn.standardize,
    "sign times itself": lambda z: jnp.sign(z) * z,
}


def gradient_of(apply):
    def loss(p, x):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(apply(p, x), jnp.zeros(len(x), jnp.int32)))

    return jax.grad(loss)


def point(seed=0):
    return jax.tree.map(jnp.asarray, weights()), jnp.asarray(np.random.default_rng(seed).uniform(size=(1, *SHAPE)))


def rank_of(gradient, p, x):
    def flat(x):
        return jax.flatten_util.ravel_pytree(gradient(p, x))[0]

    return np.linalg.matrix_rank(np.asarray(jax.jacfwd(flat)(x)).reshape(-1, x.size))


@pytest.mark.parametrize("front", ROUNDED.values(), ids=ROUNDED)
def test_what_hides_the_images_is_found(front):
    spots = blind_spots(gradient_of(logits(front)), *point())
    assert spots
    assert all("`" in str(spot) for spot in spots)


@pytest.mark.parametrize("act", SEEN.values(), ids=SEEN)
def test_kinks_hide_nothing_and_ranks_stay(act):
    p, x = point()
    gradient = gradient_of(logits(lambda x: x, act))
    assert not blind_spots(gradient, p, x)
    assert rank_of(seen_through(gradient), p, x) == rank_of(gradient, p, x)


@pytest.mark.parametrize("front", STOPPED.values(), ids=STOPPED)
def test_a_stopped_gradient_is_followed_by_the_data(front):
    p, x = point()
    gradient = gradient_of(logits(front))
    assert not blind_spots(gradient, p, x)
    through = seen_through(gradient)
    for name, g in gradient(p, x).items():
        np.testing.assert_array_equal(through(p, x)[name], g)
    assert rank_of(through, p, x) == 16


@pytest.mark.parametrize("key", ["round", "uint8", "threshold", "straight through"])
def test_an_audit_counts_what_rounding_leaves(key):
    found = audit((logits(ROUNDED[key]), weights()), SHAPE)
    assert found.verdict == "partial"
    assert found.leaked_dimensions == 16
    assert found.blind
    assert "dB of the original" in found.sentence
    assert found.noise is None
    assert all(spot in found.sentence for spot in found.blind)


def test_rounding_that_changes_nothing_hides_nothing():
    x = np.random.default_rng(0).integers(256, size=(1, *SHAPE)) / 255
    found = audit((logits(ROUNDED["round"]), weights()), SHAPE, images=x)
    assert found.verdict == "exact"


@pytest.mark.parametrize(
    "apply",
    [
        logits(lambda x: jax.nn.one_hot(jnp.argmax(x.reshape(len(x), -1), -1), 16, dtype=x.dtype)),
        logits(lambda x: x, lambda z: jnp.sign(z)),
        tokens,
    ],
    ids=["argmax", "binary units", "tokens"],
)
def test_what_cannot_be_counted_is_unknown(apply):
    found = audit((apply, weights()), SHAPE)
    assert found.verdict == "unknown"
    assert found.leaked_dimensions is None
    assert found.attainable_psnr is None
    assert found.blind


def test_the_rows_of_an_embedding_say_which_integers_there_were():
    found = audit((tokens, weights()), SHAPE)
    assert any("of 20 rows of its gradient that are not zero" in remark for remark in found.remarks)


def test_an_audit_follows_the_data_through_a_stopped_gradient():
    found = audit((logits(jax.lax.stop_gradient), weights()), SHAPE, noise=[])
    assert (found.verdict, found.leaked_dimensions) == ("exact", 16)


def test_a_jump_behind_a_derivative_is_seen_by_moving_the_images():
    def front(x):
        u = x.reshape(len(x), -1)
        return jnp.where(u[:, :8] > 0.5, 1.0 + 1e-9 * u[:, :8], 1e-9 * u[:, 8:]) @ jnp.ones((8, 16)) + 0 * u

    p, x = weights(), np.full((1, *SHAPE), 0.4999)
    found = audit((logits(front), {**p, "w": p["w"][:, :1]} | {"b": p["b"][:1], "v": p["v"][:1]}), SHAPE, images=x)
    assert found.verdict == "unknown"


def test_degenerate_instances_do_not_reassure():
    zero = {name: 0 * w for name, w in weights().items()} | {"b": np.ones(8)}
    headless = {**weights(), "v": 0 * weights()["v"]}
    saturated = {**weights(), "w": 1e4 * weights()["w"]}
    for p in (zero, headless, saturated):
        found = audit((logits(lambda x: x), p), SHAPE, noise=[])
        assert found.verdict in ("unknown", "exact")
        if found.verdict == "unknown":
            assert "shapes allow" in found.sentence


@pytest.mark.parametrize("key", ["round", "uint8", "threshold"])
@pytest.mark.parametrize("how", [{"max_leaked_fraction": 0.9}, {"max_psnr": 30.0, "noise": 5.0}])
def test_the_guard_blocks_what_it_cannot_see(key, how):
    p, x = point()

    def loss(p, x, y):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(ROUNDED[key])(p, x), y))

    made = guard(loss, **how)
    score = made.score(p, x, jnp.zeros(1, jnp.int32))
    assert not score.allowed
    assert score.worst_leaked_fraction == 1
    assert "no derivative sees through" in made.explain(score)


def test_the_guard_follows_the_data_through_a_stopped_gradient():
    p, x = point()

    def loss(front):
        def mean(p, x, y):
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(front)(p, x), y))

        return mean

    batch = p, x, jnp.zeros(1, jnp.int32)
    stopped, plain = (
        guard(loss(f), max_psnr=30.0, noise=0.1, method="exact").score(*batch)
        for f in (jax.lax.stop_gradient, lambda x: x)
    )
    np.testing.assert_allclose(np.asarray(stopped, float), np.asarray(plain, float), rtol=1e-5)


def spectrum(rows, columns, values):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in (rows, columns))
    return (u * values) @ v.T


@pytest.mark.parametrize(("small", "count"), [(1e-8, 3), (1e-11, 50), (1e-14, 3), (0.0, 40)])
def test_one_rule_of_rank_below_what_a_gram_matrix_resolves(small, count):
    values = np.geomspace(1, 1e-3, 200)
    values[-count:] = small
    matrix = spectrum(320, 200, values)
    found = row_space(lambda v: (v @ matrix.T) @ matrix, *matrix.shape)
    assert found.rank == np.sum(values > rank_tolerance(*matrix.shape))
    np.testing.assert_allclose(found.share.sum(), found.rank, rtol=1e-9)
    if small > 1e-13:
        np.testing.assert_allclose(np.sqrt(found.values[:count]), small, rtol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(30, 60), (200, 100)])
@pytest.mark.parametrize("least", [-11, -16, -30])
def test_one_rule_of_rank_where_values_fall_without_a_gap(rows, columns, least):
    values = np.logspace(0, least, min(rows, columns))
    matrix = spectrum(rows, columns, values)
    found = row_space(lambda v: (v @ matrix.T) @ matrix, rows, columns)
    truth = np.linalg.svd(matrix, compute_uv=False)
    assert found.rank == np.sum(truth > rank_tolerance(rows, columns) * truth[0])
    np.testing.assert_allclose(found.share.sum(), found.rank, rtol=1e-4)


def test_columns_of_zeros_are_open_and_change_nothing_else():
    rng, values = np.random.default_rng(1), np.r_[np.geomspace(1, 1e-3, 40), np.full(10, 1e-10)]
    matrix, hidden = np.zeros((90, 120)), rng.permutation(120)[:70]
    seen = np.setdiff1d(np.arange(120), hidden)
    matrix[:, seen] = spectrum(90, 50, values)
    found = row_space(lambda v: (v @ matrix.T) @ matrix, *matrix.shape)
    assert found.rank == 50
    assert np.all(found.share[hidden] == 0)
    np.testing.assert_allclose(found.share[seen], 1, rtol=1e-9)
    np.testing.assert_allclose(np.sqrt(np.sort(found.values[70:80])), 1e-10, rtol=1e-3)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(120), atol=1e-9)
    nothing = row_space(np.zeros_like, 90, 120)
    assert nothing.rank == 0
    assert not np.any(nothing.share)


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0 %"), (1e-9, "< 0.1 %"), (0.3014, "30.1 %"), (0.99999, "> 99.9 %"), (1 - 1e-12, "100 %"), (1.0, "100 %")],
)
def test_a_share_is_written_in_one_way(share, words):
    assert percentage(share) == words
