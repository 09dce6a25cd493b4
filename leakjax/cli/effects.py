"""Options that would have no effect in a call are refused: whoever types one believes that it does something."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

from leakjax.errors import InputError

Values = Mapping[str, Any]


class Idle(NamedTuple):
    """Options, by their parameters' names, that have no effect `where` this holds of all values, and `why` not."""

    options: tuple[str, ...]
    where: Callable[[Values], bool]
    why: str


TAKES: Mapping[str, tuple[str, ...]] = {
    "copa": ("solver", "prior", "pull_back", "optimizer", "gradient_noise"),
    "dlg": ("steps", "starts"),
    "hybrid": ("solver", "prior", "optimizer", "steps"),
    "idlg": ("steps", "starts"),
    "inverting_gradients": ("steps", "starts"),
    "match": ("solver", "prior", "pull_back", "optimizer", "starts", "gradient_noise"),
    "rconv": ("solver",),
    "rgap": ("solver",),
}
"""Of the options that tell an attack how to go about it, those that each attack looks at."""


def _captured(values: Values) -> bool:
    return values["capture"] is not None or values["torch_capture"] is not None


def _without(attacks: Mapping[str, tuple[str, ...]], option: str) -> Callable[[Values], bool]:
    return lambda values: option not in attacks.get(values["attack"] or "copa", (option,))


def _undriven(values: Values) -> bool:
    """Whether nothing descends by the optimizer."""
    pulling = (values["attack"] or "copa") in ("copa", "match")
    return pulling and values["prior"] == "none" and values["pull_back"] != "optax"


_SOLVED = ("out", "labels", "prior", "pull_back", "optimizer", "starts", "steps", "gradient_noise", "gradient_scale")
_WEIGHTS = Idle(("init",), lambda v: v["weights"] is not None, "beside --weights, which replace the initialization")
_IMAGES = Idle(("dataset",), lambda v: v["images"] is not None, "beside --images")
_RATE = Idle(("learning_rate",), lambda v: v["local_steps"] == 1, "without --local-steps of 2 or more")
_TORCH = Idle(
    ("model", "layout", "rngs", "activation"),
    lambda v: v["torch"] is not None,
    "beside --torch, whose module says that itself",
)
_DP = "without --clip and --noise-multiplier"

IDLE: Mapping[str, tuple[Idle, ...]] = {
    "invert": (
        Idle(_SOLVED, lambda v: v["plan"], "with --plan, which solves nothing and writes nothing"),
        Idle(("dataset", "index", "batch_size", "target"), _captured, "beside a capture, which is the data"),
        Idle(("init",), _captured, "beside a capture, which brings the weights"),
        *(
            Idle((option,), _without(TAKES, option), "with this attack")
            for option in ("solver", "prior", "pull_back", "optimizer", "starts", "steps", "gradient_noise")
        ),
        Idle(("gradient_noise",), lambda v: v["defense"] is not None, "beside --defense, which says its own noise"),
        Idle(("gradient_scale",), lambda v: not _captured(v), "without a capture: here nothing multiplies it"),
        Idle(("optimizer",), _undriven, "with --prior none, unless --pull-back optax descends by it"),
        _IMAGES,
        _WEIGHTS,
        _TORCH,
        Idle(_RATE.options, lambda v: not _captured(v) and _RATE.where(v), _RATE.why),
    ),
    "capture": (_IMAGES, _WEIGHTS, _TORCH, _RATE),
    "audit": (
        Idle(("sampling_rate", "steps", "delta"), lambda v: v["clip"] is None and v["noise_multiplier"] is None, _DP),
        Idle(("init", "input_range"), lambda v: v["shapes_only"], "with --shapes-only, which looks at no number"),
        _WEIGHTS,
        _TORCH,
    ),
    "train": (_WEIGHTS, _TORCH),
    "prepare": (Idle(("download",), lambda v: v["source"] is not None, "beside --from"),),
}
"""By command, what has no effect when."""


class Checked(TyperCommand):
    """A command that refuses options without effect before it starts."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        refuse_idle(ctx)
        return super().invoke(ctx)


def refuse_idle(context: typer.Context) -> None:
    """Raise `InputError` for the first option on the command line that has no effect beside the others."""
    for idle in IDLE.get(context.info_name or "", ()):
        for name in idle.options:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE" and idle.where(context.params):
                raise InputError(f"--{name.replace('_', '-')} has no effect {idle.why}; leave it out")
