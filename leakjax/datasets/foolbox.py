"""The labeled images that the installed foolbox package carries; read from there, never copied and never imported."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leakjax.errors import InputError

SETS: Mapping[str, str] = {
    "cifar10": "20 images of CIFAR-10, 32x32x3, from the installed foolbox package",
    "cifar100": "20 images of CIFAR-100, 32x32x3, from the installed foolbox package",
    "imagenet": "20 images of ImageNet, most 512x512x3, from the installed foolbox package",
    "mnist": "20 images of MNIST, 28x28x1, from the installed foolbox package",
    "fashionMNIST": "20 images of Fashion-MNIST, 28x28x1, from the installed foolbox package",
}


class LabeledFiles(Sequence[dict[str, Any]]):
    """Image files named `<set>_<index>_<label>.<png or jpg>`, read when asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = self.paths[index]
        with Image.open(path) as picture:
            image = np.asarray(picture)
        return {"image": np.atleast_3d(image), "label": int(path.stem.rsplit("_", 1)[1])}


def source(name: str) -> LabeledFiles:
    """The files of set `name`, one of `SETS`, in order of their index.

    Raises `InputError` where foolbox is not installed or its files are missing.
    """
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        raise InputError(f"data set 'foolbox/{name}' needs the files of the foolbox package: pip install foolbox")
    paths = sorted(Path(spec.origin).with_name("data").glob(f"{name}_*_*.*"))
    if not paths:
        raise InputError(f"data set 'foolbox/{name}': the installed foolbox has no such files; pip install -U foolbox")
    return LabeledFiles(paths)
