"""Names of layers in tables: without what all of them begin with, and cut from the left."""

import itertools
from collections.abc import Sequence

from leakjax.models.paths import separator

WIDTH = 36


def shortened(names: Sequence[str], width: int = WIDTH) -> list[str]:
    """The names without the modules that enclose all of them, none longer than `width`, as "..last/part"."""
    mark = separator("".join(names))
    modules = [part.split(mark) for name in names for part in name.split("+")]
    shared = itertools.takewhile(
        lambda level: len(set(level)) == 1, zip(*(each[:-1] for each in modules), strict=False)
    )
    outer = list(shared) if len(names) > 1 else []
    short = ("+".join(mark.join(part.split(mark)[len(outer) :]) for part in name.split("+")) for name in names)
    return [name if len(name) <= width else ".." + name[2 - width :] for name in short]
