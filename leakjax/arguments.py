"""What arguments may be: each check names the argument as the caller wrote it, and what is wanted."""

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from leakjax.errors import InputError, unknown_name

LARGEST = 1e30
"""No number is larger in size: squares of those above leave float64 soon."""

MOST = 10**9
"""No count is larger."""

MOST_STARTS = 10_000
"""No attack begins from more noises at once."""


def ids_of_tokens(images: Any) -> str:
    """What to do with images that look like ids of tokens, whole numbers of shape (B, T); "" for any others."""
    given = np.asarray(images)
    return (
        "; if they are ids of tokens, recover_tokens reads them" if given.dtype.kind in "iu" and given.ndim == 2 else ""
    )


def choice(kind: str, value: Any, known: Iterable[str]) -> str:
    """`value`, one of the names `known`; anything else, of any type, raises `InputError`."""
    if not isinstance(value, str) or value not in known:
        raise unknown_name(kind, value, known)
    return value


def whole(name: str, value: Any, least: int, most: int = MOST, wanted: str | None = None) -> int:
    """`value` as an int in least..most; numbers with a point, booleans and text raise `InputError`."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except Exception:  # an array or an object of the caller's own may raise anything
        number = None
    if number is None or not least <= number <= most:
        wanted = wanted or ("a positive integer" if least == 1 else f"an integer from {least}")
        too_large = number is not None and number > most
        raise InputError(f"{name} must be {wanted}{f', at most {most:,}' if too_large else ''}, got {shown(value)}")
    return number


def real(name: str, value: Any, wanted: str = "a number") -> float:
    """`value` as a finite float that can be squared; booleans, text and complex numbers raise `InputError`."""
    if isinstance(value, Real | np.floating | np.integer) and not isinstance(value, bool | np.bool_):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = math.inf
        if abs(number) <= LARGEST:
            return number
    raise InputError(f"{name} must be {wanted}, got {shown(value)}")


def interval(name: str, value: Any) -> tuple[float, float]:
    """`value` as (low, high), two numbers with low < high."""
    try:
        low, high = value
    except Exception:
        raise InputError(f"{name} must be two numbers (low, high), got {shown(value)}") from None
    low, high = (real(name, end, "two numbers (low, high)") for end in (low, high))
    if not low < high:
        raise InputError(f"{name} must be (low, high) with low < high, got {shown(value)}")
    return low, high


def several(name: str, value: Any, wanted: str) -> tuple[Any, ...]:
    """The parts of a sequence, which text and mappings are not."""
    try:
        if not isinstance(value, str | bytes | Mapping):
            return tuple(value)
    except Exception:  # whatever a caller's own object raises
        pass
    raise InputError(f"{name} must be {wanted}, got {shown(value)}")


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """`value` as positive sizes of one example, as (32, 32, 3)."""
    parts = several(name, value, "whole sizes like (32, 32, 3)")
    if not parts:
        raise InputError(f"{name} must hold positive sizes, got {shown(value)}")
    return tuple(whole(f"{name}: every size", part, 1) for part in parts)


def array(name: str, value: Any, kinds: str, wanted: str) -> np.ndarray:
    """`value` as a NumPy array of a dtype among `kinds`, NumPy's letters; else, as for a ragged list, `InputError`."""
    try:
        found = np.asarray(value)
    except Exception:
        raise InputError(f"{name} must be {wanted}, got {shown(value)}") from None
    if found.dtype.kind not in kinds:
        raise InputError(f"{name} must be {wanted}, got dtype {found.dtype}")
    return found


def instance(name: str, value: Any, kind: type, remedy: str) -> None:
    """Refuse a `value` that is no `kind`; `remedy` says where one comes from."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {_article(kind.__name__)}, {remedy}; got {_article(type(value).__name__)}")


def listener(name: str, value: Any) -> None:
    """Refuse what can neither be called nor is None."""
    if value is not None and not callable(value):
        raise InputError(f"{name} must be a function of one text, or None, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in an error message: on one line, and short."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = _article(type(value).__name__)
    return text if len(text) <= 80 else f"{text[:60]}... ({_article(type(value).__name__)})"


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def check_solving(
    names: Mapping[str, tuple[Any, Iterable[str]]],
    counts: Mapping[str, Any],
    seed: Any,
    labels: Any,
    devices: Any,
    progress: Any,
) -> None:
    """Refuse what `invert` cannot go about: names that are not known, counts that are none, labels that are no array.

    Arguments: `names`, by argument the value and the names that it may have (an optimizer may also be no name);
    `counts`, by argument a positive integer or None.
    """
    for name, (value, known) in names.items():
        if name != "optimizer" or isinstance(value, str):
            choice(name, value, known)
    for name, value in counts.items():
        if value is not None or name == "starts":
            whole(name, value, 1, MOST_STARTS if name == "starts" else MOST)
    whole("seed", seed, 0, 2**63 - 1)
    if labels is not None:
        array("labels", labels, "biuf", "integers, one an example, or the targets that the loss compares with")
    if devices is not None and (isinstance(devices, str) or not isinstance(devices, Iterable)):
        raise InputError(f"devices must be some of jax.local_devices(), got {shown(devices)}")
    listener("progress", progress)
