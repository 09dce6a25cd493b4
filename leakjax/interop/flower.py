"""Flower: a mod that asks the guard before a client trains. It needs the extra `flower`."""

from collections.abc import Callable
from typing import Any

from leakjax.errors import InputError
from leakjax.guard.gate import refusal

try:
    from flwr.app import ArrayRecord, Context, Error, Message, MessageType  # pyright: ignore[reportMissingImports]
    from flwr.common.constant import ErrorCode  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(f'leakjax.interop.flower needs Flower: pip install "leakjax[flower]" ({error})') from error

__all__ = ["guard_mod"]

ClientAppCallable = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCallable], Message]


def guard_mod(score: Callable[[ArrayRecord, Context], Any], *, everything: bool = False) -> Mod:
    """A mod for `ClientApp(mods=[...])` that trains only where the guard allows what training would send.

    `score(arrays, context)` takes the weights that came and the client's context, and returns the guard's score of the
    batch that the client is about to train on: `watch.score(params, x, y)` of a `leakjax.guard.guard`. It is called
    before training, at the weights that came. Training runs only where the score is finite and `allowed` is True.
    Otherwise, where `score` raises or returns anything else, and where the message does not hold exactly one
    `ArrayRecord`, the reply is an error with code `MOD_FAILED_PRECONDITION`. Its reason names the leaked fraction and
    never the data; nothing else is sent, and the client app is not called.

    Messages of the types "evaluate" and "query", and their actions such as "query.labels", pass unscored: what the app
    answers there is its author's to judge. With `everything` they are scored, too. All
    other types, Flower's older "get_parameters" among them, are scored in any case.

    The mod knows what the guard knows, the update that its `loss_fn` or `update_fn` describes. It comes last in
    `mods`, next to the app: a mod behind it could change the weights that were scored.

    Raises `InputError` where `score` is not callable.
    """
    if not callable(score):
        raise InputError(f"score must be a function (arrays, context) -> Score, got {type(score).__name__}")

    def mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        reason = _reason(score, msg, ctxt) if everything or _trains(msg) else None
        if reason is None:
            return call_next(msg, ctxt)
        return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, f"blocked by guard_mod: {reason}"), reply_to=msg)

    return mod


def _trains(msg: Message) -> bool:
    """Whether a message may lead to training: every type but evaluation and queries, "train.action" included."""
    return msg.metadata.message_type.partition(".")[0] not in (MessageType.EVALUATE, MessageType.QUERY)


def _reason(score: Callable[[ArrayRecord, Context], Any], msg: Message, ctxt: Context) -> str | None:
    records = list(msg.content.array_records.values()) if msg.has_content() else []
    if len(records) != 1:
        return f"the message holds {len(records)} array records, and the guard scores the weights of one"
    return refusal(lambda: score(records[0], ctxt))
