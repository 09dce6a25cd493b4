"""Errors that the caller can mend: one clear line that names the argument and the remedy."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message names the argument and what to do. The command line exits with status 2 on it."""


class UnreadableModelError(InputError):
    """A model that an attack cannot invert piece by piece; names the primitive and the line."""


class NoSplitError(InputError):
    """A split that a data set does not have."""

    def __init__(self, name: str, split: str, splits: Iterable[str]):
        super().__init__(
            f"data set {name!r} has no split {split!r}; it has {', '.join(splits) or 'none but the whole'}"
        )


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a registry, with the nearest names that are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return InputError(f"unknown {kind} {name!r}; {hint}")
