"""Every command and snippet of the README runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith(("make test", "pip install"))  # test_installation.py runs the latter
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet: str) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = float(done.stdout.split()[-1])
    if "leakjax.invert(" in snippet:
        assert shown < 1e-9
    else:
        assert done.stdout.split()[0] == "True"
        assert 10 < shown < 20


def test_commands_run(tmp_path: Path) -> None:
    assert COMMANDS[0].startswith("make demo")
    for command in COMMANDS:
        command = command.replace(".venv/bin/leakjax", f"{sys.executable} -m leakjax.cli")
        where = ROOT if command.startswith("make") else tmp_path
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=where, env=env, timeout=600)
        assert done.returncode == 0, done.stderr
    assert (ROOT / "demo" / "figure.png").stat().st_size > 10_000
    assert (ROOT / "demo" / "report.json").exists()
    assert (tmp_path / "leakjax-out" / "reconstruction.npz").exists()


PAGES = README + "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
TABLES = re.findall(r"<!-- table: (.*?) -->\n(.*?)<!-- end of table -->", PAGES, re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), TABLES, ids=[command.split("/")[-1] for command, _ in TABLES])
def test_tables_are_those_of_the_records(command: str, shown: str) -> None:
    command = [sys.executable, *command.split()[1:]]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300).stdout
    assert made.strip() == shown.strip()
    assert made.count("\n") >= 3
