"""Records on disk: a line of JSON each, there for good as soon as `append` returns, whatever happens to the process."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import leakjax

Record = dict[str, Any]


def environment() -> Record:
    """Versions, device and date of this process."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "lineax", "numpy")}
    return {
        "leakjax": leakjax.__version__,
        **versions,
        "python": platform.python_version(),
        "device": str(jax.local_devices()[0]),
        "kind": jax.local_devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def records_file(directory: Path, process: int = 0) -> Path:
    """Where a process of a run writes."""
    return directory / f"records-{process}.jsonl"


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a file and wait until the disk has them; a half-written line before is closed first."""
    lines = "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else "\n" + lines
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(place: Path) -> list[Record]:
    """The records of a file, or of all processes in a folder; half-written lines are none."""
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    return [record for file in files for record in _parsed(file.read_bytes() if file.exists() else b"")]


def _parsed(content: bytes) -> Iterable[Record]:
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:  # empty, or cut off when its process died
            continue
        if isinstance(record, dict):
            yield record


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
