"""Reading npz files that somebody else wrote: what is in them is known before it is inflated. No pickles, ever."""

import os
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leakjax.errors import InputError
from leakjax.files.foreign import what_it_is
from leakjax.runtime.memory import fits_on_host

SMALL = 2**20
"""Bytes that an array of words, such as a capture's `meta`, may have."""


class Entry(NamedTuple):
    """An array that is in the file and not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when read."""
        return int(np.prod([int(n) for n in self.shape], dtype=object)) * self.dtype.itemsize


class Npz:
    """An open npz file: the `entries` by name, from their headers alone, and `read` for some of them."""

    def __init__(self, archive: zipfile.ZipFile, where: str):
        self.where = where
        self._archive = archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.entries: dict[str, Entry] = {}
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                raise InputError(f"{where}: {info.filename!r} is not an array; numpy.savez writes arrays alone")
            name = info.filename.removesuffix(".npy")
            if name in self.entries:
                raise InputError(f"{where}: array {name!r} is there twice; write the file again, each array once")
            if info.flag_bits & 1:
                raise InputError(f"{where}: array {name!r} is encrypted; write the file without a password")
            self._members[name], self.entries[name] = info, self._entry(name, info)

    def _entry(self, name: str, info: zipfile.ZipInfo) -> Entry:
        with self._archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise InputError(f"{self.where}: array {name!r} has a header of version {version}; numbers have none")
            shape, _, dtype = _HEADERS[version](file)
            begun = file.tell()
        entry = Entry(tuple(int(n) for n in shape), dtype)
        if dtype.hasobject:
            raise InputError(f"{self.where}: cannot be read: {name!r} holds pickled objects (allow_pickle=False)")
        if begun + entry.nbytes != info.file_size or min(entry.shape, default=0) < 0:
            raise InputError(f"{self.where}: array {name!r} is damaged: its header says {entry.shape} of {dtype}")
        return entry

    def read(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays of these names (default: all), where they fit into memory."""
        chosen = list(self.entries if names is None else names)
        total = sum(self.entries[name].nbytes for name in chosen)
        if not fits_on_host(2 * total):
            raise InputError(f"{self.where}: its arrays take {total:,} bytes when read, more than memory has room for")
        found = {}
        for name in chosen:
            with self._archive.open(self._members[name]) as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
        return found

    def text(self, name: str) -> np.ndarray:
        """An array of words, which is short."""
        if self.entries[name].nbytes > SMALL:
            raise InputError(
                f"{self.where}: array {name!r} has {self.entries[name].nbytes:,} bytes; a short text is meant"
            )
        return self.read([name])[name]


_HEADERS: Mapping[tuple[int, int], Callable[[Any], tuple[Any, Any, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextmanager
def open_npz(path: str | os.PathLike, argument: str) -> Iterator[Npz]:
    """The npz file at `path`, which `argument` named; one that is no such file, or damaged, raises `InputError`."""
    where = f"{argument} {plain_file(path, argument)}"
    try:
        with zipfile.ZipFile(path) as archive:
            held = what_it_is(path, archive.namelist())
            if held is not None:
                raise InputError(f"{where}: cannot be read: {held}")
            yield Npz(archive, where)
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on damaged files
        raise InputError(f"{where}: cannot be read: {what_it_is(path) or _reason(error)}") from None


def read_npz(path: str | os.PathLike, argument: str) -> dict[str, np.ndarray]:
    """All arrays of an npz file; see `open_npz`."""
    with open_npz(path, argument) as file:
        return file.read()


def plain_file(path: Any, argument: str) -> Path:
    """`path`, once it is known to be a file that can be opened without waiting; else an `InputError`."""
    try:
        place = Path(path)
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{argument}: no such file: {path}") from None
    except TypeError:
        raise InputError(f"{argument}: expected the path of a file, got a {type(path).__name__}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{argument}: cannot read {path} ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{argument} {path}: cannot be read: it is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{argument} {path}: cannot be read: it is a pipe or a device; name a file")
    if not os.access(place, os.R_OK):
        raise InputError(f"{argument}: cannot read {path} (Permission denied)")
    return place


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "its arrays take more than memory has room for"
    words = " ".join(str(error).split())[:120] or type(error).__name__
    return f"it is not an npz file, or cut short or damaged ({words}); write or copy it again"
