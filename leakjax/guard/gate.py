"""The guard's answer as a gate: whatever is not plainly allowed is not sent."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from leakjax.guard.scoring import Score, explain

_NUMBERS = ("leaked_dimensions", "leaked_fraction", "predicted_psnr", "worst_leaked_fraction", "worst_psnr")
_FRACTIONS = ("leaked_fraction", "worst_leaked_fraction")

_LOG = logging.getLogger(__name__)


def refusal(score: Callable[[], Any]) -> str | None:
    """Why an update may not be sent, or None where it may: where `score()` returns a `Score` that is allowed.

    It fails closed. Whatever else `score` returns, an exception, a number that is not finite, a fraction below 0 or
    above 1, an `allowed` that is no boolean True and a `reason` that is no integer are refusals. The reason names
    the leaked fraction. It never holds an exception's text, which may quote values of the data: this process's log
    has it, at the level DEBUG.
    """
    try:
        return _refusal(score())
    except Exception as error:
        _LOG.debug("the guard's score failed", exc_info=True)
        return f"the score raised {type(error).__name__}"


def _refusal(found: Any) -> str | None:
    if not isinstance(found, Score):
        return f"the score is no Score of leakjax.guard but a {type(found).__name__}"
    numbers = {name: float(np.asarray(getattr(found, name)).reshape(())) for name in _NUMBERS}
    broken = [name for name, value in numbers.items() if not math.isfinite(value)]
    if broken:
        return f"the score is not finite: {', '.join(broken)}"
    outside = [name for name in _FRACTIONS if not 0 <= numbers[name] <= 1]
    if outside:
        return f"the score is no share of what there is: {', '.join(outside)}"
    allowed, reason = np.asarray(found.allowed), np.asarray(found.reason)
    if allowed.dtype == bool and allowed.shape == () and allowed and reason.dtype.kind in "iu" and int(reason) == 0:
        return None
    fractions = numbers["leaked_fraction"], numbers["worst_leaked_fraction"]
    return "{}: leaked fraction {:.3g}, worst image {:.3g}".format(_words(found), *fractions)


def _words(found: Score) -> str:
    return explain(found) if int(found.reason) else "the score does not say that it is allowed"
