"""The options that several commands share, each declared once, and their values as typed."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from leakjax.arguments import LARGEST
from leakjax.errors import InputError

MODEL, DATA, CLIENT, ATTACK, OUTPUT = "Model", "Data", "Client", "Attack", "Output"
"""Panels of a command's help, in this order."""


def _option(panel: str, name: str, metavar: str | None = None, help: str | None = None, **more: Any) -> Any:
    return typer.Option(*name.split(), metavar=metavar, help=help, rich_help_panel=panel, **more)


_model = functools.partial(_option, MODEL)
_data = functools.partial(_option, DATA)
_client = functools.partial(_option, CLIENT)
option = functools.partial(_option, ATTACK)
"""An option of one command alone, of how it goes about its work."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, with which weights, and what its inputs can be."""

    model: Annotated[str, _model("--model -m", "NAME|package.module:factory", "Model to use.")] = "cnn6"
    torch: Annotated[
        str | None, _model("--torch", "package.module:factory", "PyTorch module of your own, in place of --model.")
    ] = None
    activation: Annotated[
        str | None, _model("--activation", "NAME[:PARAMETER]", "Activation, in place of the model's own.")
    ] = None
    loss: Annotated[
        str | None,
        _model(
            "--loss",
            "NAME[:K=V,..]|package.module:function",
            "Loss, by Optax's name, or your own of (outputs, target); `unknown` to the server.",
        ),
    ] = None
    input_shape: Annotated[str | None, _model("--input-shape", "H,W,C", "Input shape of your own model.")] = None
    input_range: Annotated[str | None, _model("--input-range", "LOW,HIGH", "Values that a pixel can have.")] = None
    call: Annotated[
        str | None, _model("--call", "NAME=VALUE[,..]", "What your model is called with beside images: train=False.")
    ] = None
    rngs: Annotated[
        str | None, _model("--rngs", "[NAME=]SEED[,..]", "Seeds of your model's random streams: dropout=0.")
    ] = None
    output: Annotated[
        str | None, _model("--output", "INDEX|NAME[.NAME..]", "Which output of your model counts, if it has several.")
    ] = None
    layout: Annotated[Literal["NHWC", "NCHW"], _model("--layout", None, "Order of axes that your model takes.")] = (
        "NHWC"
    )
    train: Annotated[
        bool | None,
        _model("--train/--eval", None, "Whether your model runs in training mode.", show_default="as it is"),
    ] = None
    init: Annotated[str | None, _model("--init", "NAME", "Initialization: torch or uniform.")] = None
    weights: Annotated[Path | None, _model("--weights", "FILE.npz", "Weights of `leakjax train`.")] = None
    seed: Annotated[int, _model("--seed", None, "Seed of the initialization, a defense's noise and random starts.")] = 0

    @property
    def name(self) -> str:
        """What reports call the model: as it was typed."""
        return self.torch or self.model


@dataclasses.dataclass(frozen=True)
class NormalizedModelOptions(ModelOptions):
    """The same, for inputs that are normalized channel by channel."""

    input_mean: Annotated[
        str | None, _model("--input-mean", "M[,M..]", "Mean of a channel: (pixel - M) / S is seen.")
    ] = None
    input_std: Annotated[str | None, _model("--input-std", "S[,S..]", "Standard deviation of a channel.")] = None


Dataset = Annotated[str, _data("--dataset", "NAME", "Data set; see `leakjax list datasets`.")]
ImagesFile = Annotated[Path | None, _data("--images", "FILE.npz", "Your own images and labels.")]


Target = Annotated[
    Literal["class", "input", "map"],
    _data("--target", None, "What the loss compares with: labels, the images themselves, or maps of their luminance."),
]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images, and how many of them are behind one gradient."""

    dataset: Dataset = "samples"
    index: Annotated[str, _data("--index", "I[,J..]", "Which images: a client each.")] = "0"
    images: ImagesFile = None
    batch_size: Annotated[int, _data("--batch-size", "B", "Consecutive images in one gradient.")] = 1
    target: Target = "class"


DefenseSpec = Annotated[
    str | None, _client("--defense", "NAME[:VALUE,..]", "What clients do first; see `leakjax list defenses`.")
]


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """What a client computes and sends."""

    defense: DefenseSpec = None
    local_steps: Annotated[int, _client("--local-steps", "K", "Gradient steps that an update sums.")] = 1
    learning_rate: Annotated[
        float | None, _client("--learning-rate", "R", "Rate of the local steps.", show_default=False)
    ] = None
    weight_decay: Annotated[
        float | None, _client("--weight-decay", "LAMBDA", "Sent beside the gradient: LAMBDA times the weights.")
    ] = None
    no_buffers: Annotated[
        bool, _client("--no-buffers", None, "Keep the new running statistics, sent with --train, to the client.")
    ] = False


Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="float64|float32", help="Of clients and solves.", rich_help_panel=ATTACK),
]


Json = Annotated[
    bool, _option(OUTPUT, "--json", None, "Print the machine-readable summary, and nothing else, on stdout.")
]


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Where a command writes, and what it prints."""

    out: Annotated[Path, _option(OUTPUT, "--out", "DIR", "Where the files go.")] = Path("leakjax-out")
    json_output: Json = False


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass of options replaced by its fields.

    Typer then sees one option for a field; the command is called with the dataclasses.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})  # type: ignore[operator]
        command(**values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        of_group = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=of_group[f.name])
            for f in dataclasses.fields(groups[name])
        ]
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def numbers(option: str, text: str) -> list[float]:
    """The numbers of an option as typed, "1e-3,0.1"; anything else raises `InputError`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected numbers separated by commas, got {text!r}") from None
    strange = next((number for number in found if not abs(number) <= LARGEST), None)
    if strange is not None:
        raise InputError(f"{option}: expected finite numbers of a size up to {LARGEST:g}, got {strange}")
    return found


def integers(option: str, text: str, others: str = "") -> list[int]:
    """The integers of an option as typed, "0,3"; anything else raises `InputError`, which names the `others` that the
    option takes."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected integers separated by commas{others}, got {text!r}") from None
