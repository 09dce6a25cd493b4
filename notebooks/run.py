"""`python notebooks/run.py [NAME ...]`: execute the notebooks in place and keep their outputs.

A cell that fails, or takes too long, ends the run, and its notebook's file is left as it was. Names are beginnings of
file names ("01"); without names all are executed.
"""

import argparse
import base64
import io
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
SECONDS = 90
"""What a notebook may take on two cores."""

LARGEST = 400_000
"""Bytes that a notebook may have with its pictures."""


def execute(path: Path, limit: float) -> nbformat.NotebookNode:
    """The notebook at `path`, executed from its folder; raises where a cell fails or takes over `limit` seconds."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=limit,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})
    return tidy(notebook)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave out what differs from run to run or machine to machine: cell metadata, ids, versions; fit the pictures."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for k, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({})
        cell.id = f"cell-{k:02d}"
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    for colors in (None, 256, 64):
        fit_pictures(notebook, colors)
        if len(text(notebook)) < LARGEST:
            return notebook
    raise ValueError(f"the notebook has {len(text(notebook))} bytes; draw fewer or smaller pictures")


def fit_pictures(notebook: nbformat.NotebookNode, colors: int | None) -> None:
    """Write every PNG anew, without metadata, in so many colors (None: all)."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                picture = picture if colors is None else picture.quantize(colors, dither=Image.Dither.NONE)
                held = io.BytesIO()
                picture.save(held, "PNG", optimize=True)
                data["image/png"] = base64.b64encode(held.getvalue()).decode("ascii")
                data["text/plain"] = "<Figure>"


def text(notebook: nbformat.NotebookNode) -> str:
    """The file that holds the notebook."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _joined(outputs: list) -> list:
    """Outputs with one stream's pieces in one."""
    found: list = []
    for output in outputs:
        last = found[-1] if found else {}
        if output.output_type == "stream" and last.get("output_type") == "stream" and last["name"] == output.name:
            last["text"] += output.text
        else:
            found.append(output)
    return found


def main(words: list[str]) -> int:
    """Execute, write, and say how long each took; 1 where one took longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of file names; default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what a notebook may take")
    options = parser.parse_args(words)
    paths = [p for p in sorted(FOLDER.glob("*.ipynb")) if not options.names or p.name.startswith(tuple(options.names))]
    if not paths:
        parser.error(f"no notebook begins with {options.names}")
    late = False
    for path in paths:
        begun = time.perf_counter()
        notebook = execute(path, options.seconds)
        seconds = time.perf_counter() - begun
        path.write_text(text(notebook))
        late |= seconds > options.seconds
        print(f"{path.name}: {seconds:.1f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
    return int(late)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
