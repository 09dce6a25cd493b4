import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leakjax import InputError, audit, invert, observe, read_model
from leakjax.leakage.dense import PRIOR_DEVIATION
from leakjax.leakage.privacy import DPSGD
from leakjax.models.networks import Conv, ConvNet
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing.network import batch_gradient, read_network

LAYER = ["name", "unknowns", "rank", "rank_deficiency", "structural_rank", "condition", "dead_pixels", "weight"]
AUDIT = [
    "model",
    "input_shape",
    "c_m",
    "c_m_rounded",
    "layers",
    "unknowns",
    "leaked_dimensions",
    "leaked_fraction",
    "unseen_pixels",
    "spectrum",
    "noise",
    "verdict",
]
SHAPE = (7, 7, 2)


def network(*layers, activation=jnp.tanh, seed=0):
    """Convolutions on 7x7x2 and a dense head of four logits."""
    return ConvNet(
        [Conv(*layer) for layer in layers],
        rngs=nnx.Rngs(seed),
        activations=[activation] * len(layers),
        input_shape=SHAPE,
        outputs=4,
    )


def picture(seed=0, examples=1):
    return np.random.default_rng(seed).uniform(size=(examples, *SHAPE))


def jacobian(model, x, y):
    """dg/dx, (parameters, entries), by reverse mode."""
    read = read_model(model).astype("float64")
    net = read_network(read, SHAPE, len(x), jnp.float64)
    gradient = batch_gradient(net.logits, "softmax_cross_entropy", tuple(read.params))
    rows = jax.jacrev(lambda x: gradient(dict(read.variables), x, jnp.asarray(y)))(jnp.asarray(x))
    return np.concatenate([np.asarray(r).reshape(-1, x.size) for r in rows.values()])


@pytest.mark.parametrize(
    ("layers", "examples"),
    [(((3, 3, 1, 0),), 1), (((1, 3, 2, 0),), 1), pytest.param(((3, 3, 2, 0), (4, 2, 1, 0)), 2, marks=pytest.mark.slow)],
)
def test_spectrum_rank_map_and_bound_agree_with_a_dense_jacobian(layers, examples):
    model, x, y = network(*layers), picture(examples=examples), np.arange(examples)
    found = audit(model, SHAPE, images=x, labels=y, noise=[1e-4])
    with compute_in("float64"):
        _, s, rows = np.linalg.svd(jacobian(model, x, y), full_matrices=False)
    rank = int(np.sum(s > 1e-9 * s[0]))
    assert found.leaked_dimensions == rank
    assert found.leaked_fraction == rank / x.size
    np.testing.assert_allclose(found.spectrum[:rank], s[:rank], rtol=1e-5)
    np.testing.assert_allclose(found.leakage_map.ravel(), np.sum(rows[:rank] ** 2, axis=0), atol=1e-6)
    (point,) = found.noise
    assert point.effective_dimensions == np.sum(PRIOR_DEVIATION * s > 1e-4)
    if rank < x.size:
        assert point.psnr_bound is None
    else:
        np.testing.assert_allclose(point.psnr_bound, -10 * np.log10(np.mean(1e-8 / s**2)), rtol=1e-6)
        assert point.psnr_estimate_prior > point.psnr_bound - 1e-6


def test_layers_say_rank_and_pull_back():
    found = audit(network((6, 3, 1, 0), (5, 2, 1, 0), (1, 2, 1, 0)), SHAPE, images=picture(), noise=[])
    assert [layer.rank for layer in found.layers] == [layer.structural_rank for layer in found.layers]
    assert [layer.pull_back_depth for layer in found.layers] == [0, 0, 2, 0]
    assert found.leaked_dimensions == found.structural_leaked_dimensions


def test_relu_hides_outputs_and_says_so():
    found = audit(network((3, 3, 1, 0), activation=jax.nn.relu), SHAPE, images=picture())
    assert 0 < found.layers[0].known_share < 1
    assert "hides" in found.layers[0].sentence


def test_shapes_alone_are_enough():
    found = audit(network((3, 3, 1, 0)), SHAPE, shapes_only=True)
    assert found.leaked_dimensions is None
    assert found.noise is None
    assert found.spectrum is None
    assert [layer.rank for layer in found.layers] == [None, None]
    assert found.c_m == 0
    assert found.verdict == "exact"


def test_the_record_is_that_of_the_contract():
    for options in ({}, {"shapes_only": True}):
        held = json.loads(json.dumps(audit(network((3, 3, 2, 0)), SHAPE, **options).to_json(), allow_nan=False))
        assert set(AUDIT) <= held.keys()
        assert all(set(LAYER) <= layer.keys() for layer in held["layers"])
        assert held["c_m"] is not None
        assert held["input_shape"] == list(SHAPE)


def test_any_differentiable_model_is_audited():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 2, 4, 4, decode=False, deterministic=True, rngs=rngs)
            self.norm = nnx.BatchNorm(2, use_running_average=False, rngs=rngs)
            self.head = nnx.Linear(64, 3, rngs=rngs)

        def __call__(self, x):
            x = self.norm(x).reshape(x.shape[0], 16, 2)
            return self.head(nnx.tanh(self.attention(x)).reshape(x.shape[0], -1))

    found = audit(Net(nnx.Rngs(0)), (4, 4, 2), images=np.random.default_rng(0).uniform(size=(2, 4, 4, 2)))
    assert found.unknowns == 64
    assert 0 < found.leaked_dimensions <= 64


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_a_models_own_precision_does_not_blur_its_ranks(dtype):
    class Net(nnx.Module):
        def __init__(self, dtype):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(2, 1, (3, 3), padding="VALID", dtype=dtype, rngs=rngs)
            self.head = nnx.Linear(25, 4, dtype=dtype, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.gelu(self.conv(x)).reshape(len(x), -1))

    (rounded, exact) = (audit(Net(d), SHAPE, images=picture(), noise=[]) for d in (dtype, None))
    assert [layer.rank for layer in rounded.layers] == [layer.rank for layer in exact.layers]
    assert rounded.leaked_dimensions == exact.leaked_dimensions < rounded.unknowns
    assert any(jnp.dtype(dtype).name in remark for remark in rounded.remarks)
    assert not exact.remarks


@pytest.mark.parametrize(
    ("activation", "filters", "seed"),
    [(jnp.tanh, 1, 0), pytest.param(jax.nn.gelu, 1, 1, marks=pytest.mark.slow), (jax.nn.relu, 2, 2)],
)
def test_shapes_bound_what_leaks(activation, filters, seed):
    """Curvature lets a bias's gradient speak, too, and slopes that are not zero pass on what they fold."""
    model = network((filters, 3, 2, 0), (1, 2, 1, 0), activation=activation, seed=seed)
    found = audit(model, SHAPE, images=picture(seed), noise=[])
    assert found.leaked_dimensions <= found.structural_leaked_dimensions < found.unknowns


def test_a_batch_is_bounded_by_the_numbers_of_its_gradient():
    x, model = picture(examples=3), network((2, 3, 2, 0))
    found, shapes = (
        audit(model, SHAPE, images=x, labels=np.arange(3), noise=[]),
        audit(model, SHAPE, shapes_only=True),
    )
    numbers = sum(p.size for p in read_model(model).params.values())
    assert found.leaked_dimensions <= found.structural_leaked_dimensions == min(3 * 98, numbers)
    assert shapes.structural_leaked_dimensions <= 98
    assert "3 images" in found.sentence


def test_a_remainder_is_measured_where_gradients_are_withheld():
    model, x, y = network((3, 3, 1, 0)), picture(), np.zeros(1, int)
    found = audit(model, SHAPE, images=x, labels=y, noise=[])
    (held,) = found.withheld
    with compute_in("float64"):
        read = read_model(model).astype("float64")
        kept = tuple(p for p in read.params if not any(p.startswith(layer) for layer in held.layers))
        gradient = batch_gradient(read_network(read, SHAPE, 1, jnp.float64).logits, "softmax_cross_entropy", kept)
        rows = jax.jacrev(lambda x: gradient(dict(read.variables), x, jnp.asarray(y)))(jnp.asarray(x))
        matrix = np.concatenate([np.asarray(r).reshape(-1, x.size) for r in rows.values()])
    assert held.measured_dimensions == np.linalg.matrix_rank(matrix, tol=1e-9 * np.linalg.norm(matrix, 2))
    assert held.leakage_map.sum() == pytest.approx(held.measured_dimensions)
    assert set(found.maps()) == {"leakage_map", "withheld"}


def test_clipping_and_noise_of_a_batch_are_those_of_dp_sgd():
    model, x, y = network((3, 3, 1, 0)), picture(examples=2), np.array([0, 3])
    private = DPSGD(0.05, (0.1,), steps=1, delta=1e-5)
    found = audit(model, SHAPE, images=x, labels=y, noise=[], dp_sgd=private)
    with compute_in("float64"):
        read = read_model(model).astype("float64")
        net = read_network(read, SHAPE, 1, jnp.float64)
        gradient = batch_gradient(net.logits, "softmax_cross_entropy", tuple(read.params))

        def sent(x):
            g = [
                jax.flatten_util.ravel_pytree(gradient(dict(read.variables), x[k : k + 1], y[k : k + 1]))[0]
                for k in (0, 1)
            ]
            return sum(0.05 * v / jnp.linalg.norm(v) for v in g) / 2

        s = np.linalg.svd(np.asarray(jax.jacrev(sent)(jnp.asarray(x))).reshape(-1, x.size), compute_uv=False)
    (point,) = found.noise
    assert point.sigma == pytest.approx(0.1 * 0.05 / 2)
    assert point.effective_dimensions == np.sum(PRIOR_DEVIATION * s > point.sigma)
    assert point.epsilon > 1


def test_a_result_draws_itself():
    found = audit(network((3, 3, 1, 0)), SHAPE, shapes_only=True)
    assert found.to_html().startswith("<!DOCTYPE html>")
    assert "<iframe srcdoc=" in found._repr_html_()
    assert "<script" not in found._repr_html_()


def test_a_gradient_of_nothing_is_refused():
    with pytest.raises(InputError, match="zero everywhere"):
        audit((lambda params, x: 0 * x.reshape(len(x), -1) @ params["w"], {"w": jnp.ones((98, 1))}), SHAPE)


def test_weights_that_are_no_numbers_are_refused():
    model = network((3, 3, 1, 0))
    model.conv1.kernel[...] = jnp.full((3, 3, 2, 3), jnp.nan)
    with pytest.raises(InputError, match="finite"):
        audit(model, SHAPE)


def test_changes_lower_what_leaks():
    found = audit(network((6, 3, 1, 0), (5, 2, 1, 0)), SHAPE, shapes_only=True)
    assert found.changes
    assert all(change.leaked_dimensions < found.structural_leaked_dimensions for change in found.changes)
    (held,) = found.withheld
    assert held.leaked_dimensions < found.unknowns


def test_a_change_does_what_it_says():
    """The best change of a layer's filters or stride, built for real, leaks what was promised."""
    found = audit(network((3, 3, 1, 0)), SHAPE, shapes_only=True)
    (change,) = found.changes
    promised = {"1 filters for 3": (1, 3, 1, 0), "stride 2 for 1": (3, 3, 2, 0), "kernel 1 for 3": (3, 1, 1, 0)}
    layer = next(layer for text, layer in promised.items() if change.change.startswith(text))
    assert audit(network(layer), SHAPE, images=picture(), noise=[]).leaked_dimensions == change.leaked_dimensions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": [-1.0]}, "noise"),
        ({"noise": [float("nan")]}, "noise"),
        ({"images": np.zeros((0, *SHAPE))}, "images"),
        ({"images": np.full((1, *SHAPE), 2.0)}, "input_range"),
        ({"images": np.zeros((1, 3, 3, 1))}, "images"),
        ({"images": np.zeros((1, *SHAPE)), "labels": np.array([9])}, "labels"),
        ({"labels": np.array([1])}, "labels"),
        ({"loss": "hinge"}, "loss"),
        ({"input_range": (1.0, 0.0)}, "input_range"),
        ({"input_range": (0.0, 1.0, 2.0)}, "input_range"),
        ({"input_range": ("a", "b")}, "input_range"),
        ({"noise": None}, "noise"),
        ({"noise": 0.1}, "noise"),
        ({"images": [[1.0], [1.0, 2.0]]}, "images"),
        ({"dp_sgd": DPSGD(1.0, (1.0,)), "shapes_only": True}, "dp_sgd"),
        ({"dp_sgd": DPSGD(-1.0, (1.0,))}, "clip"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        audit(network((3, 3, 1, 0)), SHAPE, **options)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(InputError, match="no parameters"):
        audit((lambda params, x: x.reshape(len(x), -1), {}), SHAPE)


def test_an_absurd_shape_is_refused():
    with pytest.raises(InputError, match="input_shape"):
        audit(network((3, 3, 1, 0)), (0, 7, 2))
    with pytest.raises(InputError, match="input_shape"):
        audit(network((3, 3, 1, 0)), (7.5, 7, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "leaked", "unseen"), [("cnn4_c3", 2883, 63), ("cnn6d", 3072, 0), ("cnn2_c4", 926, 0)])
def test_golden_leakage(name, leaked, unseen):
    from leakjax.models import MODELS, build_model

    spec = MODELS[name]
    options = {"loss": spec.loss, "input_range": spec.input_range, "noise": []}
    found = audit(build_model(name, activation="tanh"), spec.input_shape, **options)
    assert (found.leaked_dimensions, found.unseen_pixels) == (leaked, unseen)
    if name == "cnn4_c3":
        gone = np.max(found.leakage_map[0], axis=-1) < 1e-6
        assert gone[-1].all()
        assert gone[:, -1].all()


def test_many_unknowns_are_estimated(monkeypatch):
    import importlib

    module = importlib.import_module("leakjax.leakage.measure")
    model, x = network((1, 3, 2, 0)), picture()
    exact = audit(model, SHAPE, images=x, labels=np.array([0]), noise=[1e-4])
    monkeypatch.setattr(module, "LARGEST", 10)
    found = audit(model, SHAPE, images=x, labels=np.array([0]), noise=[1e-4])
    assert found.leaked_dimensions is None
    np.testing.assert_allclose(found.noise[0].effective_dimensions, exact.noise[0].effective_dimensions, atol=8)
    np.testing.assert_allclose(found.spectrum[0], exact.spectrum[0], rtol=1e-3)
    assert "estimated" in found.remarks[0]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [((6, 3, 1, 0),), ((8, 3, 1, 0), (8, 3, 1, 1))])
@pytest.mark.parametrize("level", [40, 28])
def test_attacks_come_within_three_decibels_of_the_bound(layers, level):
    model, x, y = network(*layers), picture(3), np.array([2])
    found = audit(model, SHAPE, images=x, labels=y, noise=[1e-6])
    sigma = 1e-6 * 10 ** ((found.noise[0].psnr_bound - level) / 20)
    sent, rng = observe(model, (x, y)), np.random.default_rng(0)
    noisy = {p: np.asarray(g) + sigma * rng.normal(size=(16, *g.shape[1:])) for p, g in sent.gradients.items()}
    reached = []
    for attack in ("match", "copa"):
        options = {"attack": attack, "labels": [2] * 16, "prior": "none"}
        answer = invert(dataclasses.replace(sent, gradients=noisy), **options)
        reached.append(-10 * np.log10(np.mean((answer.images - x) ** 2)))
    sampling = 0.3  # dB: half a standard error of a mean square of 16 draws whose few worst directions hold most of it
    assert level - 3 - sampling < max(reached) < level + 0.5
