"""Labeled images: embedded samples, files of installed packages, prepared TFDS sets, folders and npz files."""

from collections.abc import Mapping

from leakjax.datasets import digits
from leakjax.datasets.foolbox import SETS
from leakjax.datasets.loading import (
    Images,
    from_range,
    load_dataset,
    load_npz,
    load_split,
    stack,
    to_range,
    train_and_test,
)
from leakjax.datasets.maps import luminance_maps

DATASETS: Mapping[str, str] = {
    "samples": "10 embedded photos, CC0 or public domain, 16x16x3, 32x32x3 and 64x64x3",
    **{f"foolbox/{name}": summary for name, summary in SETS.items()},
    "digits": digits.SUMMARY,
}

__all__ = [
    "DATASETS",
    "Images",
    "from_range",
    "load_dataset",
    "load_npz",
    "load_split",
    "luminance_maps",
    "stack",
    "to_range",
    "train_and_test",
]
