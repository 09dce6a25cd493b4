"""Published sets prepared once on this machine, from their files or, where asked for, by TensorFlow's download."""

import importlib.util
import io
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from leakjax.datasets import prepared
from leakjax.datasets.originals import ALIASES, ORIGINALS, Original, read_original
from leakjax.datasets.records import Records
from leakjax.errors import InputError, unknown_name


class Prepared(NamedTuple):
    """A set on this machine: its name for `--dataset`, folder, examples in each split, and if that is new.

    `missing` says how it differs from the published set: for each split how many examples that one has.
    """

    name: str
    folder: Path
    splits: dict[str, int]
    written: bool
    missing: dict[str, int]


def prepare(name: str, source: Path | None = None, data_dir: Path | None = None, *, download: bool = False) -> Prepared:
    """Prepare the set `name` of `ORIGINALS` (or `ALIASES`) as array_record; one that is there already stays as it is.

    Arguments:
    - `source`: an archive or folder with the files as published; no network and no TensorFlow needed;
    - `data_dir`: where TFDS sets are kept (default: TFDS's own, $TFDS_DATA_DIR or ~/tensorflow_datasets);
    - `download`: let tensorflow-datasets download it, which takes TensorFlow.

    Raises `InputError` for an unknown set, files that are not its own, or neither `source` nor `download`.
    """
    name = ALIASES.get(name, name)
    if name not in ORIGINALS:
        raise unknown_name("data set", name, {*ORIGINALS, *ALIASES, "folder:PATH"})
    original, home = ORIGINALS[name], data_home(data_dir)
    there = prepared.find(name, home)
    if there is not None:
        return _report(name, there, False)
    if source is not None:
        return _report(name, _from_files(name, original, source, home), True)
    if not download:
        raise InputError(
            f"data set {name!r} is not in {home}, and nothing is downloaded unasked: fetch {original.url} and give it "
            "by --from, or install the tensorflow extra and say --download"
        )
    _download(name, original, home)
    written = prepared.find(name, home)
    if written is None:
        raise InputError(f"data set {name!r}: tensorflow-datasets left nothing in {home}; give the files by --from")
    return _report(name, written, True)


def data_home(data_dir: Path | None) -> Path:
    """The folder of TFDS sets: `data_dir`, or TFDS's own; without a home directory it must be given."""
    if data_dir is not None:
        return Path(os.path.expanduser(data_dir))
    from tensorflow_datasets.core import constants  # 0.2 s and more

    home = os.path.expanduser(constants.DATA_DIR)
    if home.startswith("~"):
        raise InputError("--data-dir: this user has no home directory; name the folder, or set TFDS_DATA_DIR")
    return Path(home)


def _from_files(name: str, original: Original, source: Path, home: Path) -> Path:
    import tensorflow_datasets as tfds

    from leakjax.datasets.writing import write_set

    splits, names = read_original(name, source)
    features: dict[str, Any] = {"image": tfds.features.Image(shape=original.shape)}
    features |= {kind: tfds.features.ClassLabel(names=list(names[kind])) for kind in original.labels}
    if original.digits is not None:
        features["id"] = tfds.features.Text()
    examples = {split: partial(_examples, original, split, found) for split, found in splits.items()}
    return write_set(name, original.version, f"{name}, from {original.url}", features, examples, home)


def _examples(original: Original, split: str, found: Records) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, image in enumerate(found.images):
        example: dict[str, Any] = {kind: int(labels[key]) for kind, labels in found.labels.items()}
        if original.digits is not None:
            example["id"] = f"{split}_{key:0{original.digits}d}"
        yield key, example | {"image": png(image)}


def png(image: np.ndarray) -> bytes:
    """An image (H, W, C), C 1 or 3, as PNG."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else np.ascontiguousarray(image)).save(file, "PNG")
    return file.getvalue()


def _report(name: str, builder: Any, written: bool) -> Prepared:
    if isinstance(builder, Path):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(builder)
    splits = {split: int(info.num_examples) for split, info in builder.info.splits.items()}
    published = {split: count for split, (_, count) in ORIGINALS[name].splits.items() if split != "extra"}
    missing = {split: count for split, count in published.items() if splits.get(split, 0) != count}
    return Prepared(name=name, folder=Path(builder.data_dir), splits=splits, written=written, missing=missing)


def _download(name: str, original: Original, home: Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            f'--download needs TensorFlow: pip install "leakjax[tensorflow]"; or fetch {original.url} and give it by '
            "--from, which does not"
        )
    host = urlsplit(original.url).hostname
    try:
        socket.create_connection((host, 443 if original.url.startswith("https") else 80), timeout=10).close()
    except OSError as error:
        raise InputError(f"--download: {host} cannot be reached ({error}); give the files by --from") from error
    import tensorflow_datasets as tfds

    try:
        tfds.builder(name, data_dir=home, file_format="array_record").download_and_prepare()
    except Exception as error:
        raise InputError(f"--download {name}: {prepared.first_line(error)}; give the files by --from") from error
