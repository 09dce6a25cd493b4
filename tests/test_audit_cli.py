import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from leakjax.cli import app

SHAPES = ("audit", "--model", "cnn2_c4", "--shapes-only")


def test_files_and_summary(run, folder):
    result = run(*SHAPES, "--out", "out", "--json")
    assert result.exit_code == 0
    held = json.loads(result.stdout)
    assert held == json.loads((folder / "out" / "audit.json").read_text())
    assert (held["c_m_rounded"], held["structural_leaked_dimensions"], held["verdict"]) == (-2146, 926, "partial")
    assert held["leaked_dimensions"] is None
    page = (folder / "out" / "audit.html").read_text()
    assert "cnn2_c4" in page
    assert not (folder / "out" / "leakage_map.png").exists()


MINE = """
import jax.numpy as jnp
from flax import nnx

class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), padding="VALID", rngs=rngs)
        self.head = nnx.Linear(32, 3, rngs=rngs)
    def __call__(self, x):
        return self.head(nnx.tanh(self.conv(x)).reshape(len(x), -1))

def net(seed):
    return Net(nnx.Rngs(seed))

class Rounding(Net):
    def __call__(self, x):
        return super().__call__(jnp.round(255 * x) / 255)

class Auxiliary(Net):
    def __call__(self, x):
        return super().__call__(x), {"features": x}

class Branching(Net):
    def __call__(self, x):
        return super().__call__(2 * x if x.sum() > 0 else x)

class Ignoring(Net):
    def __call__(self, x):
        return super().__call__(jnp.ones_like(x))

def rounding(seed):
    return Rounding(nnx.Rngs(seed))

def auxiliary(seed):
    return Auxiliary(nnx.Rngs(seed))

def branching(seed):
    return Branching(nnx.Rngs(seed))

def ignoring(seed):
    return Ignoring(nnx.Rngs(seed))

def raising(seed):
    raise RuntimeError("no\\nluck")
"""
OWN = ("--model", "mine:net", "--input-shape", "6,6,1")


@pytest.fixture
def mine(folder):
    (folder / "mine.py").write_text(MINE)


@pytest.mark.usefixtures("mine")
def test_a_model_of_ones_own_is_audited_with_its_map(run, folder):
    result = run("audit", *OWN, "--noise", "1e-3,1e-2", "--out", "out")
    assert result.exit_code == 0
    assert "leaked dimensions" in result.stderr
    held = json.loads((folder / "out" / "audit.json").read_text())
    assert [point["sigma"] for point in held["noise"]] == [1e-3, 1e-2]
    assert held["leaked_dimensions"] == held["structural_leaked_dimensions"]
    assert (folder / "out" / "leakage_map.png").stat().st_size > 1000
    with np.load(folder / "out" / "maps.npz", allow_pickle=False) as maps:
        assert maps["leakage_map"].shape == maps["uncertainty"].shape == (1, 6, 6, 1)
        assert maps["leakage_map"].sum() == pytest.approx(held["leaked_dimensions"])


@pytest.mark.usefixtures("mine")
def test_a_step_of_dp_sgd_has_a_bound_and_an_epsilon(run, folder):
    private = ("--clip", "0.5", "--noise-multiplier", "0.1,2", "--delta", "1e-6")
    assert run("audit", *OWN, "--noise", "1e-3", *private, "--out", "out").exit_code == 0
    plain, *points = json.loads((folder / "out" / "audit.json").read_text())["noise"]
    assert plain["epsilon"] is None
    assert [(p["noise_multiplier"], p["sigma"], p["clip"], p["delta"]) for p in points] == [
        (0.1, 0.05, 0.5, 1e-6),
        (2.0, 1.0, 0.5, 1e-6),
    ]
    assert points[0]["epsilon"] > points[1]["epsilon"] > 0
    assert points[0]["psnr_estimate_prior"] > points[1]["psnr_estimate_prior"]
    assert "ε" in (folder / "out" / "audit.html").read_text()


def test_too_much_leakage_fails(folder, cache, monkeypatch):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, [*SHAPES, "--out", "out", "--fail-above", "0.2"])
    assert result.exit_code == 1
    assert "30.1 % of the image leaks" in result.stderr
    assert (folder / "out" / "audit.json").exists()
    assert CliRunner().invoke(app, [*SHAPES, "--out", "out", "--fail-above", "0.4"]).exit_code == 0


@pytest.fixture
def status(folder, cache, monkeypatch):
    """Run a command line in the folder, whose exit status may be 1."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", list(sys.path))
    return lambda *words: CliRunner().invoke(app, ["audit", "--out", "out", *words])


@pytest.mark.usefixtures("mine")
def test_the_verdict_and_a_gate_are_of_the_noise_asked_for(status, folder):
    loud = status(*OWN, "--noise", "1", "--fail-above-psnr", "20")
    assert loud.exit_code == 0
    held = json.loads((folder / "out" / "audit.json").read_text())
    assert "With sigma 1: no better than a grey guess" in held["sentence"]
    assert "Everything leaks" in held["sentence"]
    both = status(*OWN, "--noise", "1,1e-3", "--fail-above-psnr", "20")
    assert both.exit_code == 1
    assert "more than --fail-above-psnr 20" in both.stderr


@pytest.mark.usefixtures("mine")
def test_the_verdict_of_dp_sgd_names_epsilon(status, folder):
    assert status(*OWN, "--clip", "1", "--noise-multiplier", "1", "--fail-above-psnr", "15").exit_code == 0
    sentence = json.loads((folder / "out" / "audit.json").read_text())["sentence"]
    assert "noise multiplier 1 (sigma 1): no better than a grey guess" in sentence
    assert "epsilon 4.38" in sentence


@pytest.mark.usefixtures("mine")
def test_what_is_unknown_passes_no_gate(status, folder):
    hidden = "--model", "mine:rounding", "--input-shape", "6,6,1"
    result = status(*hidden, "--noise", "9", "--fail-above-psnr", "99", "--fail-above", "1")
    assert result.exit_code == 1
    assert result.stderr.count("leakjax: error: --fail-above") == 2
    held = json.loads((folder / "out" / "audit.json").read_text())
    assert held["verdict"] == "unknown"
    assert held["blind"]
    assert "`round`" in held["sentence"]


@pytest.mark.usefixtures("mine")
def test_an_audit_can_be_traced(run, folder):
    assert run(*SHAPES, "--seed", "3", "--out", "out").exit_code == 0
    held = json.loads((folder / "out" / "audit.json").read_text())
    assert {"leakjax", "device", "date"} <= {name for name, value in held.items() if value}
    assert (held["seed"], held["data"], held["weights"]) == (3, "none: shapes only", "initialized with seed 3")
    page = (folder / "out" / "audit.html").read_text()
    assert "Where this comes from" in page
    assert held["date"] in page.replace("<wbr>", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fail-above-psnr", "20"), "--noise"),
        (("--fail-above-psnr", "nan", "--noise", "1"), "--fail-above-psnr"),
        (("--noise", "1e200"), "--noise"),
        (("--noise", "1e-200"), "absurd"),
        (("--clip", "1e300", "--noise-multiplier", "1e300"), "--noise-multiplier"),
        (("--clip", "1", "--noise-multiplier", "1e-200"), "epsilon"),
        (("--clip", "1", "--noise-multiplier", "1e-5", "--sampling-rate", "0.1"), "epsilon"),
        (("--clip", "1", "--noise-multiplier", "1", "--steps", "1" + "0" * 400), "epsilon"),
        (("--model", "mine:net", "--input-shape", "5,5,1"), "cannot run"),
        (("--model", "mine:net", "--input-shape", "6,6,3"), "cannot run"),
        (("--model", "mine:auxiliary", "--input-shape", "6,6,1"), "logits"),
        (("--model", "mine:auxiliary", "--input-shape", "6,6,1", "--shapes-only"), "logits"),
        (("--model", "mine:branching", "--input-shape", "6,6,1"), "boolean"),
        (("--model", "mine:ignoring", "--input-shape", "6,6,1"), "do not depend on the input"),
        (("--model", "mine:raising", "--input-shape", "6,6,1"), "the factory raised RuntimeError"),
        (("--fail-above", "2"), "--fail-above"),
        (("--noise", "x"), "--noise"),
        (("--noise", "-1"), "noise"),
        (("--shapes-only", "--dataset", "samples"), "--shapes-only"),
        (("--model", "mine:net"), "--input-shape"),
        (("--dataset", "samples", "--index", "99"), "index"),
        (("--index", "3"), "--index"),
        (("--shapes-only", "--index", "3"), "--shapes-only"),
        (("--dataset", "samples", "--images", "x.npz"), "--images"),
        (("--clip", "1"), "--noise-multiplier"),
        (("--clip", "-1", "--noise-multiplier", "1"), "clip"),
        (("--clip", "1", "--noise-multiplier", "1", "--delta", "3"), "delta"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_bad_input_is_one_line(run, words, message):
    result = run("audit", "--model", "cnn2_c4", "--out", "out", *words)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
