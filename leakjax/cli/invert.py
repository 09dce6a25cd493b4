"""`leakjax invert`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leakjax.cli.options import (
    ActivationName,
    BatchSize,
    Dataset,
    DefenseSpec,
    Dtype,
    ImagesFile,
    Index,
    Init,
    Json,
    LearningRate,
    LocalSteps,
    LossName,
    Mean,
    Name,
    Out,
    Range,
    Seed,
    Shape,
    Std,
    WeightDecay,
    Weights,
    integers,
)
from leakjax.cli.session import progress, session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError, unknown_name

if TYPE_CHECKING:
    from leakjax.client.observation import Observation


def invert(
    model: Name = "cnn6",
    attack: Annotated[str | None, typer.Option("--attack", metavar="NAME", help="See `leakjax list attacks`.")] = None,
    activation: ActivationName = None,
    dataset: Dataset = "samples",
    index: Index = "0",
    images: ImagesFile = None,
    capture: Annotated[Path | None, typer.Option("--capture", metavar="FILE.npz", help="A written gradient.")] = None,
    torch_capture: Annotated[
        Path | None, typer.Option("--torch-capture", metavar="FILE.npz", help="A gradient from PyTorch.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", metavar="FILE.npz", help="Images beside a capture, for the report only.")
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", metavar="L[,M..]", help="Labels, where known.")] = None,
    batch_size: BatchSize = 1,
    defense: DefenseSpec = None,
    gradient_noise: Annotated[
        float | None,
        typer.Option("--gradient-noise", metavar="SIGMA", help="Standard deviation of noise known in every entry."),
    ] = None,
    gradient_scale: Annotated[
        float | None,
        typer.Option("--gradient-scale", metavar="C", help="Known factor of a capture's gradient; 1 for none."),
    ] = None,
    local_steps: LocalSteps = 1,
    learning_rate: LearningRate = None,
    weight_decay: WeightDecay = None,
    loss: LossName = None,
    input_shape: Shape = None,
    input_range: Range = None,
    input_mean: Mean = None,
    input_std: Std = None,
    init: Init = None,
    weights: Weights = None,
    solver: Annotated[str, typer.Option("--solver", metavar="auto|lsmr|dense", help="Linear solver.")] = "auto",
    prior: Annotated[
        str | None, typer.Option("--prior", metavar="tv|none", help="What chooses where information is missing.")
    ] = None,
    pull_back: Annotated[
        str, typer.Option("--pull-back", metavar="auto|levenberg_marquardt|optax", help="Pull-back solver.")
    ] = "auto",
    optimizer: Annotated[
        str, typer.Option("--optimizer", metavar="lbfgs|adam", help="What first-order descent goes by.")
    ] = "lbfgs",
    starts: Annotated[int, typer.Option("--starts", help="Random starts that matching solves at once.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", help="Descent steps of a matching baseline.")] = None,
    seed: Seed = 0,
    dtype: Dtype = "float64",
    out: Out = Path("leakjax-out"),
    json_output: Json = False,
) -> None:
    """Reconstruct the images behind gradients; writes report.json, reconstruction.npz and figure.png."""
    with session() as console:
        from leakjax import inversion
        from leakjax.attacks import ATTACKS, DEFAULT_ATTACK
        from leakjax.cli.setup import Sending, Setup
        from leakjax.constraints.priors import DEFAULT_PRIOR, PRIORS
        from leakjax.report.pairing import pair_with_truth
        from leakjax.report.reconstruction.figure import draw_figure
        from leakjax.report.reconstruction.record import RunInfo, build_report, unit_scale, write_report
        from leakjax.report.reconstruction.table import print_report

        attack = DEFAULT_ATTACK if attack is None else attack
        if attack not in ATTACKS:
            raise unknown_name("attack", attack, ATTACKS)
        prior = DEFAULT_PRIOR if prior is None else prior
        if prior not in PRIORS:
            raise unknown_name("prior", prior, PRIORS)
        if truth is not None and capture is None and torch_capture is None:
            raise InputError("--truth goes with --capture or --torch-capture; data sets bring their own truth")
        captured = capture is not None or torch_capture is not None
        if captured and (defense is not None or local_steps != 1 or learning_rate is not None):
            raise InputError(
                "a capture says its own defense and local steps; leave out --defense, --local-steps, --learning-rate"
            )
        if sum(source is not None for source in (images, capture, torch_capture)) > 1:
            raise InputError("give one of --images, --capture and --torch-capture")
        if weights is not None and (capture is not None or torch_capture is not None):
            raise InputError("--weights: a capture brings the weights it was made with; leave the option out")
        directory = writable(out)
        told = (loss, input_shape, input_range, weights, input_mean, input_std)
        setup = Setup.load(model, activation, init, seed, *told)
        if captured:
            observation, shown = setup.from_capture(capture, torch_capture, truth)
            observation = _with_decay(observation, weight_decay)
            _agree("--loss", loss, setup.loss, observation.loss)
            _agree("--input-shape", input_shape, setup.input_shape, observation.input_shape)
            _agree("--input-range", input_range, setup.input_range, observation.input_range)
            _agree_by_channel("--input-mean", setup.input_mean, observation.input_mean, observation.input_shape[-1])
            _agree_by_channel("--input-std", setup.input_std, observation.input_std, observation.input_shape[-1])
        else:
            sending = Sending(
                defense=defense,
                seed=seed,
                local_steps=local_steps,
                learning_rate=learning_rate,
                weight_decay=weight_decay or 0.0,
            )
            observation, shown = setup.observe(dataset, integers("--index", index), images, batch_size, dtype, sending)
        given = None if labels is None else integers("--labels", labels)
        with progress(console) as tell:
            result = inversion.invert(
                observation,
                attack=attack,
                dtype=dtype,
                labels=given,
                solver=solver,
                pull_back=pull_back,
                optimizer=optimizer,
                starts=starts,
                steps=steps,
                prior=prior,
                gradient_noise=gradient_noise,
                gradient_scale=gradient_scale,
                progress=tell,
            )
        pictures = unit_scale(result.images, observation.limits)
        if shown is not None:
            shown = pair_with_truth(shown, pictures, observation.examples)
        report = build_report(RunInfo(model, setup.activation, seed, gradient_noise), observation, result, shown)
        write_report(directory, report, result)
        draw_figure(directory / "figure.png", report, pictures, shown, result.determined)
        if json_output:
            answer(json.dumps(report, allow_nan=False))
        else:
            print_report(console, report)
            console.print(f"wrote {directory}/report.json, reconstruction.npz, figure.png", highlight=False)


def _with_decay(observation: "Observation", typed: float | None) -> "Observation":
    """A capture whose meta has no weight decay takes the option's."""
    own = observation.weight_decay
    if typed is None or typed == own:
        return observation
    if own:
        raise InputError(f"--weight-decay: {typed:g} contradicts the capture's own {own:g}; leave the option out")
    return dataclasses.replace(observation, weight_decay=typed)


def _agree(option: str, typed: str | None, asked: Any, captured: Any) -> None:
    """A capture says for itself what it holds; an option that says otherwise is a mistake."""
    if typed is not None and asked != captured:
        raise InputError(f"{option}: {typed} contradicts the capture's own {captured}; leave the option out")


def _agree_by_channel(option: str, typed: Any, captured: Any, channels: int) -> None:
    if typed is None or captured == (typed if len(typed) == channels else typed * channels):
        return
    own = "which has none: write input_mean and input_std into its meta" if captured is None else f"{list(captured)}"
    raise InputError(f"{option}: contradicts the capture's own, {own}; leave the option out")
