import json

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


def test_a_model_of_ones_own_is_audited_with_its_map(run, folder):
    (folder / "mine.py").write_text(
        "from flax import nnx\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self, rngs):\n"
        "        self.conv = nnx.Conv(1, 2, (3, 3), padding='VALID', rngs=rngs)\n"
        "        self.head = nnx.Linear(32, 3, rngs=rngs)\n"
        "    def __call__(self, x):\n"
        "        return self.head(nnx.tanh(self.conv(x)).reshape(len(x), -1))\n"
        "def net(seed):\n"
        "    return Net(nnx.Rngs(seed))\n"
    )
    result = run("audit", "--model", "mine:net", "--input-shape", "6,6,1", "--noise", "1e-3,1e-2", "--out", "out")
    assert result.exit_code == 0
    assert "leaked dimensions" in result.stderr
    held = json.loads((folder / "out" / "audit.json").read_text())
    assert [point["sigma"] for point in held["noise"]] == [1e-3, 1e-2]
    assert held["leaked_dimensions"] == held["structural_leaked_dimensions"]
    assert (folder / "out" / "leakage_map.png").stat().st_size > 1000


def test_too_much_leakage_fails(folder, cache, monkeypatch):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, [*SHAPES, "--out", "out", "--fail-above", "0.2"])
    assert result.exit_code == 1
    assert "30.1 % of the image leaks" in result.stderr
    assert (folder / "out" / "audit.json").exists()
    assert CliRunner().invoke(app, [*SHAPES, "--out", "out", "--fail-above", "0.4"]).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fail-above", "2"), "--fail-above"),
        (("--noise", "x"), "--noise"),
        (("--noise", "-1"), "noise"),
        (("--shapes-only", "--dataset", "samples"), "--shapes-only"),
        (("--model", "mine:net"), "--input-shape"),
        (("--dataset", "samples", "--index", "99"), "index"),
    ],
)
def test_bad_input_is_one_line(run, words, message):
    result = run("audit", "--model", "cnn2_c4", "--out", "out", *words)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
