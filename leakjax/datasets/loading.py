"""From a data set's name, or a file, to images and labels in arrays; and from uint8 to a model's range and back."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Shaped, UInt8

from leakjax.arguments import MOST, array, shown, sizes, whole
from leakjax.datasets import digits, folders, foolbox, prepared
from leakjax.errors import InputError, NoSplitError, unknown_name
from leakjax.files.npz import open_npz
from leakjax.models.normalization import Limits


class Images(NamedTuple):
    """Labeled images as their files hold them: `images` (N, H, W, C) in 0..255 and `labels` (N,)."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int64[np.ndarray, " N"]


def load_dataset(name: str, indices: Sequence[int], input_shape: tuple[int, int, int]) -> Images:
    """The images at `indices` of the data set `name`, in that order. Nothing is ever downloaded.

    Arguments:
    - `name`: a name of `DATASETS`, `folder:PATH` (photos, resized), or a tensorflow-datasets set prepared on this
      machine as array_record;
    - `indices`: which images, counted from 0 within the split (`test` if there is one, else the first);
    - `input_shape`: (H, W, C) that the model takes; it chooses the size of `samples`.

    Raises `InputError` for a set that is unknown or not here, an index out of range, or images of another shape.
    """
    shape = _asked(name, input_shape)
    try:
        indices = [whole("--index", index, -MOST) for index in indices]
    except TypeError:
        raise InputError(f"--index must name images, as [0, 3], got {shown(indices)}") from None
    source = _source(name, shape, None)
    for index in indices:
        if not 0 <= index < len(source):
            raise InputError(f"--index {index} is out of range: {name!r} has images 0..{len(source) - 1}")
    if not len(indices):
        raise InputError("--index must name at least one image")
    return _stack(name, source, indices, shape)


def load_split(name: str, split: str | None, input_shape: tuple[int, int, int], limit: int | None = None) -> Images:
    """The first `limit` images (default: all) of the split `split` of the data set `name`; see `load_dataset`.

    Raises `InputError` as `load_dataset`, and where the set has no such split.
    """
    shape = _asked(name, input_shape)
    if limit is not None:
        limit = whole("limit", limit, 1)
    source = _source(name, shape, split)
    count = len(source) if limit is None else min(limit, len(source))
    if count < 1:
        raise InputError(f"split {split!r} of data set {name!r} holds no image, or none was asked for")
    return _stack(name, source, range(count), shape)


def train_and_test(name: str, input_shape: tuple[int, int, int], limit: int | None = None) -> tuple[Images, Images]:
    """The splits `train` and `test` of the data set `name`, each of at most `limit` images.

    A set of one split is parted by index: images 4, 9, 14, ... are for testing. Raises `InputError` as `load_split`.
    """
    try:
        return load_split(name, "train", input_shape, limit), load_split(name, "test", input_shape, limit)
    except NoSplitError:
        pass
    whole = load_split(name, None, input_shape, limit)
    if len(whole.labels) < 5:
        raise InputError(f"data set {name!r} has one split of {len(whole.labels)} images; 5 are needed to part it")
    test = np.arange(len(whole.labels)) % 5 == 4
    return Images(whole.images[~test], whole.labels[~test]), Images(whole.images[test], whole.labels[test])


def stack(source: Sequence[Any], name: str = "data") -> Images:
    """All records {"image", "label"} of a data source (`tfds.data_source`, a list) in arrays.

    Raises `InputError` where it is empty, or images differ in shape or are not uint8 (H, W, C).
    """
    if not len(source):
        raise InputError(f"{name}: the data source holds no image")
    images = _stack(name, source, range(len(source)), _read(name, source, 0)["image"].shape)
    return _check_arrays(name, *images)


def load_npz(
    path: str | os.PathLike, option: str = "--images", shape: tuple[int | None, ...] = (None, None, None, None)
) -> Images:
    """The arrays `images`, uint8 (N, H, W, C), and `labels`, integers (N,), of the npz file that `option` names.

    Arguments: `shape`, of the images, None where any size will do; others are refused before they are read.
    Raises `InputError` for a file that is missing or corrupt, holds pickles, or lacks those arrays in those shapes.
    """
    if isinstance(path, str | os.PathLike) and not os.path.exists(path):
        raise InputError(f"{option} {os.fspath(path)}: no such file")
    with open_npz(path, option) as file:
        for name in ("images", "labels"):
            if name not in file.entries:
                raise InputError(f"{file.where}: array {name!r} is missing; the file must hold 'images' and 'labels'")
        found = file.entries["images"]
        _check_entries(file.where, found, file.entries["labels"])
        wanted = tuple(own if size is None else size for size, own in zip(shape, found.shape, strict=True))
        if found.shape[1:] != wanted[1:]:
            raise InputError(
                f"{file.where}: images have shape {found.shape[1:]}, the model takes {wanted[1:]}; resize them"
            )
        if found.shape != wanted:
            raise InputError(f"{file.where}: holds {found.shape[0]} images, the capture is of {wanted[0]}")
        arrays = file.read(["images", "labels"])
    return _check_arrays(file.where, arrays["images"], arrays["labels"])


def to_range(images: UInt8[np.ndarray, "..."], input_range: Limits) -> Float[np.ndarray, "..."]:
    """Map 0..255 linearly onto `input_range` = (low, high): low + images / 255 (high - low), in float64.

    Each end is a number, or (C,) where channels differ.
    """
    low, high = input_range
    return low + np.asarray(images, np.float64) / 255 * (high - low)


def from_range(x: Shaped[Any, "..."], input_range: tuple[float, float]) -> Float[np.ndarray, "..."]:
    """Map `input_range` linearly onto [0, 1]: (x - low) / (high - low), in float64; values outside stay outside."""
    low, high = input_range
    return (np.asarray(x, np.float64) - low) / (high - low)


def _asked(name: Any, input_shape: Any) -> tuple[int, ...]:
    """The shape (H, W, C), once it and the name are known to be of that kind."""
    if not isinstance(name, str):
        raise unknown_name("data set", name, _SOURCES)
    shape = sizes("input_shape", input_shape)
    if len(shape) != 3:
        raise InputError(f"input_shape must be (H, W, C), got {shape}")
    return shape


def _read(name: str, source: Sequence[Any], index: int) -> Mapping[str, Any]:
    try:
        record = source[index]
    except InputError:
        raise
    except Exception as error:
        raise prepared.unreadable(name, error) from error
    if not (isinstance(record, Mapping) and {"image", "label"} <= record.keys()):
        raise InputError(f"{name}: record {index} is no mapping with image and label, but {shown(record)}")
    image = array(f"{name}: image {index}", record["image"], "biuf", "an array of numbers")
    label = array(f"{name}: label {index}", record["label"], "iu", "an integer")
    if label.ndim:
        raise InputError(f"{name}: label {index} must be one integer, got shape {label.shape}")
    return {"image": image, "label": int(label)}


def _stack(name: str, source: Sequence[Any], indices: Sequence[int], shape: tuple[int, ...]) -> Images:
    records = [_read(name, source, int(index)) for index in indices]
    for index, record in zip(indices, records, strict=True):
        if record["image"].shape != shape:
            raise InputError(
                f"image {index} of {name!r} has shape {record['image'].shape}, the model takes {shape}; choose another "
                "model or data set"
            )
    return Images(np.stack([r["image"] for r in records]), np.array([r["label"] for r in records], np.int64))


def _source(name: str, shape: tuple[int, ...], split: str | None) -> Sequence[Any]:
    if name.startswith(folders.PREFIX):
        return folders.source(name.removeprefix(folders.PREFIX), shape, split)
    read = _SOURCES.get(name)
    return read(shape, split) if read else prepared.source(name, _SOURCES, split)


def _one_split(name: str, split: str | None) -> None:
    if split is not None:
        raise NoSplitError(name, split, ())


def _samples(input_shape: tuple[int, ...], split: str | None) -> Sequence[Any]:
    _one_split("samples", split)
    from leakjax.datasets import embedded  # imports tensorflow_datasets

    return embedded.source(input_shape)


def _digits(input_shape: tuple[int, ...], split: str | None) -> Sequence[Any]:
    return digits.source(split)


def _foolbox(name: str, input_shape: tuple[int, ...], split: str | None) -> Sequence[Any]:
    _one_split(f"foolbox/{name}", split)
    return foolbox.source(name)


# name -> reader(input_shape, split or None) -> sequence of {"image": uint8 (H, W, C), "label": integer}
_SOURCES: Mapping[str, Callable[[tuple[int, ...], str | None], Sequence[Any]]] = {
    "samples": _samples,
    **{f"foolbox/{name}": partial(_foolbox, name) for name in foolbox.SETS},
    "digits": _digits,
}


def _check_entries(where: str, images: Any, labels: Any) -> None:
    """Refuse dtypes and shapes, of arrays or of entries not read yet."""
    if images.dtype != np.uint8 or len(images.shape) != 4 or 0 in images.shape:
        raise InputError(f"{where}: 'images' must be uint8 (N, H, W, C), got {images.dtype} of shape {images.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise InputError(
            f"{where}: 'labels' must be {images.shape[0]} integers, one for each image, got {labels.dtype} of shape "
            f"{labels.shape}"
        )


def _check_arrays(where: str, images: np.ndarray, labels: np.ndarray) -> Images:
    _check_entries(where, images, labels)
    if labels.min() < 0 or labels.max() > 2**31 - 1:
        raise InputError(f"{where}: 'labels' must be classes from 0, got {labels.min()}..{labels.max()}")
    return Images(images, labels.astype(np.int64))
