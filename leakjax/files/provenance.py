"""What ties a report to the program, the machine, the moment and the files behind it."""

import datetime
import hashlib
from pathlib import Path

import jax

from leakjax.version import __version__


def provenance() -> dict[str, str]:
    """`leakjax` (the version), `device` (the one that computes) and `date` (UTC, ISO 8601, to the second)."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return {"leakjax": __version__, "device": str(jax.devices()[0]), "date": now.isoformat()}


def file_and_hash(path: Path | str) -> str:
    """A file's name and the SHA-256 hash of its bytes: "weights.npz (sha256 9f86d081...)"."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{Path(path).name} (sha256 {digest})"
