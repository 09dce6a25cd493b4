"""What every command line of the benchmarks goes through: options, places on disk, and one line for bad input."""

import argparse
import contextlib
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

from benchmarks.records import Record, append, read_records
from leakjax.errors import InputError, first_line


class Parser(argparse.ArgumentParser):
    """Options of which a wrong one is answered by one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with status 2."""
        say(message)
        sys.exit(2)


def say(message: str) -> None:
    """One line of error on standard error."""
    print(f"benchmarks: error: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn bad input, and files that cannot be read or written, into one line and exit status 2."""
    try:
        yield
    except InputError as error:
        say(str(error))
        sys.exit(2)
    except OSError as error:
        say(f"{error.filename or 'a file'}: {error.strerror or error}")
        sys.exit(2)


def folder(out: Path) -> Path:
    """The folder of `--out`, made where it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: is no folder ({getattr(error, 'strerror', None) or error})") from None
    return out


def file_in_folder(out: Path) -> Path:
    """The file of `--out`, its folder made where it is missing."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file of records")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    return out


def printed(place: Path, table: Callable[[list[Record]], str]) -> str:
    """The table of the records at the place of `--table`."""
    try:
        records = read_records(place) if place.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"--table {place}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if records is None:
        raise InputError(f"--table {place}: no such file or folder")
    if not records:
        raise InputError(f"--table {place}: holds no records; name a records-*.jsonl or a folder of them")
    try:
        return table(records)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--table {place}: records of something else ({first_line(error)} is missing)") from None


def whole_numbers(option: str, text: str, least: int = 0) -> list[int]:
    """The integers, from `least`, of an option as typed, "0,3"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 and int(part) >= least for part in parts):
        raise InputError(f"{option}: expected integers from {least} separated by commas, got {text!r}")
    return [int(part) for part in parts]


def place_options(parser: argparse.ArgumentParser) -> None:
    """The options of a study that writes a file of records: `--out` and `--table`."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the records as lines of JSON")
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="print the table of records, run nothing")


def recorded(records: Iterator[Record], out: Path | None, table: Callable[[list[Record]], str]) -> None:
    """Append each record to `out` as soon as it is made, and print the table of all."""
    if out is not None:
        file_in_folder(out)
    made = []
    for record in records:
        made.append(record)
        if out is not None:
            append(out, [record])
    print(table(made))


def meet(
    coordinator: str, processes: int, process: int, start: Callable[..., Any] = jax.distributed.initialize
) -> None:
    """Join the processes of one run at HOST:PORT."""
    found = re.fullmatch(r"(?P<host>[\w.-]+|\[[\da-fA-F:]+\]):(?P<port>\d{1,5})", coordinator)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise InputError(f"--coordinator: expected HOST:PORT, as 10.0.0.1:1234, got {coordinator!r}")
    try:
        socket.getaddrinfo(found["host"].strip("[]"), int(found["port"]))
        start(coordinator, processes, process)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--coordinator {coordinator}: cannot meet there ({first_line(error)})") from None
