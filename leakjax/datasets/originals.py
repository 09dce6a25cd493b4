"""The published sets by the names that tensorflow-datasets gives them, and their files as published."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from leakjax.datasets import records
from leakjax.datasets.archives import file_names, read_files
from leakjax.datasets.records import Records
from leakjax.errors import InputError

Read = Callable[[dict[str, bytes], tuple[str, ...]], Records]


@dataclasses.dataclass(frozen=True)
class Original:
    """A published set.

    - `version`: of the TFDS builder whose records ours equal; `url`: where the files are published;
    - `splits`: the files of each split, and how many examples the published split has;
    - `labels`: each kind of label with its number of classes, in the order of the files; `label` is what is learned;
    - `named`: for some kinds the class names, or the file among the others that holds them;
    - `read`: the format; `digits`: digits of the `id` of an example, None where TFDS gives none.
    """

    version: str
    url: str
    shape: tuple[int, int, int]
    splits: Mapping[str, tuple[tuple[str, ...], int]]
    labels: Mapping[str, int]
    read: Read
    named: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    digits: int | None = None


def _idx_set(url: str, names: tuple[str, ...] | None = None) -> Original:
    splits = {
        split: ((f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"), count)
        for split, prefix, count in (("train", "train", 60000), ("test", "t10k", 10000))
    }
    named = {"label": names} if names else {}
    return Original(
        version="3.0.1", url=url, shape=(28, 28, 1), splits=splits, labels={"label": 10}, read=records.idx, named=named
    )


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"

ORIGINALS: Mapping[str, Original] = {
    "cifar10": Original(
        version="3.0.2",
        url=_CIFAR + "cifar-10-binary.tar.gz",
        shape=(32, 32, 3),
        splits={
            "train": (tuple(f"data_batch_{k}.bin" for k in range(1, 6)), 50000),
            "test": (("test_batch.bin",), 10000),
        },
        labels={"label": 10},
        read=records.cifar,
        named={"label": "batches.meta.txt"},
        digits=5,
    ),
    "cifar100": Original(
        version="3.0.2",
        url=_CIFAR + "cifar-100-binary.tar.gz",
        shape=(32, 32, 3),
        splits={"train": (("train.bin",), 50000), "test": (("test.bin",), 10000)},
        labels={"coarse_label": 20, "label": 100},
        read=records.cifar,
        named={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        digits=5,
    ),
    "mnist": _idx_set("https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": _idx_set("https://github.com/zalandoresearch/fashion-mnist", tuple(_CLOTHES.split(","))),
    "svhn_cropped": Original(
        version="3.1.0",
        url="http://ufldl.stanford.edu/housenumbers/",
        shape=(32, 32, 3),
        splits={
            "train": (("train_32x32.mat",), 73257),
            "test": (("test_32x32.mat",), 26032),
            "extra": (("extra_32x32.mat",), 531131),
        },
        labels={"label": 10},
        read=records.mat,
        named={},
        digits=6,
    ),
}

ALIASES: Mapping[str, str] = {"svhn": "svhn_cropped", "fashionMNIST": "fashion_mnist"}


def read_original(name: str, source: Path) -> tuple[dict[str, Records], dict[str, tuple[str, ...]]]:
    """The splits of the set `name` of `ORIGINALS` that `source` holds, and the class names, checked.

    A split none of whose files is there is left out. Raises `InputError` where there is no split at all, a file of one
    is missing or damaged, or images or labels are not of the published kind.
    """
    original = ORIGINALS[name]
    name_files = {file for file in original.named.values() if isinstance(file, str)}
    wanted = {file for files, _ in original.splits.values() for file in files} | name_files
    found = read_files(source, wanted)
    splits: dict[str, Records] = {}
    for split, (files, _) in original.splits.items():
        missing = [file for file in files if file not in found]
        if not missing:
            splits[split] = original.read({file: found.pop(file) for file in files}, tuple(original.labels))
            _check(name, original, split, splits[split])
        elif len(missing) < len(files):
            raise InputError(f"--from {source}: {missing[0]} is missing for split {split!r} of {name!r}")
    if not splits:
        raise _wrong_files(name, original, source)
    return splits, {kind: _class_names(original, kind, found) for kind in original.labels}


def _check(name: str, original: Original, split: str, found: Records) -> None:
    if found.images.shape[1:] != original.shape:
        raise InputError(f"--from: images have shape {found.images.shape[1:]}, those of {name!r} {original.shape}")
    if not len(found.images):
        raise InputError(f"--from: split {split!r} of {name!r} holds no image")
    for kind, classes in original.labels.items():
        if found.labels[kind].max() >= classes:
            raise InputError(f"--from: {kind} {found.labels[kind].max()} in {split!r}; {name!r} has 0..{classes - 1}")


def _class_names(original: Original, kind: str, found: Mapping[str, bytes]) -> tuple[str, ...]:
    classes, named = original.labels[kind], original.named.get(kind, ())
    names = tuple(found.get(named, b"").decode("utf-8", "replace").split()) if isinstance(named, str) else named
    return names if len(set(names)) == classes == len(names) else tuple(map(str, range(classes)))


def _wrong_files(name: str, original: Original, source: Path) -> InputError:
    there = sorted(file_names(source))
    if any(file in ("data_batch_1", "train", "batches.meta", "meta") for file in there):
        remedy = f"this is the Python version, whose pickles can run code; take the binary one, {original.url}"
    else:
        wanted = next(iter(original.splits.values()))[0][0]
        shown = ", ".join(there[:3]) or "nothing"
        remedy = f"no {wanted} or the like in it (it holds {shown}); the files are published at {original.url}"
    return InputError(f"--from {source}: these are not the files of {name!r}: {remedy}")
