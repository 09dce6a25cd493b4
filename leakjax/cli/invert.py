"""`leakjax invert`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leakjax.cli.options import (
    CLIENT,
    DATA,
    ClientOptions,
    DataOptions,
    Dtype,
    NormalizedModelOptions,
    OutputOptions,
    integers,
    option,
)
from leakjax.cli.progress import progress
from leakjax.cli.session import session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

    from leakjax.cli.setup import Setup
    from leakjax.client.observation import Observation


_SCALE = "Known factor of a capture's gradient; 1 for none."
_PULL_BACKS = "auto|levenberg_marquardt|optax"


def _of_capture(name: str, help: str) -> Any:
    return typer.Option(name, metavar="FILE.npz", help=help, rich_help_panel=DATA)


def _of_client(name: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel=CLIENT)


@dataclasses.dataclass(frozen=True)
class CaptureOptions:
    """A gradient in a file, in place of images."""

    capture: Annotated[Path | None, _of_capture("--capture", "A written gradient.")] = None
    torch_capture: Annotated[Path | None, _of_capture("--torch-capture", "A gradient from PyTorch.")] = None
    truth: Annotated[Path | None, _of_capture("--truth", "Images beside a capture, for the report only.")] = None

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self.capture is not None or self.torch_capture is not None


@dataclasses.dataclass(frozen=True)
class AttackOptions:
    """Which attack, what it is told, and how it goes about it."""

    attack: Annotated[str | None, option("--attack", "NAME", "See `leakjax list attacks`.")] = None
    labels: Annotated[
        str | None, _of_client("--labels", "L[,M..]|map", "Labels, where known; `map`: the label maps.")
    ] = None
    gradient_noise: Annotated[
        float | None, _of_client("--gradient-noise", "SIGMA", "Standard deviation of noise known in every entry.")
    ] = None
    gradient_scale: Annotated[float | None, _of_client("--gradient-scale", "C", _SCALE)] = None
    solver: Annotated[
        str, option("--solver", "auto|lsmr|dense", "Linear solver; auto is direct where a layer allows.")
    ] = "auto"
    prior: Annotated[str | None, option("--prior", "tv|none", "What chooses where information is missing.")] = None
    pull_back: Annotated[str, option("--pull-back", _PULL_BACKS, "Pull-back solver.")] = "auto"
    optimizer: Annotated[str, option("--optimizer", "lbfgs|adam", "What first-order descent goes by.")] = "lbfgs"
    starts: Annotated[int, option("--starts", None, "Random starts that matching solves at once.")] = 1
    steps: Annotated[int | None, option("--steps", None, "Descent steps of a matching baseline.")] = None


def invert(
    model: NormalizedModelOptions,
    data: DataOptions,
    captured: CaptureOptions,
    client: ClientOptions,
    how: AttackOptions,
    output: OutputOptions,
    dtype: Dtype = "float64",
    plan: Annotated[bool, option("--plan", None, "Say what each layer costs, and stop.")] = False,
) -> None:
    """Reconstruct the images behind gradients; writes report.json, reconstruction.npz and figure.png."""
    with session() as console:
        from leakjax import inversion
        from leakjax.attacks import ATTACKS, DEFAULT_ATTACK
        from leakjax.cli.setup import Setup
        from leakjax.constraints.priors import DEFAULT_PRIOR, PRIORS
        from leakjax.report.pairing import pair_with_truth
        from leakjax.report.reconstruction.figure import draw_figure
        from leakjax.report.reconstruction.record import RunInfo, build_report, unit_scale, write_report
        from leakjax.report.reconstruction.table import print_report

        attack = DEFAULT_ATTACK if how.attack is None else how.attack
        if attack not in ATTACKS:
            raise unknown_name("attack", attack, ATTACKS)
        prior = DEFAULT_PRIOR if how.prior is None else how.prior
        if prior not in PRIORS:
            raise unknown_name("prior", prior, PRIORS)
        _check_sources(model, data, captured, client)
        directory = output.out if plan else writable(output.out)
        setup = Setup.load(model)
        if captured.given:
            observation, shown = setup.from_capture(captured.capture, captured.torch_capture, captured.truth)
            observation = _with_decay(observation, client.weight_decay)
            _agree_with(model, setup, observation)
        else:
            observation, shown = setup.observe(data, client, dtype, model.seed)
        given = None if how.labels is None else _labels(how.labels, setup, data, captured)
        if plan:
            _plan(console, observation, attack, dtype, how.solver, as_json=output.json_output)
            return
        with progress(console) as tell:
            result = inversion.invert(
                observation,
                attack=attack,
                dtype=dtype,
                labels=given,
                solver=how.solver,
                pull_back=how.pull_back,
                optimizer=how.optimizer,
                starts=how.starts,
                steps=how.steps,
                prior=prior,
                gradient_noise=how.gradient_noise,
                gradient_scale=how.gradient_scale,
                seed=model.seed,
                progress=tell,
            )
        pictures = unit_scale(result.images, observation.limits)
        if shown is not None:
            shown = pair_with_truth(shown, pictures, observation.examples)
        info = RunInfo(model.name, setup.activation, model.seed, how.gradient_noise)
        report = build_report(info, observation, result, shown)
        write_report(directory, report, result)
        draw_figure(directory / "figure.png", report, pictures, shown, result.determined)
        if output.json_output:
            answer(json.dumps(report, allow_nan=False))
        else:
            print_report(console, report)
            console.print(f"wrote {directory}/report.json, reconstruction.npz, figure.png", highlight=False)


def _labels(typed: str, setup: "Setup", data: DataOptions, captured: CaptureOptions) -> Any:
    """The labels that the attack is given: integers, or the label maps of the images."""
    if typed != "map":
        return integers("--labels", typed, ", or `map`")
    if captured.given:
        raise InputError("--labels map: a capture holds no label maps; give them in Python, invert(..., labels=maps)")
    return setup.maps_of(data)


def _plan(
    console: "Console", observation: "Observation", attack: str, dtype: str, solver: str, *, as_json: bool
) -> None:
    """Print what the inversion will cost; nothing is written."""
    from leakjax.planning import plan
    from leakjax.report.reconstruction.plan import print_plan

    with progress(console) as tell:
        planned = plan(observation, attack=attack, dtype=dtype, solver=solver, progress=tell)
    if as_json:
        answer(json.dumps({**dataclasses.asdict(planned), "operations": planned.operations}))
    else:
        print_plan(console, planned)


def _check_sources(
    model: NormalizedModelOptions, data: DataOptions, captured: CaptureOptions, client: ClientOptions
) -> None:
    """One source of gradients, with the options that go with it."""
    if captured.truth is not None and not captured.given:
        raise InputError("--truth goes with --capture or --torch-capture; data sets bring their own truth")
    plain = client.defense is None and client.local_steps == 1 and client.learning_rate is None
    if captured.given and not plain:
        raise InputError(
            "a capture says its own defense and local steps; leave out --defense, --local-steps, --learning-rate"
        )
    if sum(source is not None for source in (data.images, captured.capture, captured.torch_capture)) > 1:
        raise InputError("give one of --images, --capture and --torch-capture")
    if model.weights is not None and captured.given:
        raise InputError("--weights: a capture brings the weights it was made with; leave the option out")


def _agree_with(model: NormalizedModelOptions, setup: "Setup", observation: "Observation") -> None:
    """A capture says for itself what it holds; an option that says otherwise is a mistake."""
    channels = observation.input_shape[-1]
    _agree("--loss", model.loss, setup.loss, observation.loss)
    _agree("--input-shape", model.input_shape, setup.input_shape, observation.input_shape)
    _agree("--input-range", model.input_range, setup.input_range, observation.input_range)
    _agree_by_channel("--input-mean", setup.input_mean, observation.input_mean, channels)
    _agree_by_channel("--input-std", setup.input_std, observation.input_std, channels)


def _with_decay(observation: "Observation", typed: float | None) -> "Observation":
    """A capture whose meta has no weight decay takes the option's."""
    own = observation.weight_decay
    if typed is None or typed == own:
        return observation
    if own:
        raise InputError(f"--weight-decay: {typed:g} contradicts the capture's own {own:g}; leave the option out")
    return dataclasses.replace(observation, weight_decay=typed)


def _agree(option: str, typed: str | None, asked: Any, captured: Any) -> None:
    if typed is not None and asked != captured:
        raise InputError(f"{option}: {typed} contradicts the capture's own {captured}; leave the option out")


def _agree_by_channel(option: str, typed: Any, captured: Any, channels: int) -> None:
    if typed is None or captured == (typed if len(typed) == channels else typed * channels):
        return
    own = "which has none: write input_mean and input_std into its meta" if captured is None else f"{list(captured)}"
    raise InputError(f"{option}: contradicts the capture's own, {own}; leave the option out")
