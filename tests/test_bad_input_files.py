"""Bad files: each is refused in one line that names the argument, before it is inflated; none is opened as a pickle."""

import gzip
import io
import json
import os
import pickle
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from leakjax.captures.capture import read_capture
from leakjax.captures.weights import read_weights
from leakjax.datasets import load_npz
from leakjax.errors import InputError
from leakjax.interop.torch import read_torch_capture
from leakjax.models.reader import read_model


def apply(p, x):
    return np.float32(1) * (x.reshape(x.shape[0], -1) @ p["kernel"]) + p["bias"][None]


DRAW = np.random.default_rng(0)
PARAMS = {"kernel": np.float32(DRAW.normal(size=(16, 3))), "bias": np.ones(3, np.float32)}
MODEL = read_model(apply, PARAMS)
GRADIENTS = {path: np.float32(DRAW.normal(size=(1, *a.shape))) for path, a in PARAMS.items()}
META = {"loss": "softmax_cross_entropy", "input_shape": [4, 4, 1], "input_range": [0, 1]}
IMAGES = DRAW.integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
GOOD = {
    "--capture": {
        **{f"params/{p}": a for p, a in PARAMS.items()},
        **{f"gradients/{p}": g[0] for p, g in GRADIENTS.items()},
        "meta": np.array(json.dumps(META)),
    },
    "--torch-capture": {
        **{f"param/1.{n}": PARAMS[p].T for n, p in (("weight", "kernel"), ("bias", "bias"))},
        **{f"grad/1.{n}": GRADIENTS[p][0].T for n, p in (("weight", "kernel"), ("bias", "bias"))},
        "names": np.array(["1.weight", "1.bias"]),
        "meta": np.array(json.dumps(META)),
    },
    "--weights": {f"params/{p}": a for p, a in PARAMS.items()},
    "--images": {"images": IMAGES, "labels": np.array([0, 2])},
    "--truth": {"images": IMAGES, "labels": np.array([0, 2])},
}
READ = {
    "--capture": lambda path: read_capture(path, MODEL),
    "--torch-capture": lambda path: read_torch_capture(path, MODEL),
    "--weights": lambda path: read_weights(path, MODEL),
    "--images": lambda path: load_npz(path),
    "--truth": lambda path: load_npz(path, "--truth", (2, 4, 4, 1)),
}


def npz(**arrays):
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()


def zipped(members, **options):
    held = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        warnings.simplefilter("ignore")  # duplicate names
        for name, content in members:
            archive.writestr(name, content)
    return held.getvalue()


def npy(array, claimed=None, version=b"\x93NUMPY\x01\x00"):
    held = io.BytesIO()
    np.lib.format.write_array(held, np.asarray(array))
    content = held.getvalue()
    return version + (content if claimed is None else content.replace(*claimed))[8:]


KEEP = npy(np.ones(3))
ODD = {
    "empty": (b"", "empty"),
    "text": (b"loss,label\n1,2\n", "text"),
    "bytes": (bytes(range(7, 200)) * 9, "not an npz file"),
    "nul bytes": (b"\0" * 999, "not an npz file"),
    "html": (b"<!DOCTYPE html>", "text"),
    "zip header": (b"PK\x03\x04 and no more", "not an npz file"),
    "empty zip": (zipped([]), "missing"),
    "single array": (KEEP, "single array"),
    "pickle": (pickle.dumps({"a": [1]}), "pickle"),
    "old torch": (pickle.dumps([1], 2), "PyTorch"),
    "torch": (zipped([("archive/data.pkl", b"\x80\x02."), ("archive/data/0", b"0")]), "PyTorch"),
    "torch state": (zipped([("weights/data.pkl", b""), ("weights/version", b"3")]), "numpy.savez"),
    "safetensors": ((20).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}' + b"0" * 9, "safetensors"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"0" * 99, "HDF5"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"0" * 99, "picture"),
    "jpeg": (b"\xff\xd8\xff\xe0" + b"0" * 99, "picture"),
    "zip of text": (zipped([("images.txt", b"x")]), "not an array"),
    "zip of folders": (zipped([("a/", b""), ("a/b.npy", KEEP)]), "not an array"),
    "no header": (zipped([("images.npy", b"nothing"), ("meta.npy", b"x")]), "not an npz file"),
    "empty member": (zipped([("meta.npy", b"")]), "not an npz file"),
    "version 3": (zipped([("meta.npy", npy(1.0, version=b"\x93NUMPY\x03\x00"))]), "version"),
    "version 9": (zipped([("meta.npy", npy(1.0, version=b"\x93NUMPY\x09\x09"))]), "not an npz file"),
    "larger header": (zipped([("meta.npy", npy(np.ones(3), (b"(3,), ", b"(999,)")))]), "damaged"),
    "huge header": (zipped([("meta.npy", npy(np.ones(3), (b"(3,), }     ", b"(9999999,), ")))]), "not an npz file"),
    "negative shape": (zipped([("meta.npy", npy(np.ones(3), (b"(3,), ", b"(-3,),")))]), "damaged"),
    "code in header": (zipped([("meta.npy", npy(np.ones(3), (b"(3,), ", b"f(3), ")))]), "not an npz file"),
    "duplicate": (zipped([("meta.npy", KEEP), ("meta.npy", KEEP)]), "twice"),
    "objects": (npz(images=np.array([{}, None], object), meta=np.array([{}], object)), "pickled objects"),
    "structured": (npz(meta=np.zeros(2, [("a", "O"), ("b", "f4")])), "pickled objects"),
}


def flip(content, place):
    damaged = bytearray(content)
    damaged[place] ^= 0xFF
    return bytes(damaged)


def changed(argument, name, value):
    arrays = {k: v for k, v in GOOD[argument].items() if k != name or value is not None}
    return npz(**(arrays if value is None else {**arrays, name: value}))


def with_meta(argument, **changes):
    meta = {k: v for k, v in {**META, **changes}.items() if v is not ...}
    return changed(argument, "meta", np.array(json.dumps(meta)))


def wrong(array):
    """The same array spoiled in every way."""
    array = np.asarray(array)
    spoiled = [
        None,
        array.astype(object),
        np.array("text"),
        np.array(b"bytes"),
        array + 1j,
        array[..., None],
        array.ravel()[:1],
    ]
    spoiled += [
        np.zeros(array.shape, "M8[s]"),
        np.zeros(array.shape, [("a", "f4")]),
        np.zeros((0, *array.shape[1:]), array.dtype),
    ]
    if array.dtype.kind == "f":
        spoiled += [
            array.astype(int),
            array.astype(bool),
            np.where(array == array.flat[0], np.nan, array),
            array + np.inf,
        ]
    return spoiled


METAS = [
    *({"loss": value} for value in (..., None, "softmax", 3, ["softmax_cross_entropy"], "", "[/]")),
    *({"input_shape": value} for value in (..., None, "4,4,1", [], [4, 4, 0], [4, -4, 1], [4, 4, 1.5], [4, 4, True])),
    *({"input_shape": value} for value in ([5, 5, 1], [10**12, 4, 1], [1] * 99, {"h": 4})),
    *(
        {"input_range": value}
        for value in (..., None, "0,1", [], [0], [0, 1, 2], [1, 0], [0, 0], ["0", "1"], [0, True])
    ),
    *({"input_range": value} for value in ([0, float("nan")], [0, float("inf")], [0, 10**400], [-1e200, 1e200])),
    *({"examples": value} for value in (0, -1, 1.5, "1", True, [1], 10**30)),
    *({"local_steps": value} for value in (0, -1, 2, "2", 1.5, 10**9)),
    *({"learning_rate": value, "local_steps": 2} for value in (0, -1, "x", float("nan"), [0.1], 10**400)),
    *({"defense": value} for value in (3, "x", "gaussian:x", [], "gaussian:-1")),
    *({"weight_decay": value} for value in (-1, "x", None, [0.1], True, float("nan"), 10**400)),
    *({"input_mean": value, "input_std": [1]} for value in (None, 3, "0.5", [], ["x"], [0, 0], [float("nan")], [True])),
    *({"input_mean": [0], "input_std": value} for value in (None, 3, "0.5", [], [0], [-1], [1, 1], [10**400])),
    {"input_mean": [0.5], "input_std": [0.5]},
    {"weight_decay": 0.1, "local_steps": 2, "learning_rate": 0.1},
    *({"reduction": value} for value in ("total", 3, [])),
]
TEXTS = (b"{", b"", b"[]", b"null", b"3", b'"x"', b"[" * 5000, b"NaN", b"\xff\xfe")

FILES = [(argument, content, word) for argument in GOOD for content, word in ODD.values()]
FILES += [
    (argument, content, "")
    for argument, arrays in GOOD.items()
    for whole in [npz(**arrays)]
    for content in (
        whole[: len(whole) // 4],
        whole[: len(whole) // 2],
        whole[:-9],
        flip(whole, whole.index(b"NUMPY") + 130),
    )
]
FILES += [
    (argument, changed(argument, name, value), name.partition("/")[2] or name)
    for argument, arrays in GOOD.items()
    for name in arrays
    if name not in ("meta", "names")
    for value in wrong(arrays[name])
]
FILES += [
    (a, with_meta(a, **changes), next(iter(changes))) for a in ("--capture", "--torch-capture") for changes in METAS
]
FILES += [(a, changed(a, "meta", np.array(t)), "meta") for a in ("--capture", "--torch-capture") for t in TEXTS]
FILES += [("--capture", with_meta("--capture", victims=v), "victims") for v in (0, -1, 2, "1", True, 10**30)]
FILES += [(a, changed(a, "image", IMAGES), "'image'") for a in ("--capture", "--torch-capture", "--weights")]
FILES += [
    ("--torch-capture", changed("--torch-capture", "names", value), word)
    for value, word in (
        (None, "names"),
        (np.array([1, 2]), "names"),
        (np.array(["1.weight"]), "1.bias"),
        (np.array(["1.weight", "1.bias", "2.bias"]), "2.bias"),
        (np.array(["1.bias", "1.weight", "1.bias"]), "1.bias"),
        (np.array(["1.weight", "1.bias"], object), "pickled"),
        (np.array([b"1.weight\xff", b"1.bias"]), "ASCII"),
        (np.array(["x" * 600000, "1.bias"]), "names"),
    )
]
FILES += [
    (a, npz(images=IMAGES, labels=np.array(labels)), "labels")
    for a in ("--images", "--truth")
    for labels in ([0, -1], [0, 2**40], [0.0, 1.0], ["0", "1"], [True, False], [[0, 1]], 0, [0, np.nan], [0, 1j])
]
FILES += [
    ("--truth", npz(images=np.zeros(shape, np.uint8), labels=np.zeros(shape[0], int)), "images")
    for shape in ((1, 4, 4, 1), (3, 4, 4, 1), (2, 5, 4, 1), (2, 4, 4, 3))
]


@pytest.mark.parametrize(("argument", "content", "word"), FILES, ids=[f"{a}-{k}" for k, (a, _, _) in enumerate(FILES)])
def test_a_bad_file_is_an_input_error(tmp_path, argument, content, word):
    path = tmp_path / "a [red] file [-].npz"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        READ[argument](path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert word.removeprefix("input_") in message or argument in message


@pytest.mark.parametrize("argument", GOOD)
def test_the_good_files_are_good(tmp_path, argument):
    (tmp_path / "good.npz").write_bytes(npz(**GOOD[argument]))
    assert READ[argument](tmp_path / "good.npz") is not None


@pytest.mark.parametrize("argument", GOOD)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "dangling link", "below a file"])
def test_what_is_no_file_is_not_waited_for(tmp_path, argument, kind):
    path = tmp_path / "place"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "loop", "dangling link"):
        path.symlink_to({"device": "/dev/zero", "loop": path}.get(kind, tmp_path / "absent"))
    else:
        path.touch()
        path /= "below"
    with pytest.raises(InputError, match=argument):
        READ[argument](path)


@pytest.mark.parametrize("argument", GOOD)
@pytest.mark.parametrize("name", ["extra", "own"])
def test_a_bomb_is_refused_before_it_is_inflated(tmp_path, argument, name):
    first = next(iter(GOOD[argument]))
    name = first if name == "own" else first.rpartition("/")[0] + "/extra"
    content = npy(np.zeros((4_000_000, 2), np.asarray(GOOD[argument][first]).dtype))
    members = [(f"{k}.npy", npy(v)) for k, v in GOOD[argument].items() if k != name]
    (tmp_path / "bomb.npz").write_bytes(zipped([*members, (f"{name}.npy", content)]))
    del content
    refused = name == first or argument not in ("--images", "--truth")  # beside images others are not read
    tracemalloc.start()
    try:
        if refused:
            with pytest.raises(InputError, match=argument):
                READ[argument](tmp_path / "bomb.npz")
        else:
            READ[argument](tmp_path / "bomb.npz")
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
