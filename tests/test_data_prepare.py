import gzip
import io
import json
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from leakjax.datasets import load_dataset, load_split, stack, train_and_test
from leakjax.datasets import preparing as module
from leakjax.datasets.originals import ORIGINALS
from leakjax.datasets.preparing import prepare
from leakjax.errors import InputError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """TFDS's folder, and no network."""
    from tensorflow_datasets.core import constants

    def refuse(*args, **kwargs):
        raise AssertionError("a data set reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "home"))
    return tmp_path / "home"


def cifar_rows(rng, count, classes):
    rows = rng.integers(0, 256, (count, len(classes) + 3072)).astype(np.uint8)
    for k, n in enumerate(classes):
        rows[:, k] = np.arange(count) % n
    return rows


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def published(name, rng):
    """Tiny files in the true formats: {file: bytes} and {split: (images, labels)}."""
    files, truth = {}, {}
    if name.startswith("cifar"):
        classes = list(ORIGINALS[name].labels.values())
        for split, (members, _) in ORIGINALS[name].splits.items():
            rows = cifar_rows(rng, 3 * len(members), classes)
            files |= {member: rows[3 * k : 3 * k + 3].tobytes() for k, member in enumerate(members)}
            planes = rows[:, len(classes) :].reshape(-1, 3, 32, 32)
            truth[split] = np.stack([planes[:, c] for c in range(3)], axis=-1), rows[:, len(classes) - 1]
        files["batches.meta.txt"] = "\n".join([*NAMES, "", ""]).encode()
    elif name == "svhn_cropped":
        for split, count in (("train", 5), ("test", 11)):
            x, y = rng.integers(0, 256, (32, 32, 3, count)).astype(np.uint8), np.arange(count) % 10 + 1
            file = io.BytesIO()
            savemat(file, {"X": x, "y": y[:, None].astype(np.uint8)})
            files[f"{split}_32x32.mat"] = file.getvalue()
            truth[split] = np.transpose(x, (3, 0, 1, 2)), np.where(y == 10, 0, y)
    else:
        for split, prefix, count in (("train", "train", 6), ("test", "t10k", 4)):
            x, y = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8), np.arange(count, dtype=np.uint8)
            files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(x))
            files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(y))
            truth[split] = x[..., None], y
    return files, truth


def packed(files, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr("deep/" + name, content)
    elif path.suffix == ".gz":
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo("deep/" + name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    return path


def rows_of(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize(
    ("name", "form"),
    [("cifar10", "a.tar.gz"), ("cifar100", "a.zip"), ("mnist", "a"), ("fashion_mnist", "a.zip"), ("svhn_cropped", "a")],
)
def test_round_trip(name, form, rng, tmp_path, home):
    files, truth = published(name, rng)
    result = prepare(name, packed(files, tmp_path / form))
    assert result.written
    assert result.folder.is_relative_to(home / name)
    assert "tensorflow" not in sys.modules
    for split, (images, labels) in truth.items():
        found = load_split(name, split, ORIGINALS[name].shape)
        assert rows_of(*found) == rows_of(images, labels)
        assert result.splits[split] == len(labels)
        assert result.missing[split] == ORIGINALS[name].splits[split][1]
    first = load_dataset(name, [0], ORIGINALS[name].shape)
    assert rows_of(*first)[0] in rows_of(*truth["test"])
    again = prepare(name, tmp_path / "no such file")
    assert again == result._replace(written=False)
    assert [path.name for path in home.iterdir()] == [name]


def test_order_and_features_are_those_of_tensorflow_datasets(rng, tmp_path):
    import tensorflow_datasets as tfds

    files, _ = published("cifar10", rng)
    folder = prepare("cifar10", packed(files, tmp_path / "a")).folder
    builder = tfds.builder_from_directory(folder)
    assert set(builder.info.features) == {"id", "image", "label"} == set(tfds.builder("cifar10").info.features)
    assert builder.info.features["label"].names == NAMES
    ids = [record["id"].decode() for record in builder.as_data_source(split="train")]
    assert sorted(ids) == [f"train_{k:05d}" for k in range(15)]
    assert ids != sorted(ids)  # shuffled by key and split name, as TFDS does


def test_cifar100_has_both_labels_and_learns_the_fine_one(rng, tmp_path):
    import tensorflow_datasets as tfds

    files, _ = published("cifar100", rng)
    source = tfds.builder_from_directory(prepare("cifar100", packed(files, tmp_path / "a")).folder)
    record = source.as_data_source(split="test")[0]
    assert int(record["id"].decode()[-5:]) == record["coarse_label"] == record["label"]


def cut(files, name):
    return files | {name: files[name][:-7]}


def without(files, *names):
    return {name: content for name, content in files.items() if name not in names}


BAD = {
    "cut binary": ("cifar10", lambda f: cut(f, "data_batch_3.bin"), "data_batch_3.bin has 9212 bytes.*3073-byte"),
    "no batch": ("cifar10", lambda f: without(f, "data_batch_3.bin"), "data_batch_3.bin is missing"),
    "label": ("cifar10", lambda f: f | {"test_batch.bin": b"\x0a" + bytes(3072)}, r"label 10.*0\.\.9"),
    "empty": ("cifar10", lambda f: f | {"test_batch.bin": b""}, "test_batch.bin has 0 bytes"),
    "other set": ("mnist", lambda f: {"data_batch_1.bin": bytes(3073)}, "not the files of 'mnist'.*data_batch_1.bin"),
    "nothing": ("mnist", lambda f: {}, "holds nothing"),
    "cut gzip": ("mnist", lambda f: cut(f, "t10k-images-idx3-ubyte.gz"), "damaged or cut short"),
    "cut idx": (
        "mnist",
        lambda f: f | {"t10k-images-idx3-ubyte.gz": gzip.compress(idx_bytes(np.zeros((4, 28, 28), np.uint8))[:-1])},
        "3151 bytes, its header says 3152",
    ),
    "swapped": (
        "mnist",
        lambda f: f | {"t10k-images-idx3-ubyte.gz": f["t10k-labels-idx1-ubyte.gz"]},
        "no idx file of bytes with 3 axes",
    ),
    "shape": (
        "mnist",
        lambda f: f | {"t10k-images-idx3-ubyte.gz": gzip.compress(idx_bytes(np.zeros((4, 32, 32), np.uint8)))},
        r"\(32, 32, 1\).*\(28, 28, 1\)",
    ),
    "counts": (
        "mnist",
        lambda f: f | {"t10k-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(np.zeros(9, np.uint8)))},
        "4 images.*9 labels",
    ),
    "cut mat": ("svhn", lambda f: cut(f, "test_32x32.mat"), "test_32x32.mat is no MATLAB file"),
    "text mat": ("svhn", lambda f: f | {"test_32x32.mat": b"X y"}, "test_32x32.mat is no MATLAB file"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_not_the_set(case, rng, tmp_path, home):
    name, spoil, message = BAD[case]
    files, _ = published({"svhn": "svhn_cropped"}.get(name, name), rng)
    with pytest.raises(InputError, match=message):
        prepare(name, packed(spoil(files), tmp_path / "a"))
    assert not home.exists()


def test_cut_archive(rng, tmp_path, home):
    path = packed(published("cifar10", rng)[0], tmp_path / "a.tar.gz")
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(InputError, match="damaged or cut short"):
        prepare("cifar10", path)
    assert not home.exists()


def test_pickles_are_refused_unread(tmp_path, home):
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    path = packed({"data_batch_1": pickle.dumps(Trap()), "test_batch": b""}, tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(InputError, match=r"Python version, whose pickles can run code.*cifar-10-binary\.tar\.gz"):
        prepare("cifar10", path)
    assert not trap.exists()
    assert not home.exists()


def test_archive_cannot_write_elsewhere(rng, tmp_path, home):
    files = {f"../../{name}": content for name, content in published("cifar10", rng)[0].items()}
    before = set(tmp_path.rglob("*"))
    prepare("cifar10", packed(files, tmp_path / "a.tar.gz"))
    outside = [p for p in set(tmp_path.rglob("*")) - before if not p.is_relative_to(home)]
    assert outside == [tmp_path / "a.tar.gz"]


def test_failure_while_writing_leaves_nothing(monkeypatch, rng, tmp_path, home):
    def fail(image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "png", fail)
    with pytest.raises(InputError, match=r"--data-dir: cannot write.*No space left"):
        prepare("mnist", packed(published("mnist", rng)[0], tmp_path / "a"))
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", ["cifar_10", "imagenet2012", ""])
def test_unknown_set(name):
    with pytest.raises(InputError, match="unknown data set"):
        prepare(name)


def test_nothing_is_downloaded(monkeypatch, home):
    with pytest.raises(InputError, match=r"nothing is downloaded unasked.*cifar-10-binary.*--from.*--download"):
        prepare("cifar10")
    with pytest.raises(InputError, match=r"leakjax\[tensorflow\]"):
        prepare("cifar10", download=True)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())

    def unreachable(address, timeout):
        assert timeout <= 10
        raise OSError("no route")

    monkeypatch.setattr(module.socket, "create_connection", unreachable)
    with pytest.raises(InputError, match=r"www\.cs\.toronto\.edu cannot be reached"):
        prepare("cifar10", download=True)
    assert not home.exists()


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "Pets Here"
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = root / split / name
            place.mkdir(parents=True)
            for k in range(count):
                picture = np.zeros((20, 40, 3), np.uint8)
                picture[:, 10:30] = 100 * label + k  # the sides are cropped away
                Image.fromarray(picture).save(place / f"{k}.png")
    return root


def test_folder(photos, home):
    images, labels = load_dataset(f"folder:{photos}", [0, 3], (20, 20, 3))
    assert labels.tolist() == [0, 1]
    np.testing.assert_array_equal(images, np.stack([np.full((20, 20, 3), v, np.uint8) for v in (0, 101)]))
    train, test = train_and_test(f"folder:{photos}", (10, 10, 1))
    assert (train.images.shape, test.images.shape) == ((6, 10, 10, 1), (4, 10, 10, 1))
    assert load_dataset(f"folder:{photos / 'train'}", [5], (10, 10, 3)).labels.tolist() == [1]


def test_folder_prepared(run, photos, home):
    result = run("data", "prepare", f"folder:{photos}", "--size", "10,12", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["name"], summary["splits"]) == ("pets_here", {"train": 6, "test": 4})
    assert sorted(load_split("pets_here", "train", (10, 12, 3)).labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert "10 test" not in json.loads(run("list", "datasets", "--json").stdout)["pets_here"]
    assert "4 test" in json.loads(run("list", "datasets", "--json").stdout)["pets_here"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder:none", "--size", "8,8"], "no such folder"),
        (["folder:PHOTOS"], "--size: expected H,W"),
        (["folder:PHOTOS", "--size", "8"], "--size: expected H,W"),
        (["folder:PHOTOS", "--size", "0,8"], "--size: sides must be"),
        (["folder:PHOTOS", "--size", "8,8", "--name", "cifar10"], "no free name"),
        (["folder:PHOTOS", "--size", "8,8", "--name", "../x"], "no free name"),
        (["folder:PHOTOS", "--size", "8,8", "--from", "x"], "--from and --download do not go"),
        (["cifar10", "--size", "8,8"], "--size and --name go with folder"),
        (["cifar10"], "nothing is downloaded unasked"),
        (["cifar10", "--from", "absent.tar.gz"], "no such file or folder"),
        (["folder:EMPTY", "--size", "8,8"], "in its subfolders"),
        (["folder:BROKEN", "--size", "8,8"], "is no picture"),
    ],
)
def test_bad_command_lines(words, message, run, photos, tmp_path, home):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "x.jpg").write_text("no picture")
    names = {"PHOTOS": photos, "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    result = run("data", "prepare", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not home.exists() or not list(home.iterdir())


def test_command_line(run, rng, tmp_path):
    path, there = packed(published("cifar10", rng)[0], tmp_path / "a.tar.gz"), tmp_path / "there"
    result = run("data", "prepare", "cifar10", "--from", path, "--data-dir", there, "--out", "o", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == json.loads((tmp_path / "o" / "data.json").read_text())
    assert summary["splits"] == {"train": 15, "test": 3}
    assert summary["missing"] == {"train": 50000, "test": 10000}
    assert summary["written"] is True
    again = run("data", "prepare", "cifar10", "--data-dir", there)
    assert "already there" in again.stderr
    assert "15 train" in json.loads(run("data", "list", "--data-dir", there, "--json").stdout)["cifar10"]


def test_killed_preparation_leaves_no_half_set(rng, tmp_path, home):
    path = packed(published("mnist", rng)[0], tmp_path / "a")
    code = (
        "import os, signal, sys; from pathlib import Path; from leakjax.datasets import preparing\n"
        "write = preparing.png; count = iter(range(5))\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "preparing.png = lambda x: write(x) if next(count, None) is not None else die()\n"
        "preparing.prepare('mnist', Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    root = Path(module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, path, home], cwd=root, capture_output=True, timeout=60)
    assert done.returncode == -9
    with pytest.raises(InputError, match="not prepared"):
        load_dataset("mnist", [0], (28, 28, 1))
    assert prepare("mnist", path).splits == {"train": 6, "test": 4}


def test_digits_split_is_fixed(rng):
    train, test = train_and_test("digits", (8, 8, 1))
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    from sklearn.datasets import load_digits

    whole = load_digits()
    np.testing.assert_array_equal(np.round(test.images[..., 0] * (16 / 255)), whole.images[4::5])
    np.testing.assert_array_equal(test.labels, whole.target[4::5])
    with pytest.raises(InputError, match="no split 'extra'; it has train, test"):
        load_split("digits", "extra", (8, 8, 1))


def test_sets_of_one_split_are_parted_by_index():
    train, test = train_and_test("samples", (32, 32, 3))
    assert test.labels.tolist() == [4, 9]
    assert train.labels.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_stack():
    records = [{"image": np.full((2, 3, 1), k, np.uint8), "label": 5 - k} for k in range(3)]
    images, labels = stack(records)
    assert images.shape == (3, 2, 3, 1)
    assert labels.tolist() == [5, 4, 3]
    with pytest.raises(InputError, match="holds no image"):
        stack([])
