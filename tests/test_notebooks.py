"""The notebooks are valid, executed, free of machine paths, and call libraries only; a slow test runs them."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = [
    "01_first_reconstruction",
    "02_anatomy_of_one_layer",
    "03_what_c_of_M_says",
    "04_batches_and_matching",
    "05_defenses_and_the_noise_bound",
    "06_your_own_model",
    "07_scaling_on_accelerators",
    "08_batch_norm",
    "09_segmentation",
]
ALLOWED = {"leakjax", "jax", "flax", "optax", "numpy", "matplotlib", "pictures", "json", "pathlib", "tempfile", "time"}
MACHINE = re.compile(r"/(home|root|tmp|work|Users|opt|usr|var)/|[A-Z]:\\\\")
OUTPUTS = ("stream", "display_data", "execute_result")


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def runner():
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_folder_holds_these_notebooks():
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_was_executed_from_top_to_bottom(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= set(OUTPUTS)
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert notebook.cells[0].source.startswith("# ")
    assert sum(len(cell.source) for cell in notebook.cells if cell.cell_type == "markdown") > 1000


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_names_no_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < runner().LARGEST
    shown = [cell.source for cell in read(name).cells]
    shown += [str(o.get("text", o.get("data", {}).get("text/plain", ""))) for c in code(read(name)) for o in c.outputs]
    assert not [s for s in shown if MACHINE.search(s)]
    assert " at 0x" not in "".join(shown)


@pytest.mark.parametrize("name", NAMES)
def test_it_calls_libraries_and_defines_no_algorithm(name):
    """Allowed modules, no loop within a loop, short cells; classes and functions only of a model of one's own."""
    for cell in code(read(name)):
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in ALLOWED
            elif isinstance(node, ast.For | ast.While):
                inner = [n for child in node.body for n in ast.walk(child)]
                assert not [n for n in inner if isinstance(n, ast.For | ast.While)]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert name.startswith(("06", "08"))
        assert len(cell.source.splitlines()) <= 40


def test_tidying_drops_what_differs_between_machines_and_joins_streams():
    tidy = runner().tidy
    cell = nbformat.v4.new_code_cell("1", metadata={"execution": {"iopub.execute_input": "2026"}})
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=t) for t in ("a\n", "b\n")]
    metadata = {"language_info": {"name": "python", "version": "3.11.2"}}
    notebook = tidy(nbformat.v4.new_notebook(cells=[cell], metadata=metadata))
    assert notebook.cells[0].metadata == {}
    assert [output.text for output in notebook.cells[0].outputs] == ["a\nb\n"]
    assert "version" not in notebook.metadata.language_info


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_time(name):
    module = runner()
    notebook = module.execute(FOLDER / f"{name}.ipynb", module.SECONDS)
    kept = [[o.output_type for o in cell.outputs] for cell in code(read(name))]
    assert [[o.output_type for o in cell.outputs] for cell in code(notebook)] == kept


def test_the_runner_refuses_names_of_no_notebook():
    done = subprocess.run([sys.executable, FOLDER / "run.py", "99"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no notebook begins with" in done.stderr
