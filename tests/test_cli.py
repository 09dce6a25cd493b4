import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from leakjax.attacks import ATTACKS
from leakjax.cli import app
from leakjax.models import MODELS

REPORT = [
    "leakjax",
    "model",
    "activation",
    "attack",
    "loss",
    "dtype",
    "device",
    "seed",
    "input_range",
    "input_mean",
    "input_std",
    "defense",
    "gradient_noise",
    "weight_decay",
    "local_steps",
    "examples",
    "remarks",
    "seconds",
]
EXAMPLE = [
    "label",
    "label_source",
    "target",
    "psnr",
    "psnr_determined",
    "ssim",
    "mse",
    "unseen_pixels",
    "gradient_residual",
    "gradient_scale",
    "certificate",
    "layers",
]
CERTIFICATE = ["status", "leaked_dimensions", "unknowns", "condition", "layer", "proof", "symmetry", "psnr_estimate"]
LAYER = ["name", "unknowns", "rank", "rank_deficiency", "condition", "residual", "pull_back_depth", "steps", "status"]
LAYER += ["solver"]
SECONDS = ["trace", "compile", "solve", "total"]

NETS = """
    import functools

    import jax
    import jax.numpy as jnp
    from flax import linen, nnx

    DRAWN = []


    class Net(nnx.Module):
        def __init__(self, seed, activation, outputs=4, kind=""):
            rngs = nnx.Rngs(seed)
            self.kind, self.activation = kind, activation or jnp.tanh
            self.conv = nnx.Conv(3, 6, (3, 3), padding=1, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(6 * (16 if kind == "max-pool" else 64), outputs, rngs=rngs)

        def __call__(self, x):
            x = self.conv(x)
            if self.kind == "batch norm":
                x = self.norm(x)
            x = self.activation(x)
            if self.kind == "dropout":
                x = self.dropout(x)
            if self.kind == "max-pool":
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            return self.head(x.reshape(x.shape[0], -1))


    def net(seed, activation):
        DRAWN.append((seed, activation))
        return Net(seed, activation)


    def one_logit(seed):
        return Net(seed, None, outputs=1)


    batch_norm = functools.partial(Net, 0, None, kind="batch norm")
    dropout = functools.partial(Net, 0, None, kind="dropout")
    max_pool = functools.partial(Net, 0, None, kind="max-pool")


    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jnp.tanh(linen.Conv(6, (3, 3))(x))
            return linen.Dense(4)(x.reshape(x.shape[0], -1))


    def linen_pair(seed):
        return Linen(), Linen().init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))


    def function_pair():
        def apply(params, x):
            return x.reshape(x.shape[0], -1) @ params["kernel"] + params["bias"][None]

        kernel = 0.1 * jax.random.normal(jax.random.key(0), (192, 4), jnp.float32)
        return apply, {"kernel": kernel, "bias": jnp.zeros(4, jnp.float32)}


    class Large(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, 2, (3, 3), strides=4, padding=1, rngs=rngs)
            self.head = nnx.Linear(2 * 128 * 128, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.conv(x)).reshape(x.shape[0], -1))


    def integers():
        return (lambda params, x: x.reshape(x.shape[0], -1) @ params["w"]), {"w": jnp.ones((192, 4), int)}


    def two_outputs():
        return (lambda params, x: (x * params["w"], x)), {"w": jnp.ones(())}


    def raises():
        raise RuntimeError("the factory's own trouble")


    def leaves():
        raise SystemExit(7)


    def nothing():
        return None


    def needs_more(what):
        return what


    number = 3
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compiled programs are kept as for a user, below a folder of the tests."""
    from jax.experimental.compilation_cache import compilation_cache

    names = [name for name in jax.config.values if "compilation_cache" in name or "persistent_cache" in name]
    before = {name: jax.config.values[name] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with factories and small images in it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_nets.py").write_text(textwrap.dedent(NETS))
    (folder / "cli_broken.py").write_text("def f(:\n")
    (folder / "cli_raising.py").write_text("1 / 0\n")
    draw = np.random.default_rng(7)
    images = draw.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "small.npz", images=images, labels=np.array([3, 2, 1]))
    np.savez(folder / "float.npz", images=images / 255, labels=np.array([3, 2, 1]))
    np.savez(folder / "gray.npz", images=images[..., 0], labels=np.array([3, 2, 1]))
    np.savez(folder / "unlabeled.npz", images=images)
    np.savez(folder / "pickled.npz", images=np.array([images, None], object), labels=np.array([3, 2]))
    np.savez(folder / "classes.npz", images=images, labels=np.array([3, 40, 1]))
    np.savez(folder / "large.npz", images=np.zeros((1, 512, 512, 3), np.uint8) + 9, labels=np.array([1]))
    (folder / "junk.npz").write_bytes(b"PK\x03\x04 and no more")
    (folder / "empty.npz").touch()
    (folder / "file").touch()
    np.save(folder / "single.npy", images)
    return folder


@pytest.fixture
def refused(run):
    """Run a command line that must be refused: exit status 2, one line on standard error; returns that line."""

    def refused(*words):
        result = run(*words)
        assert result.exit_code == 2, result.stdout
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("leakjax: error: ")
        assert "Traceback" not in line
        return line

    return refused


SMALL = ("--model", "cli_nets:net", "--input-shape", "8,8,3", "--images", "small.npz")


@pytest.fixture(scope="module")
def zoo_run(tmp_path_factory):
    """Two victims on a net of the zoo, in an order of their own."""
    out = tmp_path_factory.mktemp("zoo")
    words = ["invert", "--model", "cnn2_c1", "--index", "3,1", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


def test_invert_writes_its_three_files(zoo_run):
    out, printed = zoo_run
    assert {f.name for f in out.iterdir()} == {"report.json", "reconstruction.npz", "figure.png"}
    assert json.loads((out / "report.json").read_text()) == printed
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_report_has_exactly_the_contracts_keys(zoo_run):
    _, report = zoo_run
    assert list(report) == REPORT
    assert list(report["seconds"]) == SECONDS
    assert len(report["examples"]) == 2
    for example in report["examples"]:
        assert list(example) == EXAMPLE
        assert list(example["certificate"])[:8] == CERTIFICATE
        assert [layer["name"] for layer in example["layers"]] == ["conv1", "head"]
        assert all(list(layer) == LAYER for layer in example["layers"])


def test_report_says_what_ran(zoo_run):
    _, report = zoo_run
    facts = {k: report[k] for k in ("model", "activation", "attack", "loss", "dtype", "seed", "input_range")}
    assert facts == {
        "model": "cnn2_c1",
        "activation": "tanh",
        "attack": "copa",
        "loss": "softmax_cross_entropy",
        "dtype": "float64",
        "seed": 0,
        "input_range": [-0.5, 0.5],
    }


def test_victims_come_in_the_order_of_index(zoo_run):
    out, report = zoo_run
    assert [e["label"] for e in report["examples"]] == [3, 1]
    assert [e["label_source"] for e in report["examples"]] == ["recovered"] * 2
    with np.load(out / "reconstruction.npz") as arrays:
        assert set(arrays.files) == {"images", "labels", "determined"}
        assert arrays["images"].shape == arrays["determined"].shape == (2, 32, 32, 3)
        assert arrays["images"].dtype == np.float64
        assert list(arrays["labels"]) == [3, 1]
        from leakjax.datasets import load_dataset

        truth = load_dataset("samples", [3, 1], (32, 32, 3)).images / 255 - 0.5
        np.testing.assert_allclose(arrays["images"], truth, atol=1e-6)
        assert arrays["determined"].min() >= 0
        assert arrays["determined"].max() <= 1
    assert min(e["psnr"] for e in report["examples"]) > 100


def test_json_prints_the_object_and_nothing_else(folder, tmp_path):
    command = [sys.executable, "-m", "leakjax.cli", "invert", *SMALL, "--out", str(tmp_path), "--json"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert list(json.loads(result.stdout)) == REPORT


def test_bad_input_is_one_line_in_a_process_of_its_own(folder, tmp_path):
    command = [sys.executable, "-m", "leakjax.cli", "invert", "--index", "77", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "--index 77 is out of range" in line


def test_tables_go_to_standard_error(run, tmp_path):
    result = run("invert", *SMALL, "--out", tmp_path)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "certificate" in result.stderr


def test_float32_and_given_labels(run, tmp_path):
    result = run(
        "invert", *SMALL, "--dtype", "float32", "--index", "0,2", "--labels", "3,1", "--out", tmp_path, "--json"
    )
    report = json.loads(result.stdout)
    assert report["dtype"] == "float32"
    assert [(e["label"], e["label_source"]) for e in report["examples"]] == [(3, "given"), (1, "given")]
    assert min(e["psnr"] for e in report["examples"]) > 60
    with np.load(tmp_path / "reconstruction.npz") as arrays:
        assert arrays["images"].dtype == np.float32


@pytest.mark.parametrize("factory", ["net", "linen_pair", "function_pair"])
def test_your_own_model(run, tmp_path, factory):
    words = ("--model", f"cli_nets:{factory}", *SMALL[2:], "--index", "1", "--seed", "5", "--input-range=-1,1")
    report = json.loads(run("invert", *words, "--out", tmp_path, "--json").stdout)
    assert report["model"] == f"cli_nets:{factory}"
    assert report["activation"] is None
    assert report["input_range"] == [-1, 1]
    (example,) = report["examples"]
    assert example["label"] == 2
    assert example["psnr"] > 100


def test_new_running_statistics_are_sent_in_training_mode(run, tmp_path):
    words = ("--model", "cli_nets:batch_norm", *SMALL[2:], "--train")
    report = json.loads(run("invert", *words, "--out", tmp_path / "sent", "--json").stdout)
    (example,) = report["examples"]
    assert example["psnr"] > 100
    assert example["certificate"]["status"] == "exact"
    sent = {}
    for option in ((), ("--no-buffers",), ("--local-steps", "2", "--learning-rate", "0.1")):
        assert run("capture", *words, *option, "--out", tmp_path / "kept").exit_code == 0
        with np.load(tmp_path / "kept" / "capture.npz") as arrays:
            sent[option[:1]] = sorted(name for name in arrays.files if name.startswith("new_buffers/"))
    assert sent == {
        (): ["new_buffers/norm/mean", "new_buffers/norm/var"],
        ("--no-buffers",): [],
        ("--local-steps",): [],
    }


def test_a_factory_gets_seed_and_activation(run, tmp_path):
    result = run("capture", *SMALL, "--activation", "elu:0.5", "--seed", "11", "--out", tmp_path)
    assert result.exit_code == 0
    seed, activation = sys.modules["cli_nets"].DRAWN[-1]
    assert seed == 11
    assert float(activation(-100.0)) == pytest.approx(-0.5)


def test_one_logit_takes_labels_modulo_two(run, tmp_path):
    words = ("--model", "cli_nets:one_logit", *SMALL[2:4], "--images", "classes.npz", "--index", "0,1,2")
    words += ("--loss", "sigmoid_binary_cross_entropy")
    report = json.loads(run("invert", *words, "--out", tmp_path, "--json").stdout)
    assert [e["label"] for e in report["examples"]] == [1, 0, 1]


def test_capture_prints_json_too(run, tmp_path):
    result = run("capture", *SMALL, "--index", "0,1", "--batch-size", "2", "--out", tmp_path, "--json")
    summary = json.loads(result.stdout)
    assert (summary["victims"], summary["examples"]) == (1, 2)
    assert (tmp_path / "capture.npz").is_file()


@pytest.mark.parametrize("what", ["models", "attacks", "datasets", "defenses", "activations"])
def test_list(run, tmp_path, what):
    assert run("list", what).exit_code == 0
    result = run("list", what, "--json", "--out", tmp_path)
    rows = json.loads(result.stdout)
    assert json.loads((tmp_path / f"{what}.json").read_text()) == rows
    members = {"models": set(MODELS), "attacks": set(ATTACKS), "datasets": {"samples"}}.get(what, set())
    assert members <= rows.keys()


@pytest.mark.parametrize("command", [(), ("invert",), ("capture",), ("list",)])
def test_help(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    options = ("--out", "--seed", "--json") if command else ("invert", "capture", "list")
    assert all(option in result.stdout for option in options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("invertt",), "invertt"),
        (("invert", "--sed", "1"), "--seed"),
        (("invert", "--seed", "x"), "--seed"),
        (("invert", "--seed", "-1"), "--seed"),
        (("invert", "--seed", "9" * 30), "--seed"),
        (("invert", "--model"), "--model"),
        (("invert", "stray"), "stray"),
        (("list",), "models"),
        (("list", "modles"), "'models'"),
        (("invert", "--model", "cn6"), "'cnn6'"),
        (("invert", "--activation", "tnah"), "'tanh'"),
        (("invert", "--activation", "leaky_relu:x"), "'x' is not a number"),
        (("invert", "--activation", "leaky_relu:-1"), "positive"),
        (("invert", "--activation", "tanh:2"), "no parameter"),
        (("invert", "--attack", "rgpa"), "'rgap'"),
        (("invert", "--attack", ""), "rgap"),
        (("invert", "--loss", "softmax"), "'softmax_cross_entropy'"),
        (("invert", "--init", "troch"), "'torch'"),
        (("invert", "--dtype", "float16"), "float64, float32"),
        (("invert", *SMALL, "--solver", "lsrm"), "'lsmr'"),
        (("invert", "--dataset", "sampels"), "'samples'"),
        (("invert", "--dataset", "mnist"), "not prepared on this machine"),
        (("invert", "--dataset", "foolbox/mnist"), "shape (28, 28, 1)"),
        (("invert", "--index", "10"), "0..9"),
        (("invert", "--index", "-1"), "0..9"),
        (("invert", "--index", "one"), "integers separated by commas"),
        (("invert", "--labels", "maps"), "integers separated by commas, or `map`"),
        (("invert", "--index", ""), "integers separated by commas"),
        (("invert", *SMALL, "--index", "3"), "3 images"),
        (("invert", *SMALL, "--index", "-1"), "3 images"),
        (("invert", *SMALL, "--labels", "x"), "--labels"),
        (("invert", *SMALL, "--labels", "1,2"), "labels must be 1 integer"),
        (("invert", *SMALL, "--labels", "4"), "0..3"),
        (("invert", *SMALL, "--labels", "-1"), "0..3"),
        (("invert", "--batch-size", "2"), "divide"),
        (("invert", "--batch-size", "0"), "positive integer"),
        (("invert", *SMALL, "--index", "0,0", "--batch-size", "2", "--attack", "rgap"), "does not separate"),
        (("invert", "--input-shape", "8,8,3"), "32,32,3"),
        (("invert", *SMALL, "--input-shape", "8,8"), "H,W,C"),
        (("invert", *SMALL, "--input-shape", "8,0,3"), "positive"),
        (("invert", *SMALL, "--input-shape", "16,16,3"), "shape (8, 8, 3)"),
        (("invert", *SMALL, "--input-range", "1,0"), "LOW"),
        (("invert", *SMALL, "--input-range", "0,inf"), "LOW"),
        (("invert", *SMALL, "--input-range", "0"), "LOW,HIGH"),
        (("invert", "--truth", "small.npz"), "--capture"),
        (("invert", "--images", "small.npz", "--capture", "small.npz"), "one of"),
        (("invert", "--images", "small.npz"), "shape (8, 8, 3)"),
        (("invert", "--images", "float.npz"), "uint8"),
        (("invert", "--images", "gray.npz"), "(N, H, W, C)"),
        (("invert", "--images", "unlabeled.npz"), "'labels'"),
        (("invert", "--images", "pickled.npz"), "allow_pickle"),
        (("invert", *SMALL[:4], "--images", "classes.npz", "--index", "1"), "0..3"),
        (("invert", "--images", "junk.npz"), "not an npz file"),
        (("invert", "--images", "empty.npz"), "not an npz file"),
        (("invert", "--images", "missing.npz"), "no such file"),
        (("invert", "--capture", "single.npy"), "single array"),
        (("invert", "--capture", "missing.npz"), "no such file"),
        (("invert", "--model", "cli_nets:net", *SMALL[4:]), "--input-shape"),
        (("invert", *SMALL, "--init", "torch"), "--init"),
        (("invert", *SMALL, "--model", "cli_nets:absent"), "'absent'"),
        (("invert", *SMALL, "--model", "cli_nets:number"), "'number'"),
        (("invert", *SMALL, "--model", "cli_absent:net"), "'cli_absent'"),
        (("invert", *SMALL, "--model", "cli_broken:f"), "SyntaxError"),
        (("invert", *SMALL, "--model", "cli_raising:f"), "ZeroDivisionError"),
        (("invert", *SMALL, "--model", ".x:f"), "'.x'"),
        (("invert", *SMALL, "--model", "cli_nets:raises"), "own trouble"),
        (("invert", *SMALL, "--model", "cli_nets:leaves"), "SystemExit"),
        (("invert", *SMALL, "--model", "cli_nets:nothing"), "NoneType"),
        (("invert", *SMALL, "--model", "cli_nets:needs_more"), "needs_more"),
        (("invert", *SMALL, "--model", "cli_nets:integers"), "'w' has dtype int"),
        (("invert", *SMALL, "--model", "cli_nets:two_outputs"), "output=1"),
        (("invert", *SMALL, "--model", "cli_nets:two_outputs", "--output", "2"), "output 2 is not among"),
        (("invert", *SMALL, "--model", "cli_nets:net", "--call", "train"), "--call"),
        (("invert", *SMALL, "--model", "cli_nets:net", "--call", "train=False"), "unexpected keyword"),
        (("invert", *SMALL, "--model", "cli_nets:net", "--call", "key=key:x"), "whole seeds"),
        (("invert", *SMALL, "--model", "cli_nets:net", "--rngs", "dropout=x"), "whole seeds"),
        (("invert", *SMALL, "--model", "cli_nets:net", "--layout", "HWC"), "--layout"),
        (("invert", "--call", "train=False"), "model of your own"),
        (("invert", "--layout", "NCHW"), "model of your own"),
        (("invert", "--train"), "model of your own"),
        (("invert", *SMALL, "--model", "cli_nets:batch_norm", "--no-buffers"), "goes with --train"),
        (("invert", *SMALL, "--model", "cli_nets:function_pair", "--eval"), "takes no argument train"),
        (("invert", "--loss", "hubr_loss:delta=1"), "huber_loss"),
        (("invert", *SMALL, "--model", "cli_nets:function_pair", "--activation", "relu"), "--activation"),
        (("invert", "--out", "file/below"), "--out"),
        (("invert", "--out", "file"), "--out"),
        (("capture", "--out", "file/below"), "--out"),
        (("list", "models", "--out", "file/below"), "--out"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_line(refused, tmp_path, words, message):
    if words[0] != "list" and "--out" not in words:
        words = (words[0], "--out", str(tmp_path), *words[1:])
    assert message in refused(*words)


@pytest.mark.parametrize(
    ("factory", "advice", "source"),
    [
        ("batch_norm", "model.eval()", "x = self.norm(x)"),
        ("dropout", "dropout in train mode", "x = self.dropout(x)"),
        ("max_pool", "--attack copa", "x = nnx.max_pool"),
    ],
)
def test_an_unreadable_model_names_the_users_line(refused, folder, tmp_path, factory, advice, source):
    words = ("--model", f"cli_nets:{factory}", *SMALL[2:], "--attack", "rgap")
    line = refused("invert", *words, "--out", tmp_path)
    number = next(k for k, text in enumerate((folder / "cli_nets.py").read_text().splitlines(), 1) if source in text)
    assert f"cli_nets.py:{number}" in line
    assert advice in line


def test_a_matrix_beyond_memory_is_refused_before_it_is_built(refused, tmp_path):
    words = ("--model", "cli_nets:Large", "--input-shape", "512,512,3", "--images", "large.npz", "--solver", "dense")
    line = refused("invert", *words, "--out", tmp_path)
    assert "bytes" in line
    assert "--solver lsmr" in line


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")])
def test_running_out_of_memory_is_one_line(refused, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("leakjax.inversion.invert", fail)
    assert "out of memory" in refused("invert", *SMALL, "--out", tmp_path)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_figures_of_any_number_of_channels(tmp_path, channels):
    from leakjax.report.reconstruction.figure import draw_figure

    certificate = {"status": "exact"}
    example = {"label": 1, "label_source": "given", "psnr": None, "certificate": certificate, "unseen_pixels": 0}
    report = {"model": "m", "activation": None, "attack": "a", "examples": [example]}
    images = np.random.default_rng(0).random((1, 4, 5, channels))
    for truth in (None, images + 1e-3):
        draw_figure(tmp_path / "figure.png", report, images, truth, np.ones_like(images))
        assert (tmp_path / "figure.png").stat().st_size > 0


def test_numbers_in_figures_are_no_source_text(tmp_path, monkeypatch):
    from leakjax.report.reconstruction import figure

    drawn = []
    monkeypatch.setattr(figure, "write_figure", lambda path, found: drawn.append(found))
    truth = np.random.default_rng(0).uniform(size=(1, 6, 6, 3))
    example = {
        "label": 1,
        "label_source": "recovered",
        "psnr": 200.0,
        "unseen_pixels": 0,
        "certificate": {"status": "exact"},
    }
    report = {"examples": [example], "model": "own", "activation": None, "attack": "copa"}
    error = 1e-12 * np.geomspace(1e-3, 1, truth.size).reshape(truth.shape)
    figure.draw_figure(tmp_path / "figure.png", report, truth + error, truth, np.ones_like(truth))
    drawn[0].canvas.draw()
    written = [t.get_text() for axis in drawn[0].axes for t in (*axis.get_yticklabels(), axis.title)]
    assert "1e-13" in written
    assert not any("$" in text for text in written)
