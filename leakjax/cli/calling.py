"""How a model of one's own is called, as typed: `--call`, `--rngs`, `--output`, `--layout` and `--train`."""

from collections.abc import Sequence
from typing import Any

import jax

from leakjax.cli.options import ModelOptions
from leakjax.errors import InputError

_WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None}


def calling(options: ModelOptions) -> dict[str, Any]:
    """What `read_model` hears of how a model is called."""
    rngs = None if options.rngs is None else _named("--rngs", options.rngs, "params")
    return {
        "call": None if options.call is None else {k: _value(v) for k, v in _named("--call", options.call, None)},
        "rngs": rngs and {name: _whole("--rngs", seed) for name, seed in rngs},
        "output": None if options.output is None else [_value(part, (int,)) for part in options.output.split(".")],
        "layout": options.layout,
        "train": options.train,
    }


def _named(option: str, text: str, alone: str | None) -> list[tuple[str, str]]:
    """(name, value) of every part of "train=False,k=2"; a part without a name has the name `alone`."""
    found = []
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name, value = (name.strip(), value.strip()) if equals else (alone or "", name.strip())
        if not name.isidentifier() or not value:
            raise InputError(f"{option}: expected {'[NAME=]SEED' if alone else 'NAME=VALUE'}, got {part!r}")
        if name in dict(found):
            raise InputError(f"{option}: {f'{name} is' if equals else 'a seed for all streams is'} given twice")
        found.append((name, value))
    return found


def _value(text: str, kinds: Sequence[type] = (int, float)) -> Any:
    """A value as typed: true, false, none, a number, "key:SEED" for a random key, or the text itself."""
    if text.startswith("key:") and float in kinds:
        return jax.random.key(_whole("--call", text.removeprefix("key:")))
    words = _WORDS if float in kinds else {}
    if text.lower() in words:
        return words[text.lower()]
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _whole(option: str, text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise InputError(f"{option}: expected whole seeds from 0 below 2**32, got {text!r}")
    return seed
