"""The site: every page is in the navigation, what pages show runs, and tables say what the program says."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from test_structural import DEFICIENCIES

import leakjax
from leakjax.attacks import ATTACKS
from leakjax.cli import app
from leakjax.cli.effects import TAKES, refuse_idle
from leakjax.client.defenses import DEFENSES, build_defense
from leakjax.datasets import DATASETS
from leakjax.datasets.originals import ORIGINALS
from leakjax.models import MODELS, build_model

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PAGES = {p.relative_to(DOCS).as_posix(): p.read_text() for p in sorted(DOCS.rglob("*.md"))}
PAGES |= {page: (ROOT / source).read_text() for page, source in FROM_ROOT.items()}
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
BLOCKS = [
    (page, language, title.strip(), textwrap.dedent(code))
    for page, text in PAGES.items()
    for _, language, title, code in FENCE.findall(text)
]
# Pages that need extras: `tests/test_torch_modules.py` and `tests/test_federated.py` run their blocks.
EXTRAS = {"pytorch.md", "flower.md"}
PYTHON = [(page, title, code) for page, language, title, code in BLOCKS if language == "python" and page not in EXTRAS]
OWN_NETWORKS = {"segmentation.md", "text.md", "transformers.md"}
EXECUTED = "first-steps.md"  # whose commands are run, and not only parsed


def shown_commands():
    """(page, command) of every command: in blocks of a shell, and alone between backticks."""
    for page, language, _, code in BLOCKS:
        if language in ("bash", "console"):
            lines = [line.removeprefix("$ ").split("  #")[0].strip() for line in code.splitlines()]
            yield from ((page, line) for line in lines if line)
    for page, text in PAGES.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        starts = "leakjax ", "python -m benchmarks ", "make "
        yield from ((page, span) for span in spans if span.startswith(starts))


COMMANDS = sorted({(page, line) for page, line in shown_commands() if page != "changelog.md"})  # which is history
_README = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS += [
    ("README.md", line.split("  #")[0].strip()) for block in _README for line in block.splitlines() if line.strip()
]


def navigation():
    """Every page that mkdocs.yml names, in order."""
    block = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    return re.findall(r": (\S+\.md)$", block, re.MULTILINE)


def test_the_navigation_lists_every_page_once():
    listed = navigation()
    assert len(listed) == len(set(listed))
    assert set(listed) == set(PAGES)
    assert len(listed) > 20


@pytest.mark.parametrize("alone", [True, False])
def test_python_blocks_run(tmp_path, alone):
    """Page by page, in one process with JAX as it is by default; a page's blocks share their names.

    Pages whose networks no other page has gain nothing from the others' company.
    """
    blocks = [block for block in PYTHON if (block[0] in OWN_NETWORKS) == alone]
    assert len({page for page, *_ in blocks}) >= (2 if alone else 6)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(blocks))
    run = [sys.executable, str(ROOT / "tests" / "run_pages.py"), str(plan)]
    kept = {  # pages with the same network share what is compiled
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(
        run, capture_output=True, text=True, cwd=tmp_path, timeout=280, env={**os.environ, **kept}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran ") == len(blocks)


def test_commands_of_the_first_steps_run(run, folder):
    commands = [line for page, line in COMMANDS if page == EXECUTED and "--help" not in line]
    blocks = [code for page, language, _, code in BLOCKS if page == EXECUTED and language == "bash"]
    in_order = [line for code in blocks for line in code.splitlines()]
    assert set(in_order) <= set(commands)
    for line in in_order:
        result = run(*shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    first, second = (json.loads((folder / name / "report.json").read_text()) for name in ("first", "second"))
    assert [r["examples"][0]["certificate"]["proof"] for r in (first, second)] == ["global", "global"]
    assert first["examples"][0]["psnr"] > 200
    assert second["examples"][0]["psnr"] is None
    found = json.loads((folder / "audit" / "audit.json").read_text())
    assert (found["verdict"], found["structural_leaked_dimensions"]) == ("partial", 1602)


def parse(words):
    """The context of the command that the words name, its options parsed and checked, nothing run."""
    command, context = typer.main.get_command(app), None
    while True:
        nested = hasattr(command, "commands")
        context = command.make_context(words[0] if words else "leakjax", words[1:], parent=context)
        if not nested:
            refuse_idle(context)
            return context
        words = [*context._protected_args, *context.args]
        command = command.commands[words[0]]


def check_names(values):
    """The names among the options' values exist."""
    known = {"attack": ATTACKS, "dataset": [*DATASETS, *ORIGINALS, "svhn_cropped", "my_photos"]}
    for option, names in known.items():
        value = values.get(option)
        assert value is None or value in names or str(value).startswith("folder:"), value
    model = values.get("model")
    assert model is None or model in MODELS or ":" in model or model == "NAME", model
    if values.get("defense"):
        build_defense(values["defense"])


# "..", "NAME" and the like stand for what the reader puts in; such spans are of prose, and not commands.
ELLIPSIS = re.compile(r"\.\.\.|\||SUITE|WHAT|SPEC|\bNAME --from\b")
LEAKJAX = [c for c in COMMANDS if re.match(r"(\.venv/bin/)?leakjax ", c[1]) and not ELLIPSIS.search(c[1])]


@pytest.mark.parametrize(("page", "line"), LEAKJAX, ids=[f"{page}: {line}" for page, line in LEAKJAX])
def test_leakjax_commands_parse(page, line):
    words = shlex.split(line)[1:]
    if words[-1] == "--help":
        words = words[:-1]
        found = typer.main.get_command(app)
        for word in words:
            found = found.commands[word]
        return
    if len(words) == 1 and words[0] in ("invert", "capture", "audit", "train", "data"):
        return  # a command's name in prose
    check_names(parse(["leakjax", *words]).params)


def test_there_are_commands_to_parse():
    assert len(LEAKJAX) > 30
    with pytest.raises(Exception, match="No such option"):
        parse(["leakjax", "invert", "--no-such-option", "1"])
    with pytest.raises(leakjax.InputError, match="no effect"):
        parse(["leakjax", "invert", "--attack", "rgap", "--starts", "2"])
    with pytest.raises(AssertionError):
        check_names({"attack": "no_such_attack"})


OTHERS = [c for c in COMMANDS if c not in LEAKJAX and re.match(r"make |python -m benchmarks ", c[1])]


@pytest.mark.parametrize(("page", "line"), OTHERS, ids=[f"{page}: {line}" for page, line in OTHERS])
def test_targets_and_suites_exist(page, line):
    program, *words = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{re.escape(words[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    from benchmarks.__main__ import STUDIES, SUITES, chosen
    from benchmarks.__main__ import parse as parse_suite

    if words[2] in STUDIES:
        source = (ROOT / "benchmarks" / f"{words[2]}.py").read_text()
        for option in [word for word in words if word.startswith("--")]:
            assert f'"{option}"' in source
    elif words[2] in SUITES:
        options = parse_suite(words[2:])
        assert chosen(options.suite, options.limit, options.only)
    else:
        assert words[2] == "SUITE"


def rows(page, heading):
    """The cells of the first table below a heading of a page, without its header."""
    below = PAGES[page].split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert table
    lines = table.group().strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def code(text):
    return re.findall(r"`([^`]+)`", text)


def test_the_tables_of_attacks_are_the_registry():
    assert {code(row[0])[0] for row in rows("attacks.md", "\n## By name\n")} == set(ATTACKS)
    shown = {
        code(row[0])[0]: {o[2:].replace("-", "_") for o in code(row[1])} for row in rows("attacks.md", "## Options")
    }
    assert shown == {name: set(options) for name, options in TAKES.items()}


def test_the_table_of_defenses_is_the_registry():
    shown = [code(row[0])[0].partition(":") for row in rows("defenses.md", "\n## Defend a gradient\n")]
    assert {name for name, *_ in shown} == set(DEFENSES)
    for name, _, values in shown:
        assert [v.lower() for v in values.split(",") if v] == [
            p.name.removeprefix("noise_").replace("clip", "clip") for p in DEFENSES[name].parameters
        ]


def test_the_architecture_page_has_every_room_in_order():
    tree = ast.parse((ROOT / "tests" / "test_structure.py").read_text())
    (value,) = [
        n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", None) == "ROOMS"
    ]
    assert [code(row[0])[0] for row in rows("architecture.md", "\n## The rooms, bottom up\n")] == ast.literal_eval(
        value
    )


def test_the_reference_has_every_public_name():
    shown = {
        name
        for page, text in PAGES.items()
        if page.startswith("api/")
        for name in re.findall(r"^::: (\S+)$", text, re.M)
    }
    wanted = {f"leakjax.{name}" for name in leakjax.__all__ if not name.startswith("__")}
    from leakjax import captures, datasets, guard

    for package in (captures, datasets, guard):
        wanted |= {f"{package.__name__}.{n}" for n in package.__all__ if not n.isupper()}
    assert wanted <= shown


INDICES = rows("reproductions.md", "\n## c(M) and ranks\n")


@pytest.mark.parametrize("row", INDICES, ids=[row[0] for row in INDICES])
def test_indices_of_the_reproductions_are_the_programs(row):
    """Those that `test_golden_ranks_and_index` compares with the program."""
    name, published, ours, command = row
    assert code(command) == [f"leakjax audit --model {name} --shapes-only"]
    assert [int(text.replace("−", "-")) for text in (published, ours)] == [DEFICIENCIES[name][1]] * 2


def test_padded_systems_of_the_reproductions_are_the_programs():
    layers = {}
    for name in ("cnn6", "cnn6d"):
        spec = MODELS[name]
        found = leakjax.audit(build_model(name), spec.input_shape, loss=spec.loss, shapes_only=True)
        layers |= {f"{name} {layer.name}": layer.padded for layer in found.layers}
    for name, _, ours in rows("reproductions.md", "padded border pixels among the unknowns"):
        padded = layers[name]
        assert ours == f"{padded.rows} x {padded.columns}, {padded.rank}"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: group docs")
def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert {p.relative_to(tmp_path / "site").with_suffix(".md").as_posix() for p in built} == {*PAGES, "404.md"}
    for page in built:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)", text)
        loaded += re.findall(r"<link\b[^>]*\brel=\"(?:stylesheet|preconnect|icon)\"[^>]*\bhref=\"([^\"]+)", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"([^\"]+)\"[^>]*\brel=\"(?:stylesheet|preconnect|icon)\"", text)
        assert loaded
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)]
