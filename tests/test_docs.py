"""The site: every page is in its navigation, what the pages show runs, and what they name exists."""

import contextlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
import typer
import yaml

import leakjax
from leakjax.attacks import ATTACKS
from leakjax.cli import app
from leakjax.cli.effects import refuse_idle
from leakjax.client.defenses import DEFENSES
from leakjax.report.audit.glossary import _TERMS
from tests.test_structure import ROOMS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FROM_ROOT = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
PAGES = {p.relative_to(DOCS).as_posix(): p for p in sorted(DOCS.rglob("*.md"))} | FROM_ROOT
TEXTS = {name: path.read_text() for name, path in PAGES.items()}

FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r'title="([^"]+)"')

# What stands in for a PyTorch module after `loss.backward()`: its state, and a gradient of each parameter.
TORCH = """
import json
import numpy
meta = {"loss": "softmax_cross_entropy", "input_shape": [8, 8, 3], "input_range": [0, 1]}
class Tensor:
    def __init__(self, value, grad=None):
        self.value, self.grad = value, grad
    def cpu(self):
        return self
    def numpy(self):
        return self.value
class Module:
    def state_dict(self):
        return dict(self.named_parameters())
    def named_parameters(self):
        features = numpy.arange(256).reshape(4, 4, 16).transpose(2, 0, 1).reshape(-1)  # channels first
        moves = {"conv/kernel": lambda a: a.transpose(3, 2, 0, 1), "head/kernel": lambda a: a[features].T}
        for name in ("conv/kernel", "conv/bias", "head/kernel", "head/bias"):
            move = moves.get(name, lambda a: a)
            w, g = move(numpy.asarray(model.params[name])), move(numpy.asarray(sent[name]))
            yield name.replace("/kernel", ".weight").replace("/bias", ".bias"), Tensor(w, Tensor(g))
net = Module()
"""


def fences(text, language):
    """(what follows the language, the code) of every fenced block of a language, those inside of tabs too."""
    return [
        (options, textwrap.dedent(code)) for _, kind, options, code in FENCE.findall(text) if kind.split()[0] == language
    ]


def commands(text):
    """Every `leakjax ...` of the blocks and between backticks, as words."""
    lines = [line for kind in ("bash", "console") for _, code in fences(text, kind) for line in code.splitlines()]
    lines = [line.split("  #")[0].removeprefix("$ ") for line in lines] + INLINE.findall(FENCE.sub("", text))
    lines = [line.removeprefix(".venv/bin/").split() for line in lines]
    return [words for words in lines if words[:1] == ["leakjax"] and words[1:] and "|" not in words[1]]


def listed(entry):
    """The pages of a navigation, in order."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in listed(part)]


def first_column(page, heading):
    """What the first column of the table below a heading holds between backticks."""
    rows = TEXTS[page].split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [name for row in rows if row.startswith("| `") for name in INLINE.findall(row.split("|")[1])]


def test_the_navigation_lists_every_page_once():
    found = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(found) == len(set(found)) > 15
    assert set(found) == set(PAGES)


RUNNABLE = sorted(name for name, text in TEXTS.items() if fences(text, "python"))


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Block after block in one namespace, as a reader types them: JAX as it is by default, files where they belong."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        for options, code in fences(TEXTS[page], "python"):
            file = FILE.search(options)
            if file and file[1].endswith(".py"):
                (tmp_path / file[1]).write_text(code)
            elif file:
                exec(TORCH, names)
            exec(compile(code, f"{page}", "exec"), names)


def test_the_commands_of_the_first_steps_run(run, tmp_path):
    found = [words for words in commands(TEXTS["first-steps.md"]) if "--help" not in words and len(words) > 3]
    assert len(found) >= 5
    for words in found:
        assert run(*words[1:]).exit_code == 0, words
    assert all((tmp_path / "first" / name).exists() for name in ("report.json", "reconstruction.npz", "figure.png"))


COMMANDS = sorted({(page, *words) for page, text in TEXTS.items() for words in commands(text)})


def parsed(words):
    """Parse a command line as the program does, down to options without effect, and run nothing."""
    command, context, rest = typer.main.get_command(app), None, list(words)
    while True:
        with contextlib.ExitStack() as stack:
            group = hasattr(command, "commands")
            taken = [] if group else rest
            context = stack.enter_context(command.make_context(command.name, taken or ["--"], parent=context))
        if not group:
            refuse_idle(context)
            return context
        command = command.commands[rest.pop(0)]


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_a_command_exists_with_its_options(line):
    words = [word for word in line[2:] if word != "..."]
    if words[-1:] == ["--help"]:
        words.pop()
    parsed(words)


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        parsed(["invert", "--gradient-scales", "1"])
    with pytest.raises(leakjax.InputError, match="no effect"):
        parsed(["invert", "--gradient-scale", "1"])
    with pytest.raises(KeyError):
        parsed(["inverts"])


def test_options_that_are_named_alone_exist():
    known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "benchmarks" / "__main__.py").read_text()))
    groups = [typer.main.get_command(app)]
    while groups:
        for command in groups.pop().commands.values():
            groups += [command] if hasattr(command, "commands") else []
            known |= {name for parameter in command.params for name in parameter.opts}
    named = {
        (page, span.split()[0])
        for page, text in TEXTS.items()
        for span in INLINE.findall(FENCE.sub("", text))
        if span.startswith("--") and len(span) > 2
    }
    assert len(named) > 30
    assert not {(page, option) for page, option in named if option not in known}


def test_tables_name_what_the_registries_hold():
    assert sorted(first_column("attacks.md", "The attacks")) == sorted(ATTACKS)
    assert sorted(first_column("defenses.md", "The defenses")) == sorted(DEFENSES)
    assert first_column("architecture.md", "The rooms") == ROOMS


def test_the_reference_has_every_public_name():
    shown = set(re.findall(r"^::: (\S+)$", "\n".join(TEXTS.values()), re.MULTILINE))
    assert {f"leakjax.{name}" for name in leakjax.__all__ if name != "__version__"} <= shown
    for place in ("leakjax.guard", "leakjax.captures", "leakjax.datasets", "leakjax.models", "leakjax.client.defenses"):
        module = sys.modules[place] if place in sys.modules else __import__(place, fromlist=["__all__"])
        assert {f"{place}.{name}" for name in module.__all__} <= shown, place


def test_the_glossary_has_the_terms_of_an_audits_page():
    terms = {term.lower() for term in re.findall(r"^\*\*(.+?)\*\*", TEXTS["glossary.md"], re.MULTILINE)}
    for term in ("gradient inversion", "client", "adaptive attack", "fully determined", "row-space share"):
        assert term in terms
    assert {term.lower() for term, _ in _TERMS} <= terms


def test_the_site_builds_strictly(tmp_path):
    """Every link, anchor and reference resolves, and no page asks another host for anything."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path).with_suffix(".md").as_posix(): page for page in tmp_path.rglob("*.html")}
    assert set(PAGES) <= set(pages)
    for page in pages.values():
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="?(https?://[^\s">]+)', page.read_text())
        assert not loaded, page
