"""The embedded sample set as a tensorflow-datasets builder that needs neither TensorFlow nor a network.

Import this module when needed, not at start-up: it imports tensorflow_datasets.
"""

import atexit
import contextlib
import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from leakjax.errors import InputError
from leakjax.files.home import user_cache

FOLDER = Path(__file__).with_name("samples")
SIZES = (32, 64)


def sample_files(size: int) -> list[Path]:
    """The PNG files of `size` x `size` pixels, `<label>_<name>.png`, in order of their label."""
    return sorted((FOLDER / str(size)).glob("*.png"))


class Samples(tfds.core.GeneratorBasedBuilder):
    """Ten CC0 or public-domain photos; one configuration a size. Sources and terms: `samples/SOURCES.md`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and type that the base class declares)
        tfds.core.BuilderConfig(name=str(size), description=f"{size}x{size} RGB") for size in SIZES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self._size
        return tfds.core.DatasetInfo(
            builder=self,
            description="Ten CC0 or public-domain photos.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[path.stem[3:] for path in sample_files(size)]),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for label, path in enumerate(sample_files(self._size)):
            yield label, {"image": path.read_bytes(), "label": label}

    @property
    def _size(self) -> int:
        assert self.builder_config is not None
        return int(self.builder_config.name)


class _Halved(Sequence[Any]):
    """Records {"image", "label"} with images of half the sides: means of 2x2 pixels, rounded."""

    def __init__(self, records: Sequence[Any]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        record = self.records[index]
        image = np.asarray(record["image"], float)
        height, width, channels = image.shape
        means = image.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))
        return {**record, "image": np.rint(means).astype(np.uint8)}


def source(input_shape: tuple[int, ...]) -> Sequence[Any]:
    """The sample set of `input_shape`, (16, 16, 3), (32, 32, 3) or (64, 64, 3), as a data source; prepared on the first
    use. The smallest are those of 32x32, halved.

    Raises `InputError` for any other shape.
    """
    shapes: dict[tuple[int, ...], int] = {(size, size, 3): size for size in (SIZES[0] // 2, *SIZES)}
    if input_shape not in shapes:
        raise InputError(
            f"data set 'samples' has images of shape {' and '.join(map(str, shapes))}, the model takes {input_shape}; "
            "choose another model or data set, or give --images"
        )
    size = shapes[input_shape]
    builder: Any = tfds.builder_from_directory(prepared(max(size, SIZES[0])))
    records = builder.as_data_source(split="train")
    return records if size in SIZES else _Halved(records)


def prepared(size: int) -> Path:
    """The folder of the prepared set: in the user's cache, or where that cannot be written in a temporary folder."""
    kept = user_cache("tfds")
    try:
        if kept is not None:
            return _prepared_below(kept, size)
    except OSError:
        pass
    return _prepared_below(_process_cache(), size)


def _prepared_below(cache: Path, size: int) -> Path:
    """Prepare in a scratch folder and rename, so that processes that start together never read half a set."""
    final = cache / _digest(size) / "samples" / str(size) / str(Samples.VERSION)
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="preparing-") as scratch:
        silence = io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            builder = Samples(config=str(size), data_dir=scratch, file_format="array_record")
            offline = tfds.download.DownloadConfig(try_download_gcs=False)
            builder.download_and_prepare(download_dir=os.path.join(scratch, "downloads"), download_config=offline)
        try:
            os.replace(builder.data_dir, final)
        except OSError:  # another process was first
            if not final.is_dir():
                raise
    return final


def _digest(size: int) -> str:
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sample_files(size))).hexdigest()[
        :16
    ]


@functools.cache
def _process_cache() -> Path:
    folder = tempfile.mkdtemp(prefix="leakjax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
