"""scikit-learn's 1,797 handwritten digits, 8x8, read from the installed package's file and never imported."""

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leakjax.errors import InputError, NoSplitError

SUMMARY = "1,797 handwritten digits, 8x8x1, from the installed scikit-learn package; every fifth is for testing"


class Digits(Sequence[dict[str, Any]]):
    """Rows of the table: 64 gray values in 0..16 and the digit."""

    def __init__(self, table: np.ndarray):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = self.table[index]
        image = np.round(row[:64] * (255 / 16)).astype(np.uint8).reshape(8, 8, 1)
        return {"image": image, "label": int(row[64])}


def source(split: str | None = None) -> Digits:
    """The split `test` (the default: rows 4, 9, 14, ...: 359) or `train` (the other 1,438).

    Raises `InputError` for another split, or where scikit-learn is not installed or its file is missing.
    """
    split = split or "test"
    if split not in ("train", "test"):
        raise NoSplitError("digits", split, ("train", "test"))
    spec = importlib.util.find_spec("sklearn")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "datasets/data/digits.csv.gz"
    if path is None or not path.is_file():
        raise InputError("data set 'digits' needs the file of the scikit-learn package: pip install scikit-learn")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    test = np.arange(len(table)) % 5 == 4
    return Digits(table[test if split == "test" else ~test])
