"""Errors that the caller can mend: one clear line that names the argument and the remedy."""

import difflib
from collections.abc import Iterable
from typing import Any


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


def unknown_name(kind: str, name: Any, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a registry, with the nearest names that are."""
    known = sorted(known)
    if not isinstance(name, str):
        return InputError(f"{kind} must be a name, got a {type(name).__name__}; known: {', '.join(known)}")
    name = name if len(name) <= 80 else f"{name[:60]}..."
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return InputError(f"unknown {kind} {name!r}; {hint}")


def cannot_run(shape: Iterable[int], error: BaseException) -> InputError:
    """The error for a model whose own code raised `error` on an input of `shape`, with what mends it where known."""
    reason = first_line(error)
    if type(error).__name__ in _TRACED:
        reason = f"{type(error).__name__}: {reason.rstrip('.')}"
        return InputError(f"model cannot run on an input of shape {tuple(shape)}: {reason}; {_TRACED_REMEDY}")
    return InputError(f"model cannot run on an input of shape {tuple(shape)}: {reason}")


def first_line(error: BaseException) -> str:
    """The first line of the text of `error`, or where it has none its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_TRACED = (
    "TracerBoolConversionError",
    "ConcretizationTypeError",
    "TracerArrayConversionError",
    "TracerIntegerConversionError",
    "NonConcreteBooleanIndexError",
)
_TRACED_REMEDY = "a model is read from its trace, where data have no values: use jnp.where or jax.lax.cond, not if"
