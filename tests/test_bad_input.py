"""Bad input on the command line: exit status 2, one line that names it, nothing on standard output, nothing left."""

import os
import subprocess
import sys

import pytest
from bad_input import WRONG_MODELS, fill, left_in, says

import leakjax

OWN = ("--model", "bad_nets:dense", "--input-shape", "4,4,1")
DATA = (*OWN, "--images", "small.npz")
BASES = {
    "invert": DATA,
    "capture": DATA,
    "audit": DATA,
    "train": ("--model", "bad_nets:gray", "--input-shape", "8,8,1", "--dataset", "digits", "--limit", "40"),
}

WHOLE = ("x", "", "1.5", "nan", "-1", "1e3", "٣x")
NUMBER = ("x", "", "nan", "inf", "-1", "1e400", "1e200", "1,2")
FILES = ("missing.npz", "out", ".", "file", "", "bad_nets.py", "a\nb.npz", "[red]x[/].npz")
NAMES = ("", "x", "[red]", "../..", "None", "a b", "-")
VALUES = {
    "--model": (
        *("", "x", ":", "bad_nets:", ":dense", "bad_nets:absent", "bad_nets:number", "no_module:f", "bad_syntax:f"),
        *("bad_import:f", "bad_exit:f", "..:f", "bad_nets:dense.x", "bad_nets.py:dense", "[/]:f", "bad nets:dense"),
        *(f"bad_nets:{name}" for name in WRONG_MODELS),
    ),
    "--input-shape": ("", "4", "4,4", "4,4,1,1", "4,4,0", "-4,4,1", "4,4,x", "1e9,4,1", "5,5,1", "9" * 30 + ",4,1"),
    "--input-range": ("", "0", "1,0", "0,0", "nan,1", "0,inf", "0,1,2", "a,b", "0,1e400", "-1e200,1e200"),
    "--loss": NAMES,
    "--seed": (*WHOLE, "9" * 30),
    "--index": ("", "x", "1.5", "-1", "99", "0,", "0,-1", "nan", "9" * 30),
    "--images": FILES,
    "--weights": FILES,
    "--capture": FILES,
    "--torch-capture": FILES,
    "--batch-size": (*WHOLE, "0", "2", "9" * 20),
    "--local-steps": (*WHOLE, "0", "2", "9" * 20),
    "--defense": (
        *(
            *NAMES,
            "gaussian:x",
            "gaussian:-1",
            "gaussian:nan",
            "gaussian:1e400",
            "gaussian:1e200",
            "clip:0",
            "clip:1,2",
        ),
        *("top_k:1", "top_k:2", "qsgd:0", "qsgd:1.5", "sign:1", "dp_sgd:1,2,3", "custom", "laplace:inf"),
    ),
    "--dtype": ("", "float16", "double", "64", "[red]"),
    "--attack": NAMES,
    "--weight-decay": NUMBER,
    "--input-mean": ("", "x", "0.5", "nan", "0.5,"),
    "--input-std": ("", "x", "1", "0"),
    "--gradient-noise": (*NUMBER, "0"),
    "--prior": NAMES,
    "--solver": NAMES,
    "--pull-back": NAMES,
    "--optimizer": NAMES,
    "--labels": ("", "x", "3", "-1", "0,1", "1.5", "nan", "9" * 30),
    "--noise": (*NUMBER[:-1], "0"),
    "--noise-multiplier": ("0.1",),
    "--clip": ("1", "x", "nan"),
    "--fail-above": ("x", "", "nan", "inf", "-1", "2"),
    "--epochs": (*WHOLE, "9" * 20),
    "--clients": (*WHOLE, "0", "9" * 20),
    "--learning-rate": (*NUMBER, "0"),
    "--limit": (*WHOLE, "0"),
    "--keep": ("", "x", "-1", "99", "1.5"),
    "--out": ("file", "file/below", "bad_nets.py", "/dev/null/x", "/proc/nothing"),
    "--no-such-option": ("1",),
    "--dataset": (*NAMES, "mnist", "folder:", "folder:missing", "foolbox/nothing", "samples:9.9.9"),
}
TAKEN = {
    "invert": "--model --input-shape --input-range --input-mean --input-std --loss --seed --index --images --weights "
    "--batch-size --local-steps --defense --dtype --attack --gradient-noise --weight-decay --labels "
    "--out --no-such-option",
    "capture": "--model --input-shape --input-range --input-mean --input-std --loss --seed --index --images --weights "
    "--local-steps --defense "
    "--weight-decay --dtype --out",
    "audit": "--model --input-shape --input-range --loss --seed --index --images --weights --noise --noise-multiplier "
    "--clip --fail-above --out",
    "train": "--input-shape --seed --weights --batch-size --defense --dtype --optimizer --epochs --clients "
    "--learning-rate --limit --keep --noise --clip --dataset --out",
}
FINE = {("train", "--clip", "1"), ("train", "--batch-size", "2")}
ROWS = [
    (command, *BASES[command], option, value, "--" + option[2:])
    for command, options in TAKEN.items()
    for option in options.split()
    for value in VALUES[option]
    if (command, option, value) not in FINE
]
ROWS += [("invert", *OWN, option, value, option) for option in ("--capture", "--torch-capture") for value in FILES]
ROWS += [("invert", *OWN, "--capture", "small.npz", "--truth", value, "--") for value in FILES[:3]]
ROWS += [
    ("invert", *DATA, "--attack", "match", option, value, option)
    for option in ("--prior", "--solver", "--pull-back", "--optimizer")
    for value in VALUES[option]
]
ROWS += [
    ("invert", *DATA, "--attack", "dlg", option, value, option)
    for option in ("--steps", "--starts")
    for value in (*WHOLE, "0", "9" * 20)
]
ROWS += [
    (command, *DATA, *(word for pair in zip(("--input-mean", "--input-std"), pair, strict=True) for word in pair), word)
    for command in ("invert", "capture")
    for pair, word in (
        (("x", "1"), "--input-mean"),
        (("nan", "1"), "--input-mean"),
        (("0", "0"), "--input-std"),
        (("0", "-1"), "--input-std"),
        (("0,0", "1"), "--input-mean"),
        (("0", "1,1"), "--input-mean"),
        (("0", "1e-200"), "--input-std"),
        (("1e200", "1"), "--input-mean"),
        (("0,0,x", "1"), "--input-mean"),
    )
]
ROWS += [("invert", *DATA, "--input-mean", "0", "--input-std", "1", "--input-range", "0,1", "--input-range")]
ROWS += [("invert", *OWN, "--capture", "small.npz", "--input-mean", "0", "--input-std", "1", "--capture")]
ROWS += [("invert", *DATA, "--local-steps", "2", "--learning-rate", value, "--learning-rate") for value in NUMBER]
ROWS += [
    ("audit", *OWN, "--clip", "1", "--noise-multiplier", "0.1", option, value, option)
    for option, values in (
        ("--sampling-rate", ("x", "0", "-1", "2", "nan")),
        ("--steps", ("x", "0", "-1", "1.5")),
        ("--delta", ("x", "0", "1", "nan", "-1")),
    )
    for value in values
]
ROWS += [
    ("audit", *OWN, "--noise-multiplier", "0.1", "--clip", value, "--clip") for value in NUMBER if value != "1e200"
]
ROWS += [("audit", *OWN, "--clip", "1", "--noise-multiplier", v, "--noise-multiplier") for v in NUMBER[:-1]]
ROWS += [
    (*words, word)
    for words, word in (
        (("data", "prepare", "nothing"), "nothing"),
        (("data", "prepare", ""), "data set"),
        (("data", "prepare", "cifar10", "--from", "missing"), "missing"),
        (("data", "prepare", "cifar10", "--from", "file"), "--from"),
        (("data", "prepare", "cifar10", "--from", "out"), "--from"),
        (("data", "prepare", "cifar10", "--from", "file", "--download"), "--download"),
        (("data", "prepare", "cifar10", "--size", "3,3"), "--size"),
        (("data", "prepare", "folder:missing", "--size", "3,3"), "missing"),
        (("data", "prepare", "folder:out", "--size", "3"), "--size"),
        (("data", "prepare", "folder:out", "--size", "0,3"), "--size"),
        (("data", "prepare", "folder:out", "--size", "3,3", "--name", "A/B"), "--name"),
        (("data", "prepare", "folder:out", "--size", "3,3", "--from", "file"), "--from"),
        (("data", "prepare"), "NAME"),
        (("data", "prepare", "folder:~nobody_at_all/x", "--size", "3,3"), "folder:"),
        (("data", "prepare", "folder:out", "--size", "3,3", "--data-dir", "file"), "folder:"),
        (("invert", *OWN, "--dataset", "folder:~nobody_at_all/x"), "folder:"),
        (("data", "nothing"), "nothing"),
        (("list",), "models"),
        (("list", ""), "list"),
        (("list", "[red]"), "[red]"),
        (("list", "models", "--out", "file/x"), "--out"),
        (("nothing",), "nothing"),
        (("[/]",), "[/]"),
        (("invert", "stray"), "stray"),
        (("invert", "--seed"), "--seed"),
    )
]

NO_EFFECT = [
    *(
        ("invert", *DATA, "--attack", attack, option, value, option)
        for attack, options in {
            "copa": "--starts --steps",
            "rgap": "--starts --steps --prior --pull-back --optimizer --gradient-noise",
            "rconv": "--starts --steps --prior --pull-back --optimizer --gradient-noise",
            "hybrid": "--starts --pull-back --gradient-noise",
            "match": "--steps",
            "dlg": "--solver --prior --pull-back --optimizer --gradient-noise",
            "idlg": "--solver --prior --pull-back --optimizer --gradient-noise",
            "inverting_gradients": "--solver --prior --pull-back --optimizer --gradient-noise",
        }.items()
        for option in options.split()
        for value in [
            {"--starts": "2", "--steps": "9", "--prior": "tv", "--optimizer": "adam", "--gradient-noise": "1"}.get(
                option, "auto"
            )
        ]
    ),
    *(
        ("invert", *OWN, "--capture", "small.npz", option, value, option)
        for option, value in (("--dataset", "digits"), ("--index", "1"), ("--batch-size", "2"), ("--init", "torch"))
    ),
    ("invert", *DATA, "--defense", "sign", "--gradient-noise", "1", "--gradient-noise"),
    ("invert", *DATA, "--prior", "none", "--optimizer", "adam", "--optimizer"),
    ("invert", *DATA, "--learning-rate", "0.1", "--learning-rate"),
    ("capture", *DATA, "--learning-rate", "0.1", "--learning-rate"),
    ("invert", *DATA, "--dataset", "samples", "--dataset"),
    ("capture", *DATA, "--dataset", "samples", "--dataset"),
    ("capture", "--weights", "small.npz", "--init", "torch", "--init"),
    ("train", "--weights", "small.npz", "--init", "torch", "--init"),
    ("audit", *OWN, "--sampling-rate", "0.1", "--sampling-rate"),
    ("audit", *OWN, "--steps", "9", "--steps"),
    ("audit", *OWN, "--delta", "1e-6", "--delta"),
    ("audit", "--shapes-only", "--init", "torch", "--init"),
    ("audit", "--shapes-only", "--input-range", "0,1", "--input-range"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    fill(folder)
    return folder


def check(result, folder, word):
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("leakjax: error: ")
    assert "LEAKJAX_TRACEBACK" not in line, line
    assert says(line, word) or any(says(line, w) for w in ALSO.get(word, ())), line
    assert left_in(folder / "out") == []


ALSO = {
    "--weights": ("option",),
    "--model": ("model", "bad_nets", "parameter"),
    "--input-shape": ("shape",),
    "--index": ("index",),
    "--dataset": ("data set", "folder:"),
    "--clip": ("clip",),
    "--init": ("init",),
    "--loss": ("loss",),
}


@pytest.mark.parametrize("row", [*ROWS, *NO_EFFECT], ids=lambda row: " ".join((row[0], *row[-3:-1])))
def test_bad_input_is_one_line(run, folder, row):
    *words, word = row
    out = () if "--out" in words or words[0] in ("data", "list", "nothing", "[/]") else ("--out", "out")
    check(run(words[0], *out, *words[1:]) if words[0] not in ("data", "list") else run(*words), folder, word)


@pytest.mark.parametrize("row", NO_EFFECT, ids=lambda row: " ".join((*row[-5:-3], *row[-3:-1])))
def test_an_option_without_effect_says_so(run, folder, row):
    *words, option = row
    line = run(words[0], "--out", "out", *words[1:]).stderr
    assert f"{option} has no effect" in line


BENCHMARKS = [
    (*words, word)
    for words, word in (
        (("smoke", "--coordinator", "junk"), "--coordinator"),
        (("smoke", "--coordinator", "localhost:x"), "--coordinator"),
        (("smoke", "--coordinator", "localhost:99999"), "--coordinator"),
        (("smoke", "--coordinator", ""), "--coordinator"),
        (("smoke", "--coordinator", "no-such-host.invalid:1234"), "--coordinator"),
        (("smoke", "--out", "file"), "--out"),
        (("smoke", "--out", "file/below"), "--out"),
        (("smoke", "--table", "missing"), "--table missing"),
        (("smoke", "--table", "file"), "--table file"),
        (("smoke", "--table", "out"), "--table out"),
        (("smoke", "--table", "other.jsonl"), "--table other.jsonl"),
        (("smoke", "--limit", "x"), "--limit"),
        (("smoke", "--limit", "0"), "--limit"),
        (("smoke", "--only", "nothing"), "--only"),
        (("smoke", "--devices", "x"), "--devices"),
        (("smoke", "--devices", "99"), "--devices"),
        (("smoke", "--processes", "0"), "--processes"),
        (("smoke", "--processes", "2"), "--processes"),
        (("smoke", "--process", "1"), "--process"),
        (("smoke", "--nothing"), "--nothing"),
        (("nothing",), "nothing"),
        ((), "NAME"),
        (("zoo", "--models", "x"), "model"),
        (("zoo", "--activations", "x"), "activation"),
        (("zoo", "--seeds", "x"), "--seeds"),
        (("zoo", "--index", "-1"), "--index"),
        (("zoo", "--attack", "x"), "attack"),
        (("zoo", "--dtype", "x"), "dtype"),
        (("zoo", "--solver", "x"), "solver"),
        (("zoo", "--batch", "0"), "--batch"),
        (("zoo", "--out", "file"), "--out"),
        (("zoo", "--table", "missing"), "--table"),
        (("solvers", "--table", "file"), "--table"),
        (("solvers", "--model", "x"), "model"),
        (("solvers", "--out", "out"), "--out"),
        (("accuracy", "--table", "missing"), "--table"),
        (("accuracy", "--out", "out"), "--out"),
        (("guard", "--out", "file/below"), "--out"),
        (("throughput", "--table", "missing"), "--table"),
        (("throughput", "--only", "x"), "--only"),
        (("throughput", "--out", "file"), "--out"),
    )
]


@pytest.mark.parametrize("row", BENCHMARKS, ids=lambda row: " ".join(row[:-1]))
def test_the_benchmarks_refuse_in_one_line_too(folder, monkeypatch, capsys, row):
    from benchmarks.__main__ import main

    monkeypatch.chdir(folder)
    (folder / "other.jsonl").write_text('{"not": "ours"}\n')
    *words, word = row
    with pytest.raises(SystemExit, match="2"):
        main(words)
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("benchmarks: error: ")
    assert word in line
    assert left_in(folder / "out") == []


@pytest.mark.parametrize(
    "words", [("invert", "--index", "9", *DATA), ("audit", "--no-such"), ("list", "[/]"), ("capture", "--out", "file")]
)
def test_in_a_process_of_its_own(folder, words):
    place = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(leakjax.__file__))}
    line = [sys.executable, "-m", "leakjax.cli", words[0], *words[1:]]
    result = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=100, env=place)
    assert result.returncode == 2
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert said.startswith("leakjax: error: ")


def test_there_are_more_than_four_hundred():
    assert len(ROWS) + len(NO_EFFECT) + len(BENCHMARKS) > 400
    assert len({row[0] for row in ROWS}) >= 6
