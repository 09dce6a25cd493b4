"""Data sets of tensorflow-datasets that somebody prepared on this machine; nothing is downloaded or generated here.

A set is found by its files alone, so a set that is absent is refused at once instead of after a network time-out.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leakjax.datasets.originals import ORIGINALS
from leakjax.errors import InputError, NoSplitError, first_line, unknown_name

_NAME = re.compile(r"[A-Za-z]\w*(/[\w.-]+)?(:[\d.*]+)?")  # set, set/config, set:version


def source(name: str, known: Iterable[str], split: str | None = None) -> Sequence[Any]:
    """A split (default: `test`, or else the first) of the TFDS set `name` ("mnist", "set/config", "set:1.0.0").

    Arguments: `known`: names of the other data sets, to suggest when `name` is misspelled.
    Raises `InputError` for a set that is unknown, not prepared, in a format that needs TensorFlow, or without
    the features `image` and `label`.
    """
    builder = _find(name, known)
    _check_features(name, builder.info.features)
    splits = list(builder.info.splits)
    if not splits:
        raise InputError(f"data set {name!r} has no split; prepare it again: {_build(name)}")
    if split is not None and split not in splits:
        raise NoSplitError(name, split, splits)
    try:
        return builder.as_data_source(split=split or ("test" if "test" in splits else splits[0]))
    except NotImplementedError as error:
        raise InputError(
            f"data set {name!r} is prepared as {builder.info.file_format.value}, which needs TensorFlow to read; "
            'convert it once: pip install "leakjax[tensorflow]" and tfds convert_format '
            f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record"
        ) from error
    except Exception as error:
        raise unreadable(name, error) from error


def find(name: str, home: Path) -> Any:
    """The TFDS builder of the set `name` prepared in `home`, whatever its format; None where there is none."""
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        return read_only_builder.builder_from_files(name, data_dir=str(home))
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:
        raise unreadable(name, error) from error


def prepared_sets(home: Path) -> dict[str, str]:
    """The sets in `home`, from their files alone: a line each with format and number of examples."""
    found = {}
    for path in sorted([*home.glob("*/*/dataset_info.json"), *home.glob("*/*/*/dataset_info.json")]):
        try:
            info = json.loads(path.read_text())
            counts = {s["name"]: sum(map(int, s.get("shardLengths", []))) for s in info["splits"]}
            form = info.get("fileFormat", "tfrecord")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        name = "/".join(path.parent.relative_to(home).parts[:-1])
        shown = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        needs = "" if form == "array_record" else f", {form}: convert it to array_record to read it here"
        found[name] = f"prepared in {home}: {shown}{needs}"
    return found


def _find(name: str, known: Iterable[str]) -> Any:
    import tensorflow_datasets as tfds  # 0.2 s and more
    from tensorflow_datasets.core import read_only_builder, registered

    if _NAME.fullmatch(name):
        try:
            return read_only_builder.builder_from_files(name)
        except registered.DatasetNotFoundError:
            pass
        except Exception as error:
            raise unreadable(name, error) from error
    available = tfds.list_builders(with_community_datasets=False)
    base = name.split("/")[0].split(":")[0]
    if base not in available:
        raise unknown_name("data set", name, {*known, *difflib.get_close_matches(name, available)})
    raise InputError(
        f"data set {name!r} is not prepared on this machine, and nothing is downloaded here; prepare it once "
        f"({_build(name)}), or use samples, foolbox/cifar10 or --images FILE.npz"
    )


def _check_features(name: str, features: Any) -> None:
    found = dict(features) if hasattr(features, "keys") else {}
    if "image" not in found or "label" not in found:
        raise InputError(f"data set {name!r} has features {sorted(found)}; 'image' and 'label' are needed")
    image, label = found["image"], found["label"]
    if np.dtype(image.np_dtype) != np.uint8 or len(image.shape) != 3:
        raise InputError(f"data set {name!r}: feature 'image' is {image}; uint8 images (H, W, C) are needed")
    if not np.issubdtype(label.np_dtype, np.integer) or label.shape != ():
        raise InputError(f"data set {name!r}: feature 'label' is {label}; one integer is needed")


def _build(name: str) -> str:
    build = f'pip install "leakjax[tensorflow]" and tfds build {name} --file_format=array_record'
    return f"leakjax data prepare {name} --from ARCHIVE, or {build}" if name in ORIGINALS else build


def unreadable(name: str, error: Exception) -> InputError:
    """The error for the data set `name` whose files are damaged."""
    return InputError(f"data set {name!r} cannot be read: {first_line(error)}; remove its folder and prepare it again")
