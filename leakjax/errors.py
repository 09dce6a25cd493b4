"""Errors that the caller can mend: one clear line that names the argument and the remedy."""

import difflib
import re
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
    reason, kind = first_line(error), type(error).__name__
    reason = reason.rstrip(".")
    reason = f"{kind}: {reason}" if kind in _TRACED else reason
    remedy = _TRACED_REMEDY if kind in _TRACED else _remedy_of(str(error), kind)
    return InputError(f"model cannot run on an input of shape {tuple(shape)}: {reason}{remedy and '; ' + remedy}")


def _remedy_of(text: str, kind: str) -> str:
    """What a caller gives to make a model run that is called as it was published; empty where that is not known."""
    missing = _MISSING.search(text) or _UNSET.search(text)
    if missing:
        name = missing[1]
        if name in ("key", "rng", "rngs"):
            return "pass a seed, rngs=0 (--rngs 0)"
        if name.endswith(("_key", "_rng")):
            return f"pass its key by call, as call={{{name!r}: jax.random.key(0)}} (--call {name}=key:0)"
        value = _FLAGS.get(name, "...")
        return f"pass it by call, as call={{{name!r}: {value}}} (--call {name}={value})"
    if "unbound axis name" in text:
        return "it averages over devices when it trains: call it in evaluation mode, as call={'train': False}"
    if "takes 1 positional argument but 2" in text:
        return "it takes its input by name: pass a function (params, x) -> outputs that calls it, with its params"
    stream = _STREAM.search(text)
    if stream or kind in _KEYLESS or any(words in text for words in _NO_KEY):
        name = stream[1] if stream else "dropout"
        return f"pass the seed that the client used, rngs={{{name!r}: 0}} (--rngs {name}=0), or call it deterministic"
    if "carry" in text and "equal types" in text:
        return 'a loop that begins in float32 stays there: dtype="float32" (--dtype float32) runs it as written'
    if any(words in text for words in _CHANNELS):
        return 'images are (N, H, W, C); a model of (N, C, H, W) goes with layout="NCHW" (--layout NCHW)'
    return ""


_MISSING = re.compile(r"missing \d+ required (?:positional|keyword-only) arguments?: '(\w+)'")
_UNSET = re.compile(r'Parameter "(\w+)" must be passed')
_FLAGS = {
    "train": "False",
    "training": "False",
    "is_training": "False",
    "deterministic": "True",
    "use_running_average": "True",
    "inference": "True",
}
"""Arguments that say whether a model trains, and their values in evaluation mode."""

_STREAM = re.compile(r'needs PRNG for "(\w+)"')
_KEYLESS = ("InvalidRngError",)
_NO_KEY = ("requires a key when running in", "must be called with an RNG", "non-None PRNGKey")
_CHANNELS = ("feature dimension size", "num_spatial_dims", "needs to have rank")


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
