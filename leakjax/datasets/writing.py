"""Examples written as a tensorflow-datasets set in array_record, without TensorFlow, whole or not at all.

Import this module when needed, not at start-up: it imports tensorflow_datasets.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from leakjax.errors import InputError

Examples = Callable[[], Iterator[tuple[Any, dict[str, Any]]]]


def write_set(
    name: str, version: str, description: str, features: Mapping[str, Any], splits: Mapping[str, Examples], home: Path
) -> Path:
    """Write `home`/`name`/`version`, in a scratch folder first, and rename it when it is whole.

    Arguments:
    - `features`: of TFDS; `splits`: for each a function that yields keys and examples (they decide the order, which
      TFDS shuffles by the keys alone).

    Returns the folder. Raises `InputError` where `home` cannot be written.
    """
    final = home / name / version
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix="preparing-") as scratch:
            builder = _builder(name, version, description, features, splits, scratch)
            silence = io.StringIO()
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                offline = tfds.download.DownloadConfig(try_download_gcs=False)
                builder.download_and_prepare(download_dir=os.path.join(scratch, "downloads"), download_config=offline)
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.replace(builder.data_dir, final)
            except OSError:  # another process was first
                if not final.is_dir():
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--data-dir: cannot write to {home} ({reason}); name another folder") from error
    return final


def _builder(
    name: str, version: str, description: str, features: Mapping[str, Any], splits: Mapping[str, Examples], home: str
) -> Any:
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The set, under the name that TFDS knows it by."""

        VERSION = tfds.core.Version(version)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(dict(features)),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: examples() for split, examples in splits.items()}

        def _generate_examples(self) -> Iterator[Any]:
            raise NotImplementedError  # the splits bring their own

    Builder.name = name
    return Builder(data_dir=home, file_format="array_record")
