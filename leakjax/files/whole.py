"""Files are written whole or not at all: beside their place first, then moved there."""

import contextlib
import io
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and only then.

    Where the block raises, or the disk is full, what stood at `path` is still there and nothing else is left. A link is
    followed; a device or a pipe is written to as it is. Raises `OSError` with `path` as its file name.
    """
    with _named(path):
        goal = os.path.realpath(path)
        if _is_special(goal):
            with open(goal, "wb", buffering=0) as file:
                held = io.BytesIO()
                yield held
                file.write(held.getvalue())
            return
        place, name = os.path.split(goal)
        scratch = os.path.join(place, f".{name[:100]}.{secrets.token_hex(4)}.part")
        try:
            with open(scratch, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, goal)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text`, in UTF-8, to `path`, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_npz(path: str | os.PathLike, arrays: dict[str, Any], *, compressed: bool = False) -> None:
    """Write `arrays` by name, without pickles, to the npz file `path`, whole or not at all.

    As `numpy.savez` has it, `.npz` is added to a name that does not end so. An array may have any name, that of an
    argument of `numpy.savez` too (which are not the same in every version of NumPy).
    """
    path = Path(path)
    path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with whole_file(path) as file, zipfile.ZipFile(file, "w", method) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:  # an array's size is not known before
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def write_figure(path: str | os.PathLike, figure: Any, **options: Any) -> None:
    """Write a Matplotlib `figure` as PNG to `path`, whole or not at all; `options` as `savefig` takes them."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", **options)


@contextlib.contextmanager
def _named(path: str | os.PathLike) -> Iterator[None]:
    """An `OSError` of the block says which file could not be written: the one that was asked for."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise OSError(error.errno or 0, reason, os.fspath(path)) from error


def _is_special(path: str) -> bool:
    """Whether `path` is there and neither a plain file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
