"""Files out of a folder, a tar or zip archive, or as they are; nothing is extracted to disk or executed."""

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from leakjax.errors import InputError

LIMIT = 2**31
"""Bytes that one file may unpack to: above the largest of the published ones, SVHN's extra split."""


def read_files(source: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The contents of those files of `source` whose names, without folders and without .gz, are in `wanted`.

    Arguments:
    - `source`: a folder (searched to any depth), a .tar, .tar.gz, .tgz or .zip archive, or one such file itself.

    Raises `InputError` where `source` is absent, damaged or cut short, or one file unpacks to more than 2 GiB.
    """
    if not source.exists():
        raise InputError(f"--from {source}: no such file or folder")
    found: dict[str, bytes] = {}
    try:
        for name, content in _members(source):
            plain = name.removesuffix(".gz")
            if plain in wanted and plain not in found:
                found[plain] = content()
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--from {source}: damaged or cut short ({reason}); download it again") from error
    return found


def file_names(source: Path) -> set[str]:
    """The names of all files of `source`, without folders; for error messages."""
    return {name for name, _ in _members(source)}


def _members(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield path.name, lambda path=path: _content(path.open("rb"), path.name)
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                name = Path(info.filename).name
                yield name, lambda info=info, name=name: _content(archive.open(info), name)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None:
                    name = Path(member.name).name
                    yield name, lambda file=file, name=name: _content(file, name)
    else:
        yield source.name, lambda: _content(source.open("rb"), source.name)


def _content(file: IO[bytes], name: str) -> bytes:
    with file, gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file as plain:
        content = plain.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise InputError(f"--from: {name} unpacks to more than {LIMIT // 2**30} GiB; is it the published file?")
    return content
