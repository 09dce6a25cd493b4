"""Folders of photos as ImageNet keeps them: a subfolder for each class, with or without folders of splits above."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from leakjax.datasets import prepared
from leakjax.errors import InputError, NoSplitError

PREFIX = "folder:"
SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS: Mapping[str, str] = {"train": "train", "test": "test", "val": "test", "validation": "test"}
"""Folders above the classes, and the splits they are; a folder without them is one split, `train`."""


class Photos(Sequence[dict[str, Any]]):
    """Pairs (file, label), read when asked for, each resized so that it covers `shape` and cropped to its center."""

    def __init__(self, files: Sequence[tuple[Path, int]], shape: tuple[int, ...]):
        self.files = files
        self.shape = shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        path, label = self.files[index]
        return {"image": photo(path, self.shape), "label": label}


def photo(path: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "H W C"]:
    """The photo at `path` as `shape` (H, W, C), C 1 or 3: upright, resized to cover it, and cropped to its center.

    Raises `InputError` for a file that is no picture.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise InputError(f"folder: photos have 1 or 3 channels, the model takes {channels}")
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
        fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise InputError(f"folder: {path} is no picture that can be read ({prepared.first_line(error)})") from error
    return np.asarray(fitted).reshape(shape)


def find_photos(folder: str) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    """The files and labels of each split of `folder`, in order of class and name, and the class names.

    Raises `InputError` where it is no folder or holds no photos in subfolders.
    """
    root = Path(os.path.expanduser(folder))
    if not folder or not root.is_dir():
        raise InputError(f"folder:{folder}: no such folder; give folder:PATH with a subfolder for each class")
    above = {path: SPLITS[path.name.lower()] for path in _folders(root) if path.name.lower() in SPLITS}
    if len(set(above.values())) < len(above):
        raise InputError(f"folder:{folder}: more than one of its folders is the test split; keep one")
    roots = above if above and len(above) == len(_folders(root)) else {root: "train"}
    classes = sorted({path.name for place in roots for path in _folders(place)})
    found: dict[str, list[tuple[Path, int]]] = {}
    for place, split in roots.items():
        labeled = [(path, label) for label, name in enumerate(classes) for path in _photos(place / name)]
        if labeled:
            found[split] = labeled
    if not found:
        raise InputError(f"folder:{folder}: no {', '.join(SUFFIXES)} in its subfolders; it needs one for each class")
    return found, classes


def source(folder: str, shape: tuple[int, ...], split: str | None = None) -> Photos:
    """The photos of a split of `folder` (default: `test`, or else `train`) as images of `shape` (H, W, C)."""
    splits, _ = find_photos(folder)
    if split is not None and split not in splits:
        raise NoSplitError(PREFIX + folder, split, splits)
    return Photos(splits[split or ("test" if "test" in splits else "train")], shape)


def prepare_folder(folder: str, size: str | None, name: str | None, data_dir: Path | None) -> Any:
    """Write `folder` as a TFDS set of RGB images of one size, and return it as `preparing.Prepared`.

    Arguments: `size` as typed, "H,W"; `name` of the set (default: the folder's); `data_dir` as in `preparing.prepare`.
    Raises `InputError` for a missing or bad size, a name that is taken, or photos that cannot be read.
    """
    import tensorflow_datasets as tfds

    from leakjax.datasets.preparing import Prepared, data_home, png
    from leakjax.datasets.writing import write_set

    shape = (*_size(size), 3)
    name = name or re.sub(r"\W+", "_", Path(os.path.abspath(folder)).name.lower())
    if not re.fullmatch(r"[a-z]\w*", name) or name in tfds.list_builders(with_community_datasets=False):
        raise InputError(f"--name: {name!r} is no free name; lower-case letters, digits and _, and none of TFDS's sets")
    splits, classes = find_photos(folder)
    home = data_home(data_dir)
    counts = {split: len(files) for split, files in splits.items()}
    if prepared.find(name, home) is not None:
        raise InputError(f"--name: a set {name!r} is in {home} already; remove it or choose another --name")

    def examples(files: list[tuple[Path, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (path, label) in enumerate(files):
            yield key, {"image": png(photo(path, shape)), "label": label}

    features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(names=classes)}
    generators = {split: partial(examples, files) for split, files in splits.items()}
    written = write_set(name, "1.0.0", f"The photos in {folder}", features, generators, home)
    return Prepared(name=name, folder=written, splits=counts, written=True, missing={})


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _photos(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _size(text: str | None) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in (text or "").split(","))
    except ValueError:
        raise InputError(f"--size: expected H,W with folder:PATH, got {text!r}") from None
    if not (0 < height <= 8192 and 0 < width <= 8192):
        raise InputError(f"--size: sides must be in 1..8192, got {text!r}")
    return height, width
