import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from leakjax import guard as guarding
from leakjax import invert, observe
from leakjax.captures.weights import read_weights, write_weights
from leakjax.client.training.loop import train
from leakjax.datasets import to_range, train_and_test
from leakjax.errors import InputError
from leakjax.models.networks import Conv, ConvNet
from leakjax.models.reader import read_model

NETS = """
from flax import nnx
from leakjax.models.networks import Conv, ConvNet

def small(seed=0, outputs=10):
    layers = [Conv(6, 3, 1, 1), Conv(8, 3, 2, 1)]
    activations = [nnx.tanh, nnx.tanh]
    return ConvNet(layers, rngs=nnx.Rngs(seed), activations=activations, input_shape=(8, 8, 1), conv_bias=True)
"""


def small(seed=0, outputs=10):
    layers = [Conv(6, 3, 1, 1), Conv(8, 3, 2, 1)]
    return ConvNet(
        layers,
        rngs=nnx.Rngs(seed),
        activations=[nnx.tanh] * 2,
        input_shape=(8, 8, 1),
        conv_bias=True,
        outputs=outputs,
    )


@pytest.fixture(scope="module")
def digits():
    return train_and_test("digits", (8, 8, 1))


@pytest.fixture(scope="module")
def trained(digits):
    return train(small(), digits[0], test=digits[1], epochs=6, optimizer=optax.adam(3e-3))


def test_learns_digits(trained):
    assert trained.loss.shape == (6,)
    assert trained.accuracy.shape == (7,)
    assert np.all(np.diff(trained.loss) < 0)
    assert trained.accuracy[0] < 0.3
    assert trained.accuracy[-1] > 0.9
    assert list(trained.kept) == list(range(7))


def test_accuracy_is_the_share_of_right_labels(trained, digits):
    images, labels = digits[1]
    logits = trained.model.apply(trained.model.variables, jnp.asarray(images / 255, jnp.float32))
    assert trained.accuracy[-1] == pytest.approx(np.mean(np.argmax(np.asarray(logits), axis=1) == labels), abs=0.003)
    before = read_model(small())
    np.testing.assert_array_equal(trained.at(0).params["head/kernel"], before.params["head/kernel"])


def test_one_step_is_the_mean_of_defended_gradients(digits):
    """theta' = theta - lr mean_k defense(g_k), each g_k of `observe`."""
    images, labels = to_range(digits[0].images[:6], (0.0, 1.0)), digits[0].labels[:6]
    found = train(
        small(),
        (images, labels),
        epochs=1,
        batch_size=1,
        clients=6,
        optimizer=optax.sgd(0.5),
        defense=optax.clip_by_global_norm(0.1),
        dtype="float64",
    )
    observation = observe(small(), (images, labels))
    norms = np.sqrt(sum(np.sum(g.reshape(6, -1) ** 2, axis=1) for g in observation.gradients.values()))
    assert norms.min() > 0.1
    for path, g in observation.gradients.items():
        clipped = np.mean(g * (0.1 / norms).reshape(-1, *[1] * (g.ndim - 1)), axis=0)
        before = np.asarray(observation.model.params[path])
        np.testing.assert_allclose(found.model.params[path], before - 0.5 * clipped, atol=1e-12)


def test_same_seed_same_result(digits):
    data = digits[0].images[:200], digits[0].labels[:200]
    one, same, other = (train(small(), data, epochs=1, seed=seed, keep=[1]) for seed in (3, 3, 4))
    for path, a in one.kept[1].items():
        np.testing.assert_array_equal(a, same.kept[1][path])
    assert not np.array_equal(one.kept[1]["head/kernel"], other.kept[1]["head/kernel"])
    with pytest.raises(InputError, match="epoch 0 was not kept; kept are 1"):
        one.at(0)


def test_chunks_change_nothing(digits, monkeypatch):
    data = digits[0].images[:200], digits[0].labels[:200]
    whole = train(small(), data, epochs=1, batch_size=20, dtype="float64")
    monkeypatch.setattr("leakjax.client.training.steps.BYTES_AT_ONCE", 3 * 20 * 64)
    parts = train(small(), data, epochs=1, batch_size=20, dtype="float64")
    for path, a in whole.model.params.items():
        np.testing.assert_allclose(a, parts.model.params[path], atol=1e-13)


def test_defended_training_learns_less(trained, digits):
    defense = optax.chain(optax.clip_by_global_norm(0.1), optax.add_noise(0.05**2, 0.0, 0))
    found = train(small(), digits[0], test=digits[1], epochs=6, optimizer=optax.adam(3e-3), defense=defense, keep=[])
    assert found.kept == {}
    assert 0.3 < found.accuracy[-1] < trained.accuracy[-1] - 0.01


@pytest.mark.parametrize("spec", ["gaussian:0.05", "dp_sgd:1.0,0.5", "sign", "qsgd:4", "soteria:0.5", "top_k:0.9"])
def test_defenses_by_name_send_what_observe_says(spec, digits):
    """One step of SGD at rate 1 moves the weights by what one client sends, noise apart."""
    images, labels = to_range(digits[0].images[:4], (0.0, 1.0)), digits[0].labels[:4]
    silent = {"gaussian:0.05": "gaussian:1e-12", "dp_sgd:1.0,0.5": "dp_sgd:1.0,0"}.get(spec, spec)
    found = train(
        small(), (images, labels), epochs=1, batch_size=4, optimizer=optax.sgd(1.0), defense=silent, dtype="float64"
    )
    moved = {p: found.kept[0][p] - found.kept[1][p] for p in found.kept[0]}
    if spec == "qsgd:4":  # rounds at random: the levels are those of the gradient sent
        plain = observe(small(), (images, labels), batch_size=4).gradients
        for path, a in moved.items():
            step = np.linalg.norm(plain[path]) / 4
            assert np.all(np.abs(a - plain[path][0]) < step * (1 + 1e-9))
            np.testing.assert_allclose(a / step, np.round(a / step), atol=1e-9)
        return
    sent = observe(small(), (images, labels), batch_size=4, defense=silent).gradients
    for path, a in moved.items():
        np.testing.assert_allclose(a, sent[path][0], atol=1e-10)


@pytest.mark.parametrize("spec", ["gaussian:0.5", "dp_sgd:1.0,2.0"])
def test_named_noise_differs_by_client_and_step(spec, digits):
    """B constant examples and no signal: K clients' mean noise is K^-1/2 of one's, and no step repeats it."""
    data = np.zeros((32, 8, 8, 1)), np.zeros(32, int)
    spread = {}
    for clients in (1, 16):
        run = functools.partial(
            train,
            small(),
            data,
            batch_size=2,
            clients=clients,
            optimizer=optax.sgd(1e-6),
            defense=spec,
            dtype="float64",
        )
        found = run(epochs=2)
        first, second = ({p: found.kept[e + 1][p] - found.kept[e][p] for p in found.kept[e]} for e in (0, 1))
        path = max(first, key=lambda p: first[p].size)
        steps = 16 // clients
        spread[clients] = first[path].std() / 1e-6 / np.sqrt(steps)
        assert not np.allclose(first[path], second[path], rtol=1e-3)
        assert abs(np.corrcoef(np.ravel(first[path]), np.ravel(second[path]))[0, 1]) < 0.3
    sigma = {"gaussian:0.5": 0.5, "dp_sgd:1.0,2.0": 1.0}[spec]
    assert spread[1] == pytest.approx(sigma, rel=0.15)
    assert spread[16] == pytest.approx(sigma / 4, rel=0.15)


def test_clients_draw_noise_of_their_own(digits):
    """Noise alone, averaged over K clients, has standard deviation sigma / sqrt(K)."""
    data = digits[0].images[:64], digits[0].labels[:64]
    noise = optax.chain(optax.scale(0.0), optax.add_noise(1.0, 0.0, 0))
    spread = {}
    for clients in (1, 16):
        found = train(
            small(), data, epochs=1, batch_size=64 // clients, clients=clients, optimizer=optax.sgd(1.0), defense=noise
        )
        moved = [np.ravel(found.kept[1][path] - found.kept[0][path]) for path in found.kept[1]]
        spread[clients] = np.concatenate(moved).std()
    assert spread[1] == pytest.approx(1, rel=0.1)
    assert spread[16] == pytest.approx(1 / 4, rel=0.1)


def test_the_guard_is_a_defense(digits):
    data = to_range(digits[0].images[:8], (0.0, 1.0)), digits[0].labels[:8]
    blocks = guarding.guard(guarding.loss_of(small()), max_leaked_fraction=1e-3).transformation
    found = train(small(), data, epochs=1, batch_size=1, clients=2, defense=blocks, optimizer=optax.sgd(1.0))
    for path, a in found.kept[1].items():
        np.testing.assert_array_equal(a, found.kept[0][path])


def test_one_logit(digits):
    images, labels = digits[0].images, digits[0].labels % 2
    loss = "sigmoid_binary_cross_entropy"
    found = train(small(outputs=1), (images, labels), test=(images, labels), epochs=3, loss=loss)
    assert found.accuracy[-1] > 0.8


def test_buffers_stay_as_they_are(digits):
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(1, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(x).reshape(len(x), -1))

    net = Normed(nnx.Rngs(0))
    found = train(net, digits[0], epochs=1)
    assert set(found.model.buffers) == set(read_model(net).buffers)
    np.testing.assert_array_equal(found.model.buffers["norm/mean"], [0])
    assert not np.array_equal(found.kept[1]["norm/scale"], found.kept[0]["norm/scale"])


def test_data_source_and_arrays_agree(digits):
    images, labels = digits[0].images[:40], digits[0].labels[:40]
    source = [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)]
    run = functools.partial(train, small(), epochs=1, batch_size=8, input_range=(-1.0, 1.0), dtype="float64")
    found = [run(data) for data in (source, (images, labels), (to_range(images, (-1.0, 1.0)), labels))]
    for path, a in found[0].model.params.items():
        for other in found[1:]:
            np.testing.assert_allclose(a, other.model.params[path], atol=1e-12)


def test_weights_round_trip(trained, tmp_path):
    write_weights(trained.model, tmp_path / "w.npz")
    found = read_weights(tmp_path / "w.npz", read_model(small(seed=5)))
    for path, a in trained.model.params.items():
        np.testing.assert_array_equal(found.params[path], a)
    with pytest.raises(InputError, match=r"--weights: parameter 'head/bias' has shape \(10,\), the model's has \(1,\)"):
        read_weights(tmp_path / "w.npz", read_model(small(outputs=1)))


def test_trained_models_gradient_inverts(trained, digits):
    images, labels = to_range(digits[1].images[:1], (0.0, 1.0)), digits[1].labels[:1]
    result = invert(observe(trained.at(6), (images, labels)), attack="rgap")
    assert -10 * np.log10(np.mean((np.asarray(result.images) - images) ** 2)) > 120


IMAGES, LABELS = np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int64)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((IMAGES, LABELS), {"epochs": -1}, "epochs must be an integer >= 0"),
        ((IMAGES, LABELS), {"epochs": 1.5}, "epochs must be an integer"),
        ((IMAGES, LABELS), {"batch_size": 0}, "batch_size must be an integer >= 1"),
        ((IMAGES, LABELS), {"batch_size": 4, "clients": 3}, "takes 12 examples a step; data has 8"),
        ((IMAGES, LABELS), {"seed": -1}, "seed must be"),
        ((IMAGES, LABELS), {"keep": [2]}, r"keep must name epochs in 0\.\.1, got 2"),
        ((IMAGES, LABELS), {"loss": "hinge"}, "unknown loss"),
        ((IMAGES, LABELS), {"dtype": "float16"}, "dtype must be one of"),
        ((IMAGES, LABELS), {"test": (IMAGES, LABELS[:3])}, "test: labels must be 8 integers"),
        ((IMAGES, LABELS), {"input_range": (1.0, 0.0)}, "input_range must be"),
        ((IMAGES, LABELS + 10), {}, r"data: labels are 10\.\.10, a model with 10 outputs has 0\.\.9"),
        ((IMAGES, LABELS - 1), {}, r"labels are -1"),
        ((IMAGES, LABELS / 1.0), {}, "labels must be 8 integers, got float64"),
        ((IMAGES + 2.0, LABELS), {}, r"data: images lie in \[2, 2\], outside"),
        ((IMAGES * np.nan, LABELS), {}, "outside input_range"),
        ((IMAGES.astype(int), LABELS), {}, "images must be uint8 or floating"),
        ((IMAGES[:0], LABELS[:0]), {}, "images must be uint8 or floating"),
        ((IMAGES[:, :4], LABELS), {}, "model cannot run"),
        ((IMAGES, LABELS), {"defense": "gaussian:x"}, "sigma must be a number"),
        ((IMAGES, LABELS), {"defense": "nothing"}, "unknown defense"),
        ((IMAGES, LABELS), {"defense": 3}, "defense must be a specification"),
        (IMAGES, {}, "data must be a pair"),
        ([], {}, "data: the data source holds no image"),
        ((IMAGES, LABELS), {"optimizer": optax.sgd(float("nan"))}, "training diverged in epoch 1"),
    ],
)
def test_bad_input(data, options, message):
    with pytest.raises(InputError, match=message):
        train(small(), data, **{"epochs": 1, "batch_size": 4, **options})


def test_x64_setting_is_restored(digits):
    train(small(), (digits[0].images[:32], digits[0].labels[:32]), epochs=1)
    assert jax.config.values["jax_enable_x64"]


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "training_nets.py").write_text(NETS)
    return "training_nets:small", "--input-shape", "8,8,1"


def test_command_line(run, nets, tmp_path):
    options = ("--dataset", "digits", "--limit", "200", "--epochs", "2", "--keep", "0,2", "--out", "o")
    result = run("train", "--model", *nets, *options, "--clip", "1", "--noise", "0.001", "--clients", "2", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == json.loads((tmp_path / "o" / "training.json").read_text())
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "training.json",
        "weights-0.npz",
        "weights-2.npz",
    ]
    assert len(summary["train_loss"]) == 2
    assert len(summary["test_accuracy"]) == 3
    again = run("capture", "--model", *nets, "--dataset", "digits", "--weights", "o/weights-2.npz", "--out", "c")
    assert again.exit_code == 0, again.stderr
    with np.load(tmp_path / "c" / "capture.npz") as capture, np.load(tmp_path / "o" / "weights-2.npz") as weights:
        np.testing.assert_array_equal(capture["params/head/kernel"], weights["params/head/kernel"])


def test_command_line_trains_with_a_defense(run, nets):
    options = ("--dataset", "digits", "--limit", "64", "--epochs", "1", "--keep", "1", "--batch-size", "8")
    summaries = {}
    for defense in ("dp_sgd:1.0,1e-9", "dp_sgd:1e-9,1e-9"):
        result = run("train", "--model", *nets, *options, "--optimizer", "sgd", "--defense", defense, "--json")
        assert result.exit_code == 0, result.stderr
        summaries[defense] = json.loads(result.stdout)
        assert summaries[defense]["defense"] == defense.replace("e-9", "e-09")
    first, second = (s["train_loss"][0] for s in summaries.values())
    assert first != second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["train", "--noise", "-1"], "--noise: expected a positive number"),
        (["train", "--defense", "nothing"], "unknown defense 'nothing'"),
        (["train", "--defense", "sign", "--clip", "1"], "leave out --clip and --noise"),
        (["train", "--learning-rate", "0"], "--learning-rate: expected a positive number"),
        (["train", "--limit", "0"], "--limit: expected a positive number"),
        (["train", "--keep", "x"], "--keep: expected integers"),
        (["train", "--batch-size", "0"], "batch_size must be"),
        (["train", "--dataset", "digits"], r"(8, 8, 1), the model takes (32, 32, 3)"),
        (["train", "--weights", "none.npz"], "--weights: no such file"),
        (["invert", "--weights", "none.npz"], "--weights: no such file"),
        (["invert", "--weights", "w.npz", "--capture", "c.npz"], "a capture brings the weights"),
        (["audit", "--shapes-only", "--weights", "w.npz"], "--shapes-only needs no"),
    ],
)
def test_bad_command_lines(words, message, run):
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
