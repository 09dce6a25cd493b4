"""The options that several commands share, and their values as typed."""

from pathlib import Path
from typing import Annotated

import typer

from leakjax.arguments import LARGEST
from leakjax.errors import InputError

Name = Annotated[str, typer.Option("--model", "-m", metavar="NAME|package.module:factory", help="Model to use.")]
ActivationName = Annotated[str | None, typer.Option("--activation", metavar="NAME[:PARAMETER]")]
Dataset = Annotated[str, typer.Option("--dataset", metavar="NAME", help="Data set; see `leakjax list datasets`.")]
Index = Annotated[str, typer.Option("--index", metavar="I[,J..]", help="Which images: a victim each.")]
ImagesFile = Annotated[Path | None, typer.Option("--images", metavar="FILE.npz", help="Your own images and labels.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="B", help="Consecutive images in one gradient.")]
LossName = Annotated[str | None, typer.Option("--loss", metavar="NAME", help="Loss, by Optax's name.")]
Weights = Annotated[Path | None, typer.Option("--weights", metavar="FILE.npz", help="Weights of `leakjax train`.")]
Shape = Annotated[str | None, typer.Option("--input-shape", metavar="H,W,C", help="Input shape of your own model.")]
Range = Annotated[str | None, typer.Option("--input-range", metavar="LOW,HIGH", help="Values that a pixel can have.")]
Mean = Annotated[
    str | None, typer.Option("--input-mean", metavar="M[,M..]", help="Mean of a channel: (pixel - M) / S is seen.")
]
Std = Annotated[
    str | None,
    typer.Option("--input-std", metavar="S[,S..]", help="Standard deviation of a channel."),
]
Init = Annotated[str | None, typer.Option("--init", metavar="NAME", help="Initialization: torch or uniform.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the initialization, and of a defense's noise.")]
DefenseSpec = Annotated[
    str | None,
    typer.Option("--defense", metavar="NAME[:VALUE,..]", help="What clients do first; see `leakjax list defenses`."),
]
LocalSteps = Annotated[int, typer.Option("--local-steps", metavar="K", help="Gradient steps that an update sums.")]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", metavar="R", help="Rate of the local steps.", show_default=False)
]
WeightDecay = Annotated[
    float | None,
    typer.Option("--weight-decay", metavar="LAMBDA", help="Sent beside the gradient: LAMBDA times the weights."),
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="float64|float32")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go.")]
Json = Annotated[bool, typer.Option("--json", help="Print the machine-readable summary, and nothing else, on stdout.")]


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


def integers(option: str, text: str) -> list[int]:
    """The integers of an option as typed, "0,3"; anything else raises `InputError`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected integers separated by commas, got {text!r}") from None
