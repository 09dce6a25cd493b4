"""Labeled images to attack: an embedded sample set, installed foolbox files, prepared TFDS sets, and npz files."""

from collections.abc import Mapping

from leakjax.datasets.foolbox import SETS
from leakjax.datasets.loading import Images, from_range, load_dataset, load_npz, to_range

DATASETS: Mapping[str, str] = {
    "samples": "10 embedded photos, CC0 or public domain, 32x32x3 and 64x64x3",
    **{f"foolbox/{name}": summary for name, summary in SETS.items()},
}

__all__ = ["DATASETS", "Images", "from_range", "load_dataset", "load_npz", "to_range"]
