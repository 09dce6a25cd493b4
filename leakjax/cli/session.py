"""What every command stands in: one-line errors, the compilation cache, progress, a folder that can be written."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from leakjax.errors import InputError

_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # Click's, or the one that newer versions of Typer carry


class OneLineErrors(TyperGroup):
    """The commands, with a mistyped option answered by one line, as every other bad input is."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run a command line."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except _USAGE_ERROR as error:
            if not standalone_mode:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
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
    """Set up the process, and turn `InputError` into one line and exit status 2."""
    console = Console(stderr=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        enable_compilation_cache()
        yield console
    except InputError as error:
        say(str(error))
        raise typer.Exit(2) from None
    except OSError as error:
        say(f"--out: cannot write {error.filename} ({error.strerror}); name another folder")
        raise typer.Exit(2) from None
    except MemoryError as error:
        say(f"out of memory ({error}); use a smaller model or fewer images")
        raise typer.Exit(2) from None
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say(f"out of memory ({str(error).splitlines()[0]}); use a smaller model or fewer images")
        raise typer.Exit(2) from None


def say(message: str) -> None:
    """One line of error on standard error."""
    print(f"leakjax: error: {' '.join(message.split())}", file=sys.stderr)


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user's own settings say otherwise."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "leakjax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """What a long computation tells its stages to."""
    with console.status("starting") as status:
        yield lambda stage: status.update(stage)


def writable(directory: Path) -> Path:
    """The folder, made where it is missing; one that cannot be written raises `InputError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".leakjax-write-test"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out: cannot write to {directory} ({reason}); name another folder") from None
    return directory
