"""Defenses: Optax's contract, each one's own mathematics, and attackers who know them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_pull_back import SHAPE, network, psnr

from leakjax import InputError, invert, observe, read_model
from leakjax.captures.capture import read_capture, write_capture
from leakjax.client.defenses import DEFENSES, Client, build_defense
from leakjax.client.defenses.soteria import soteria_mask
from leakjax.constraints.priors import from_natural, to_natural
from leakjax.leakage.dense import dense_leakage, variances
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing.network import batch_gradient, client_update, read_network

RANDOM = {"gaussian", "laplace", "dp_sgd", "qsgd"}
MODEL = network(jnp.tanh, filters=12)
IMAGES = np.random.default_rng(0).uniform(size=(2, *SHAPE))
LABELS = np.array([4, 1])


def client(count=1):
    return Client(read_model(*MODEL), jnp.asarray(IMAGES[:count]))


def gradient(count=1, dtype=float):
    """A gradient of one example or more, on a leading axis where there are more."""
    sent = observe(MODEL, (IMAGES[:count], LABELS[:count])).gradients
    return {p: jnp.asarray(g[0] if count == 1 else g, dtype) for p, g in sent.items()}


def built(name, seed=0):
    return build_defense(name).transformation(jax.random.key(seed), client())


def update(transformation, g):
    return transformation.update(g, transformation.init(g), g)[0]


def given(name, dtype=float):
    """What a defense takes: per-example gradients on a leading axis, or one gradient."""
    g = gradient(dtype=dtype)
    return jax.tree.map(lambda a: a[None], g) if DEFENSES[name].per_example else g


def same(a, b):
    return all(bool(jnp.all(x == y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def flat(g):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", DEFENSES)
def test_shapes_and_dtypes_are_kept_compiled_or_not(name, dtype):
    transformation, g = built(name), given(name, dtype)
    state = transformation.init(gradient(dtype=dtype))
    found, _ = transformation.update(g, state, None)
    compiled, _ = jax.jit(lambda g, s: transformation.update(g, s, None))(g, state)
    for path, a in gradient(dtype=dtype).items():
        assert (found[path].shape, found[path].dtype) == (a.shape, a.dtype)
        np.testing.assert_allclose(compiled[path], found[path], rtol=1e-5, atol=10 * np.finfo(dtype).eps)
    assert not same(found, gradient(dtype=dtype)) or name in ("clip", "dp_sgd")


@pytest.mark.parametrize("name", DEFENSES)
def test_they_compose_in_a_chain(name):
    g = given(name)
    alone = update(built(name), g)
    chained = update(optax.chain(built(name), optax.scale(-2.0)), g)
    np.testing.assert_allclose(flat(chained), -2 * flat(alone))


@pytest.mark.parametrize("name", DEFENSES)
def test_randomness_is_the_seed_s_and_every_victim_s_own(name):
    images, labels = np.repeat(IMAGES[:1], 2, axis=0), np.repeat(LABELS[:1], 2)
    first, again, other = (observe(MODEL, (images, labels), defense=name, seed=s) for s in (3, 3, 4))
    for path in first.gradients:
        np.testing.assert_array_equal(first.gradients[path], again.gradients[path])
    a, b = flat({p: g[0] for p, g in first.gradients.items()}), flat({p: g[1] for p, g in first.gradients.items()})
    assert np.any(a != b) == (name in RANDOM)
    assert np.any(a != flat({p: g[0] for p, g in other.gradients.items()})) == (name in RANDOM)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_a_second_update_draws_anew(name):
    transformation, g = built(name), given(name)
    first, state = transformation.update(g, transformation.init(gradient()), None)
    assert not same(first, transformation.update(g, state, None)[0])


@pytest.mark.parametrize(("spec", "deviation"), [("gaussian:0.01", 0.01), ("laplace:0.01", 0.01 * 2**0.5)])
def test_noise_has_its_deviation_and_no_mean(spec, deviation):
    noise = flat(update(built(spec), gradient())) - flat(gradient())
    assert abs(noise.std() / deviation - 1) < 0.05
    assert abs(noise.mean()) < 4 * deviation / np.sqrt(noise.size)
    fourth = np.mean(noise**4) / np.mean(noise**2) ** 2  # 3 for a Gaussian, 6 for a Laplacian
    assert fourth < 3.6 if spec.startswith("gaussian") else fourth > 4.2


def test_clipping_shortens_to_the_norm_and_keeps_the_direction():
    g = flat(gradient())
    size = np.linalg.norm(g)
    np.testing.assert_allclose(flat(update(built(f"clip:{size / 3}"), gradient())), g / 3)
    np.testing.assert_allclose(flat(update(built(f"clip:{size * 3}"), gradient())), g)


def test_dp_sgd_clips_every_example_of_a_batch_and_adds_noise_once():
    clip = 0.4 * float(np.linalg.norm(flat(gradient())))
    each = [flat(jax.tree.map(lambda a, b=b: a[b], gradient(2))) for b in range(2)]
    mean = sum(g * min(1, clip / np.linalg.norm(g)) for g in each) / 2
    found = observe(MODEL, (IMAGES, LABELS), batch_size=2, defense=f"dp_sgd:{clip},0")
    np.testing.assert_allclose(flat({p: g[0] for p, g in found.gradients.items()}), mean, rtol=1e-9, atol=1e-13)
    found = observe(MODEL, (IMAGES, LABELS), batch_size=2, defense=f"dp_sgd:{clip},0.1")
    noise = flat({p: g[0] for p, g in found.gradients.items()}) - mean
    assert abs(noise.std() / (0.1 * clip / 2) - 1) < 0.05


@pytest.mark.parametrize("pruned", [0.5, 0.9, 0.999])
def test_top_k_keeps_the_largest_of_every_parameter(pruned):
    found = update(built(f"top_k:{pruned}"), gradient())
    for path, g in gradient().items():
        count = max(1, int(np.ceil((1 - pruned) * g.size - 1e-9)))
        order = np.argsort(-np.abs(np.ravel(g)))[:count]
        expected = np.zeros(g.size)
        expected[order] = np.ravel(g)[order]
        np.testing.assert_array_equal(np.ravel(found[path]), expected)


def test_signs_are_signs():
    np.testing.assert_array_equal(flat(update(built("sign"), gradient())), np.sign(flat(gradient())))


def test_qsgd_rounds_to_a_level_beside_and_is_unbiased():
    g = np.random.default_rng(0).normal(size=40)
    step = float(np.linalg.norm(g)) / 4
    draws = np.stack([update(built("qsgd:4", seed), {"w": jnp.asarray(g)})["w"] for seed in range(300)])
    np.testing.assert_allclose(draws / step, np.round(draws / step), atol=1e-9)
    assert np.max(np.abs(draws - g)) <= step * (1 + 1e-9)
    assert np.max(np.abs(draws.mean(axis=0) - g)) < 5 * step / 2 / np.sqrt(300)


def test_soteria_hides_the_features_of_least_sensitivity_over_size():
    """Against r and dr/dx written by hand: two convolutions' tanh, flattened."""
    apply, params = MODEL
    unit = {**params, "c": jnp.eye(len(params["c"])), "d": jnp.zeros(len(params["c"]))}
    values = np.asarray(apply(unit, jnp.asarray(IMAGES)))
    slopes = np.stack([jax.jacfwd(lambda x: apply(unit, x[None])[0])(jnp.asarray(x)) for x in IMAGES])
    sizes = np.linalg.norm(slopes.reshape(*values.shape, -1), axis=2)
    scores = np.sum(sizes / np.abs(values), axis=0)
    expected = np.ones(len(scores))
    expected[np.argsort(scores)[: int(0.3 * len(scores))]] = 0
    mask = soteria_mask(*client(2), pruned=0.3)
    np.testing.assert_array_equal(mask["c"], expected[:, None])
    found, plain = (observe(MODEL, (IMAGES, LABELS), batch_size=2, defense=d).gradients for d in ("soteria:0.3", None))
    np.testing.assert_allclose(found["c"][0], plain["c"][0] * expected[:, None], rtol=1e-12)
    np.testing.assert_array_equal(found["a"], plain["a"])


def test_local_steps_are_the_hand_written_loop():
    apply, params = MODEL

    def loss(p):
        logits = apply(p, jnp.asarray(IMAGES))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), LABELS])

    here = {p: jnp.asarray(a) for p, a in params.items()}
    for _ in range(3):
        here = jax.tree.map(lambda a, g: a - 0.05 * g, here, jax.grad(loss)(here))
    found = observe(MODEL, (IMAGES, LABELS), batch_size=2, local_steps=3, learning_rate=0.05)
    assert (found.local_steps, found.learning_rate, found.defense) == (3, 0.05, None)
    with compute_in("float64"):
        logits = read_network(found.model, SHAPE, 2, jnp.float64).logits
        program = client_update(logits, "softmax_cross_entropy", tuple(params), 3, 0.05)
        unrolled = program(dict(found.model.variables), jnp.asarray(IMAGES), jnp.asarray(LABELS))
    for path in params:
        np.testing.assert_allclose(found.gradients[path][0], (params[path] - here[path]) / 0.05, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(unrolled[path], found.gradients[path][0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("steps", [2, 5])
def test_an_update_of_local_steps_is_matched(steps):
    found = observe(MODEL, (IMAGES[:1], LABELS[:1]), local_steps=steps, learning_rate=0.5)
    answer = invert(found, attack="match")
    assert answer.labels[0] == LABELS[0]
    assert answer.certificates[0].status == "exact"
    assert psnr(answer.images, IMAGES[:1]) > 150


def scored(spec, **options):
    answer = invert(observe(MODEL, (IMAGES[:1], LABELS[:1]), defense=spec), attack="match", **options)
    return psnr(answer.images, IMAGES[:1]), answer.certificates[0].status


@pytest.mark.parametrize(
    "spec", [pytest.param("top_k:0.5", marks=pytest.mark.slow), "clip:0.1", "soteria:0.5", "dp_sgd:0.1,0"]
)
def test_told_of_what_is_missing_the_attack_is_exact(spec):
    knowing, status = scored(spec)
    assert knowing > 150
    assert status == "exact" or spec.startswith("dp_sgd")
    blind, status = scored(spec, adaptive=False)
    if spec.startswith(("clip", "dp_sgd")):  # a factor, that the last layer shows
        assert blind > 150
    else:
        assert blind < 40
    assert status == ("exact" if spec.startswith("clip") else "failed")


def test_what_pruning_leaves_open_is_counted():
    answer = invert(observe(MODEL, (IMAGES[:1], LABELS[:1]), defense="top_k:0.99"), attack="match")
    certificate = answer.certificates[0]
    assert certificate.status == "ambiguous"
    kept = sum(max(1, int(np.ceil(0.01 * np.size(p) - 1e-9))) for p in MODEL[1].values())
    assert certificate.leaked_dimensions <= kept < 128


def test_the_noise_s_bound_is_reached():
    """Within 3 dB of Cramer-Rao, in the mean squared error over draws."""
    sigma, errors = 1e-4, []
    with compute_in("float64"):
        model = read_model(*MODEL)
        logits = read_network(model, SHAPE, 1, jnp.float64).logits
        program = batch_gradient(logits, "softmax_cross_entropy", tuple(model.params))
        found = dense_leakage(program, dict(model.variables), jnp.asarray(IMAGES[:1]), jnp.asarray(LABELS[:1]), 1.0)
    bound = float(np.mean(variances(found, sigma)))
    for seed in range(4):
        sent = observe(MODEL, (IMAGES[:1], LABELS[:1]), defense=f"gaussian:{sigma}", seed=seed)
        answer = invert(sent, attack="match", prior="none")
        errors.append(np.mean((answer.images - IMAGES[:1]) ** 2))
        assert answer.certificates[0].status == "approximate"
    assert 0.5 < np.mean(errors) / bound < 2


@pytest.mark.parametrize("spec", [name for name, one in DEFENSES.items() if one.server.lossy and name != "dp_sgd"])
def test_under_noise_or_rounding_an_answer_is_approximate_at_best(spec):
    answer = invert(observe(MODEL, (IMAGES[:1], LABELS[:1]), defense=spec), attack="match")
    knowing, certificate = psnr(answer.images, IMAGES[:1]), answer.certificates[0]
    assert certificate.status == ("failed" if spec in ("sign", "qsgd") else "approximate")  # too large an error
    assert certificate.psnr_estimate is None or abs(certificate.psnr_estimate - knowing) <= 3
    assert certificate.reason
    assert knowing > 10


def test_layer_wise_attacks_certify_no_defended_gradient_and_refuse_updates():
    found = observe(MODEL, (IMAGES[:1], LABELS[:1]), defense="top_k:0.5")
    certificate = invert(found, attack="rgap").certificates[0]
    assert (certificate.status, certificate.layer) == ("failed", "defense")
    found = observe(MODEL, (IMAGES[:1], LABELS[:1]), local_steps=2, learning_rate=0.1)
    with pytest.raises(InputError, match=r"2 local_steps; use attack='match'"):
        invert(found)


def test_a_transformation_of_one_s_own():
    mine = optax.chain(optax.clip_by_global_norm(0.1), optax.add_noise(1e-8, 0.0, 0))
    found = observe(MODEL, (IMAGES[:1], LABELS[:1]), defense=mine)
    assert found.defense == "custom"
    assert invert(found, attack="match").certificates[0].status == "failed"


def test_specifications_round_trip():
    for name in DEFENSES:
        setting = build_defense(name)
        assert build_defense(setting.spec) == setting
    assert build_defense("dp_sgd:2").values == {"clip": 2.0, "noise_multiplier": 1e-3}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gausian:1e-3", "did you mean 'gaussian'"),
        ("gaussian:much", "sigma must be a number, got 'much'"),
        ("gaussian:-1", "sigma must be above 0"),
        ("gaussian:nan", "sigma must be above 0"),
        ("gaussian:1,2", "takes sigma; got 2 values"),
        ("sign:1", "takes no parameter"),
        ("top_k:1", "pruned must be above 0 and below 1"),
        ("qsgd:2.5", "levels must be a whole number"),
        ("dp_sgd:1,-1", "noise_multiplier must be at least 0"),
    ],
)
def test_bad_specifications_say_what_is_wrong(spec, words):
    with pytest.raises(InputError, match=words):
        observe(MODEL, (IMAGES[:1], LABELS[:1]), defense=spec)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local_steps": 0}, "local_steps must be a positive integer"),
        ({"local_steps": 2}, "learning_rate is needed"),
        ({"local_steps": 2, "learning_rate": -1.0}, "learning_rate must be positive"),
        ({"local_steps": 2, "learning_rate": 0.1, "defense": "dp_sgd"}, "it takes one local step"),
        ({"defense": 3}, "defense must be a specification"),
    ],
)
def test_bad_clients_say_what_is_wrong(options, words):
    with pytest.raises(InputError, match=words):
        observe(MODEL, (IMAGES[:1], LABELS[:1]), **options)


def test_captures_say_what_a_server_is_told(tmp_path):
    sent = observe(MODEL, (IMAGES[:1], LABELS[:1]), defense="top_k:0.5", local_steps=2, learning_rate=0.1)
    write_capture(sent, tmp_path / "c.npz")
    read = read_capture(tmp_path / "c.npz", sent.model)
    assert (read.defense, read.local_steps, read.learning_rate) == ("top_k:0.5", 2, 0.1)
    write_capture(observe(MODEL, (IMAGES[:1], LABELS[:1])), tmp_path / "plain.npz")
    meta = json.loads(str(np.load(tmp_path / "plain.npz")["meta"]))
    assert not {"defense", "local_steps", "learning_rate"} & set(meta)


def test_amplitudes_and_images_are_each_other_s_inverse(rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 3)))
    np.testing.assert_allclose(from_natural(to_natural(x)), x, atol=1e-12)


def test_the_command_line_defends(run, tmp_path):
    options = "--model", "cnn3_c1", "--defense", "clip:0.01", "--json"
    result = run("capture", *options, "--out", tmp_path)
    assert result.exit_code == 0
    meta = json.loads(str(np.load(tmp_path / "capture.npz")["meta"]))
    assert meta["defense"] == "clip:0.01"
    listed = json.loads(run("list", "defenses", "--json").stdout)
    assert set(listed) == set(DEFENSES)
    bad = run("invert", *options[:2], "--local-steps", "2")
    assert bad.exit_code == 2
    assert "learning_rate is needed" in bad.stderr
    bad = run("invert", "--capture", tmp_path / "capture.npz", "--defense", "sign")
    assert bad.exit_code == 2
    assert "a capture says its own defense" in bad.stderr
