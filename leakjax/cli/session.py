"""What every command stands in: one-line errors, a clean standard output, progress, a folder that can be written."""

import contextlib
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from leakjax.cli.caching import enable_compilation_cache
from leakjax.cli.stdout import answers_alone
from leakjax.errors import InputError

_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # Click's, or the one that newer versions of Typer carry
_MADE: list[Path] = []  # folders that this command made


class OneLineErrors(TyperGroup):
    """The commands, with a mistyped option answered by one line, as every other bad input is."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run a command line."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except (_USAGE_ERROR, InputError) as error:
            if not standalone_mode:
                raise
            if isinstance(error, InputError):
                say(str(error))
            elif type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                say(error.format_message())
            sys.exit(2)
        except typer.Abort:
            sys.exit(130)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


@contextlib.contextmanager
def session() -> Iterator[Console]:
    """Set up the process, and turn bad input into one line and exit status 2.

    What goes wrong in nobody's expectation, most of it in the code of a user's own model, is one line too;
    LEAKJAX_TRACEBACK=1 in the environment shows where it happened. Nothing is left of folders that stayed empty.
    """
    console = Console(stderr=True, markup=False, emoji=False)
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("ignore", category=category)
    for noisy in ("absl", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    _MADE.clear()
    try:
        with answers_alone():
            enable_compilation_cache()
            yield console
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("LEAKJAX_TRACEBACK") == "1":
            traceback.print_exc()
        for folder in reversed(_MADE):
            with contextlib.suppress(OSError):
                folder.rmdir()
        say(_one_line(error))
        raise typer.Exit(2) from None


def _one_line(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"--out: cannot write {_shown(error.filename)} ({error.strerror}); name another folder"
    first = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory ({first}); use a smaller model or fewer images"
    return f"unexpected {type(error).__name__}: {first}; LEAKJAX_TRACEBACK=1 in the environment shows where"


def _shown(name: Any) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def say(message: str) -> None:
    """One line of error on standard error."""
    line = " ".join(f"leakjax: error: {message}".split())
    with contextlib.suppress(OSError, ValueError):
        print("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line), file=sys.stderr, flush=True)


def writable(directory: Path) -> Path:
    """The folder, made where it is missing; one that cannot be written raises `InputError`."""
    try:
        missing = [place for place in (directory, *directory.parents) if not os.path.lexists(place)]
        _MADE.extend(reversed(missing))
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out: cannot write to {directory} ({reason}); name another folder") from None
    return directory
