"""Standard output is for what a command answers; what a user's model or factory prints goes to standard error."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from leakjax.errors import InputError

_ANSWERS: list[TextIO | None] = []


@contextlib.contextmanager
def answers_alone() -> Iterator[None]:
    """Send whatever is printed inside the block to standard error, but for `answer`.

    In a process of its own that holds for C libraries too, and until the process ends: what they print late is theirs.
    """
    own: Any = sys.stdout
    whole_process = own is sys.__stdout__ and _descriptor(own) == 1 and _descriptor(sys.stderr) == 2
    if whole_process:
        own.flush()
        _ANSWERS.append(os.fdopen(os.dup(1), "w", encoding=own.encoding, errors=own.errors))
        os.dup2(2, 1)
    else:
        _ANSWERS.append(own)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        _ANSWERS.pop()
        if not whole_process:
            sys.stdout = own


def answer(text: str) -> None:
    """Print `text`, what the command was asked for, on standard output."""
    file = _ANSWERS[-1] if _ANSWERS else sys.stdout
    if file is None:  # closed by whoever started the process
        return
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:  # the reader has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        raise InputError(f"standard output: cannot be written ({error.strerror}); the files are in --out") from None


def _descriptor(file: TextIO | None) -> int | None:
    try:
        return None if file is None else file.fileno()
    except (OSError, ValueError):
        return None
