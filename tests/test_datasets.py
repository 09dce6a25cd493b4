import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leakjax import datasets
from leakjax.datasets import DATASETS, from_range, load_dataset, load_npz, loading, to_range
from leakjax.errors import InputError

SAMPLES = Path(datasets.__file__).with_name("samples")


@pytest.fixture(autouse=True)
def _cache_and_no_network(monkeypatch, tmp_path_factory):
    def refuse(*args, **kwargs):
        raise AssertionError("a data set reached for the network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def tfds_home(monkeypatch, tmp_path):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def tiny():
    import tensorflow_datasets as tfds

    class TinyLeak(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 6, 3)), "label": tfds.features.ClassLabel(num_classes=5)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._examples(0), "test": self._examples(100)}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self, start):
            for i in range(3):
                yield i, {"image": Image.new("RGB", (6, 4), (start + i,) * 3), "label": i + 2}

    def prepare(folder):
        builder = TinyLeak(data_dir=folder, file_format="array_record")
        builder.download_and_prepare(download_dir=folder / "downloads")
        return Path(builder.data_dir)

    return prepare


def run(code, **environment):
    command = [sys.executable, "-c", code]
    root = str(Path(datasets.__file__).parents[2])
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": root, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("size", [32, 64])
def test_samples_are_ten_different_photos(size):
    images, labels = load_dataset("samples", range(10), (size, size, 3))
    assert images.shape == (10, size, size, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == list(range(10))
    flat = images.reshape(10, -1).astype(float)
    assert flat.std(axis=1).min() > 25
    assert (np.corrcoef(flat) - np.eye(10)).max() < 0.9
    neighbors = np.abs(np.diff(images.astype(float), axis=2)).mean(axis=(1, 2, 3))
    assert np.all(neighbors < 0.6 * flat.std(axis=1))  # smooth as photos are; noise gives more than 1


def test_sample_files_are_what_the_builder_returns():
    paths = sorted((SAMPLES / "32").glob("*.png"))
    assert [path.stem for path in paths[:4]] == ["00_astronaut", "01_chelsea", "02_coffee", "03_rocket"]
    assert [path.name for path in paths] == sorted(path.name for path in (SAMPLES / "64").glob("*.png"))
    images = load_dataset("samples", range(10), (32, 32, 3)).images
    np.testing.assert_array_equal(images, [np.asarray(Image.open(path)) for path in paths])
    sources = (SAMPLES / "SOURCES.md").read_text()
    assert all(f"`{path.stem}`" in sources for path in paths)


def test_sizes_show_the_same_photos():
    small = load_dataset("samples", range(10), (32, 32, 3)).images.astype(float)
    large = load_dataset("samples", range(10), (64, 64, 3)).images.astype(float)
    halved = large.reshape(10, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.sqrt(((small - halved) ** 2).mean(axis=(1, 2, 3))).max() < 12


def test_indices_keep_their_order():
    assert load_dataset("samples", [3, 0, 3], (32, 32, 3)).labels.tolist() == [3, 0, 3]


@pytest.mark.parametrize(
    ("name", "shape", "labels"),
    [
        ("cifar10", (32, 32, 3), [3, 8, 8, 0]),
        ("cifar100", (32, 32, 3), [49, 33, 72, 51]),
        ("imagenet", (512, 512, 3), [243, 559, 438, 990]),
        ("mnist", (28, 28, 1), [7, 2, 1, 0]),
        ("fashionMNIST", (28, 28, 1), [9, 2, 1, 1]),
    ],
)
def test_foolbox(name, shape, labels):
    images, found = load_dataset(f"foolbox/{name}", range(4), shape)
    assert images.shape == (4, *shape)
    assert found.tolist() == labels
    assert images.astype(float).std() > 25


def test_foolbox_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install foolbox"):
        load_dataset("foolbox/cifar10", [0], (32, 32, 3))


def test_every_named_set_has_a_reader_and_a_line():
    assert list(DATASETS) == list(loading._SOURCES)
    assert all("\n" not in line for line in DATASETS.values())


@pytest.mark.parametrize("index", [-1, 10, 999])
def test_index_out_of_range(index):
    with pytest.raises(InputError, match=rf"--index {index} .*0\.\.9"):
        load_dataset("samples", [0, index], (32, 32, 3))


def test_no_index():
    with pytest.raises(InputError, match="--index"):
        load_dataset("samples", [], (32, 32, 3))


@pytest.mark.parametrize("name", ["samples", "foolbox/cifar10"])
def test_shape_that_does_not_fit(name):
    with pytest.raises(InputError, match=r"\(32, 32, 3\).*\(28, 28, 1\)"):
        load_dataset(name, [0], (28, 28, 1))


@pytest.mark.parametrize("name", ["cifar10", "mnist", "imagenet2012", "cifar10:3.0.2"])
def test_unprepared_set_says_what_to_do(name, tfds_home):
    with pytest.raises(InputError, match=rf"{name}.*not prepared.*tfds build {name} --file_format=array_record"):
        load_dataset(name, [0], (32, 32, 3))
    assert list(tfds_home.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sampels", "'samples'"), ("foolbox/cifar", "'foolbox/cifar10'"), ("cifar_10", "'cifar10'"), ("zzqq", "known: ")]
    + [(name, "") for name in ("", "../x", "/etc", "a b", "huggingface:mnist", "x/y/z")],
)
def test_unknown_name(name, hint, tfds_home):
    with pytest.raises(InputError, match=f"unknown data set {re.escape(repr(name))}; .*{hint}"):
        load_dataset(name, [0], (32, 32, 3))


def test_prepared_set_is_read(tiny, tfds_home):
    tiny(tfds_home)
    images, labels = load_dataset("tiny_leak", [2, 0], (4, 6, 3))
    np.testing.assert_array_equal(images, np.stack([np.full((4, 6, 3), v, np.uint8) for v in (102, 100)]))
    assert labels.tolist() == [4, 2]
    with pytest.raises(InputError, match=r"--index 3 .*0\.\.2"):
        load_dataset("tiny_leak", [3], (4, 6, 3))
    with pytest.raises(InputError, match=r"\(4, 6, 3\).*\(32, 32, 3\)"):
        load_dataset("tiny_leak", [0], (32, 32, 3))


def test_tfrecord_set_says_how_to_convert(tiny, tfds_home):
    folder = tiny(tfds_home)
    for path in folder.glob("*array_record*"):
        path.rename(folder / path.name.replace("array_record", "tfrecord"))
    info = json.loads((folder / "dataset_info.json").read_text())
    text = json.dumps(info).replace('"array_record"', '"tfrecord"')
    (folder / "dataset_info.json").write_text(text)
    with pytest.raises(InputError, match=r"tfrecord.*convert_format .*--out_file_format=array_record"):
        load_dataset("tiny_leak", [0], (4, 6, 3))


@pytest.mark.parametrize("damage", ["features.json", "dataset_info.json", "array_record"])
def test_damaged_set_is_an_input_error(damage, tiny, tfds_home):
    folder = tiny(tfds_home)
    for path in folder.glob(f"*{damage}*"):
        path.write_text("{") if path.suffix == ".json" else path.unlink()
    with pytest.raises(InputError, match="tiny_leak"):
        load_dataset("tiny_leak", [0], (4, 6, 3))


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_dataset("samples", [1], (32, 32, 3)).labels.tolist() == [1]


def test_two_processes_prepare_at_once_without_tensorflow(tmp_path):
    code = (
        "import sys; from leakjax.datasets import load_dataset\n"
        "x = [load_dataset('samples', range(10), (s, s, 3)).images.sum() for s in (32, 64)]\n"
        "load_dataset('foolbox/mnist', [0], (28, 28, 1))\n"
        "assert not {'tensorflow', 'foolbox', 'skimage'} & set(sys.modules)\n"
        "print(*x)"
    )
    processes = [run(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(outputs[0][0].split()) == 2  # the builder's own chatter is silenced
    assert not list((tmp_path / "leakjax" / "tfds").glob("preparing-*"))


def test_unprepared_set_fails_at_once_in_a_fresh_process(tmp_path):
    code = "from leakjax.datasets import load_dataset; load_dataset('cifar10', [0], (32, 32, 3))"
    _, err = run(code, TFDS_DATA_DIR=str(tmp_path)).communicate(timeout=20)
    assert b"InputError: data set 'cifar10' is not prepared" in err


IMAGES = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
LABELS = np.array([1, 0], np.int32)


def test_npz(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    images, labels = load_npz(tmp_path / "x.npz")
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "'labels' is missing"),
        ({"labels": LABELS}, "'images' is missing"),
        ({"images": IMAGES / 255, "labels": LABELS}, "'images' must be uint8.*float64"),
        ({"images": IMAGES[0], "labels": LABELS}, r"'images' must be uint8.*\(4, 6, 3\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "'images' must be uint8"),
        ({"images": IMAGES, "labels": LABELS[:1]}, "'labels' must be 2 integers"),
        ({"images": IMAGES, "labels": LABELS.astype(float)}, "'labels' must be 2 integers.*float64"),
        ({"images": IMAGES, "labels": LABELS[:, None]}, "'labels' must be 2 integers"),
        ({"images": IMAGES.astype(object), "labels": LABELS}, "cannot be read.*allow_pickle"),
    ],
)
def test_npz_with_wrong_arrays(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=rf"--images .*x\.npz: .*{message}"):
        load_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("content", ["absent", "folder", "empty", "text", "npy", "cut", "flipped"])
def test_npz_that_is_no_npz(content, tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=IMAGES, labels=LABELS)
    whole = path.read_bytes()
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "npy":
        with open(path, "wb") as file:
            np.save(file, IMAGES)
    elif content != "absent":
        middle = bytes(255 - b for b in whole[60:160])
        cut = whole[: len(whole) // 2]
        path.write_bytes(
            {"empty": b"", "text": b"images", "cut": cut, "flipped": whole[:60] + middle + whole[160:]}[content]
        )
    with pytest.raises(InputError, match=r"--images .*x\.npz: (no such file|not an npz file|cannot be read)"):
        load_npz(path)


def test_ranges():
    x = to_range(np.array([0, 51, 255], np.uint8), (-1.0, 1.0))
    assert x.dtype == np.float64
    np.testing.assert_allclose(x, [-1, -0.6, 1])
    np.testing.assert_allclose(from_range(x, (-1.0, 1.0)) * 255, [0, 51, 255])
    np.testing.assert_allclose(from_range(np.array([-3.0, 3.0]), (-1.0, 1.0)), [-1, 2])
