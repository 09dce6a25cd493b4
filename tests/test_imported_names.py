"""What tests, benchmarks and notebooks ask of the package by name is there: a name that moved is found at once."""

import ast
import importlib
import json
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
FILES = sorted([*TOP.glob("tests/*.py"), *TOP.glob("benchmarks/**/*.py"), *TOP.glob("notebooks/*.py")])
NOTEBOOKS = sorted(TOP.glob("notebooks/*.ipynb"))


def source_of(path):
    if path.suffix == ".py":
        return path.read_text()
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def has(module, name):
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        return importlib.import_module(f"{module}.{name}") is not None
    except ModuleNotFoundError:
        return False


def missing(source):
    """Names of the package that are imported, or read as attributes of an imported module, and are not there."""
    aliases, absent = {}, []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("leakjax"):
            continue
        for alias in node.names:
            if not has(node.module, alias.name):
                absent.append(f"{node.module}.{alias.name}")
            elif isinstance(getattr(importlib.import_module(node.module), alias.name, None), type(ast)):
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            module = aliases[node.value.id]
            if not has(module, node.attr):
                absent.append(f"{module}.{node.attr}")
    return absent


@pytest.mark.parametrize("path", [*FILES, *NOTEBOOKS], ids=lambda path: path.relative_to(TOP).as_posix())
def test_names_are_there(path):
    assert missing(source_of(path)) == []


def test_a_name_that_moved_is_seen():
    source = "from leakjax.guard import online, no_such\nfrom leakjax.guard.online import loss_of\nonline.loss_of"
    wanted = ["leakjax.guard.no_such", "leakjax.guard.online.loss_of", "leakjax.guard.online.loss_of"]
    assert missing(source) == wanted
