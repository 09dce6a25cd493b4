"""NVFlare: a filter that asks the guard before a task's result leaves the client. It needs the extra `nvflare`."""

from collections.abc import Callable
from typing import Any

from leakjax.errors import InputError
from leakjax.guard.gate import refusal
from leakjax.models.zoo import load_function

try:
    from nvflare.apis.dxo import DXO, from_shareable  # pyright: ignore[reportMissingImports]
    from nvflare.apis.filter import ContentBlockedException, Filter  # pyright: ignore[reportMissingImports]
    from nvflare.apis.fl_constant import ReturnCode  # pyright: ignore[reportMissingImports]
    from nvflare.apis.fl_context import FLContext  # pyright: ignore[reportMissingImports]
    from nvflare.apis.shareable import Shareable, make_reply  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(f'leakjax.interop.nvflare needs NVFlare: pip install "leakjax[nvflare]" ({error})') from error

__all__ = ["GuardFilter"]


class GuardFilter(Filter):
    """A task result filter that lets a result out only where the guard allows it.

    `score(dxo, fl_ctx)` takes the DXO that passes the filter and NVFlare's context, and returns the guard's score of
    the batch behind it: `watch.score(params, x, y)` of a `leakjax.guard.guard`, at the weights that the client trained
    from. A result's DXO holds the weights after training, or their change, so the executor keeps those before it. As a
    task data filter the same class scores before training: there the DXO holds the weights that came.

    `score` is a function or, for jobs that are written to files, "package.module:function". Where the score is finite
    and `allowed` is True the shareable passes unchanged. Otherwise, where `score` raises or returns anything else, and
    where the shareable holds no DXO, the filter raises `ContentBlockedException`. NVFlare's client then sends an empty
    reply with the code `TASK_RESULT_FILTER_ERROR` (`TASK_DATA_FILTER_ERROR`, without training). The exception's text
    names the leaked fraction, never the data, and stays in the client's log.

    A shareable whose return code is not OK passes as that code alone, without content. Every task that the filter is
    set for is scored: name those that train.

    Raises `InputError` where `score` is neither a function nor names one.
    """

    def __init__(self, score: Callable[[DXO, FLContext], Any] | str):
        super().__init__()
        self.score = score  # under the argument's name, by which NVFlare writes it into a job
        self._function = load_function(score, "score")[0] if isinstance(score, str) else score
        if not callable(self._function):
            raise InputError(f"score must be a function (dxo, fl_ctx) -> Score, or name one, got {score!r}")

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The shareable itself where it may pass, else `ContentBlockedException`."""
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            return make_reply(code)
        reason = self._reason(shareable, fl_ctx)
        if reason is not None:
            raise ContentBlockedException(f"blocked by GuardFilter: {reason}")
        return shareable

    def _reason(self, shareable: Shareable, fl_ctx: FLContext) -> str | None:
        try:
            dxo = from_shareable(shareable)
        except Exception as error:
            return f"the shareable holds no DXO ({type(error).__name__})"
        return refusal(lambda: self._function(dxo, fl_ctx))
