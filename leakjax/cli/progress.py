"""What a long computation is doing, for whoever waits: a line that changes, or a plain line every ten seconds."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

EVERY = 10.0
"""Seconds between two plain lines where there is no terminal."""


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """What a computation tells its stages to; shown with the seconds since it began."""
    began, stage, over = time.monotonic(), ["starting"], threading.Event()

    def words() -> str:
        return f"{time.monotonic() - began:.0f} s: {stage[0]}"

    def tell(said: str) -> None:
        stage[0] = said

    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            status = stack.enter_context(console.status(words()))
            pause, show = 0.5, lambda: status.update(Text(words()))
        else:
            pause, show = EVERY, lambda: console.print(Text(words()))

        def watch() -> None:
            while not over.wait(pause):
                with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
                    show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield tell
        finally:
            over.set()
            watcher.join()
