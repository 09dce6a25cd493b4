"""`leakjax audit`."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leakjax.cli.options import DATA, ImagesFile, ModelOptions, OutputOptions, Target, integers, numbers
from leakjax.cli.progress import progress
from leakjax.cli.session import say, session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError
from leakjax.files.whole import write_npz, write_text

if TYPE_CHECKING:
    from leakjax.report.audit.audit import Audit


_NOISE, _GATE = "Noise", "Gate"


def _option(panel: str, name: str, metavar: str | None, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel=panel)


@dataclasses.dataclass(frozen=True)
class AuditedData:
    """The images that a model is audited at; none for one that is drawn."""

    dataset: Annotated[
        str | None, _option(DATA, "--dataset", "NAME", "Images of a data set; see `leakjax list datasets`.")
    ] = None
    index: Annotated[str | None, _option(DATA, "--index", "I[,J..]", "Which images (0); one batch together.")] = None
    images: ImagesFile = None
    target: Target = "class"
    buffers: Annotated[
        bool, _option(DATA, "--buffers", None, "Count the new running statistics too, as sent with the gradient.")
    ] = False
    shapes_only: Annotated[bool, _option(DATA, "--shapes-only", None, "Count on shapes alone: no weights.")] = False

    @property
    def drawn(self) -> bool:
        """Whether a random image is audited."""
        return self.dataset is None and self.images is None


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
    """Noise in every entry of the gradient, or a DP-SGD."""

    noise: Annotated[
        str | None, _option(_NOISE, "--noise", "S[,T..]", "Standard deviations of noise in the gradient.")
    ] = None
    noise_multiplier: Annotated[
        str | None, _option(_NOISE, "--noise-multiplier", "M[,N..]", "DP-SGD's noise over its clip; with --clip.")
    ] = None
    clip: Annotated[float | None, _option(_NOISE, "--clip", "C", "DP-SGD's norm of a gradient.")] = None
    sampling_rate: Annotated[float, _option(_NOISE, "--sampling-rate", None, "Share of the examples in a batch.")] = 1.0
    steps: Annotated[int, _option(_NOISE, "--steps", None, "Steps of DP-SGD that epsilon is for.")] = 1
    delta: Annotated[float, _option(_NOISE, "--delta", None, "Delta of (epsilon, delta).")] = 1e-5


@dataclasses.dataclass(frozen=True)
class GateOptions:
    """What makes the command fail, so that a pipeline stops."""

    fail_above: Annotated[
        float | None, _option(_GATE, "--fail-above", "FRACTION", "Exit with 1 if more than this leaks.")
    ] = None
    fail_above_psnr: Annotated[
        float | None,
        _option(
            _GATE,
            "--fail-above-psnr",
            "DB",
            "Exit with 1 if an attack can reach more at the worst noise asked for, or if nothing bounds it.",
        ),
    ] = None


def audit(
    model: ModelOptions, data: AuditedData, noise: NoiseOptions, gate: GateOptions, output: OutputOptions
) -> None:
    """Measure how much a model leaks, and why; writes audit.json, audit.html, leakage_map.png, maps.npz."""
    with session() as console:
        from leakjax.cli.setup import Setup
        from leakjax.files.provenance import file_and_hash
        from leakjax.leakage.audit import SIGMAS
        from leakjax.leakage.audit import audit as run
        from leakjax.leakage.privacy import DPSGD
        from leakjax.report.audit.map import draw_map
        from leakjax.report.audit.table import print_audit

        _check(data, model, noise, gate)
        dp_sgd = None
        if noise.clip is not None and noise.noise_multiplier is not None:
            multipliers = tuple(numbers("--noise-multiplier", noise.noise_multiplier))
            dp_sgd = DPSGD(
                clip=noise.clip,
                noise_multipliers=multipliers,
                sampling_rate=noise.sampling_rate,
                steps=noise.steps,
                delta=noise.delta,
            )
        sigmas = SIGMAS if noise.noise is None else numbers("--noise", noise.noise)
        directory = writable(output.out)
        setup = Setup.load(model)
        if setup.input_shape is None:
            raise InputError("--input-shape H,W,C is needed with a model of your own")
        index = integers("--index", "0" if data.index is None else data.index)
        batch = (None, None) if data.drawn else setup.batch(data.dataset, index, data.images, data.target)
        with progress(console) as tell:
            result = run(
                setup.model,
                setup.input_shape,
                images=batch[0],
                labels="input" if data.target == "input" else batch[1],
                loss=setup.loss,
                input_range=setup.input_range,
                noise=sigmas,
                dp_sgd=dp_sgd,
                shapes_only=data.shapes_only,
                buffers=data.buffers,
                seed=model.seed,
                name=model.name if setup.activation is None else f"{model.name} ({setup.activation})",
                progress=tell,
            )
        looked_at = result.data
        if not data.drawn:
            source = data.dataset if data.images is None else file_and_hash(data.images)
            looked_at = f"{source}, index {data.index or '0'}"
        initialized = f"initialized with seed {model.seed}" if ":" not in model.name else f"those of {model.name}"
        used = initialized if model.weights is None else file_and_hash(model.weights)
        result = dataclasses.replace(result, data=looked_at, weights=used)
        summary = result.to_json()
        write_text(directory / "audit.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        write_text(directory / "audit.html", result.to_html())
        mapped = draw_map(directory / "leakage_map.png", result)
        if mapped:
            write_npz(directory / "maps.npz", result.maps(), compressed=True)
        if output.json_output:
            answer(json.dumps(summary, allow_nan=False))
        else:
            print_audit(console, result)
            files = "audit.json, audit.html" + (", leakage_map.png, maps.npz" if mapped else "")
            console.print(f"wrote {directory}/{files}", highlight=False)
        failures = [*_leaks_more(result, gate.fail_above), *_reaches_more(result, gate.fail_above_psnr)]
        for failure in failures:
            say(failure)
        if failures:
            raise typer.Exit(1)


def _check(data: AuditedData, model: ModelOptions, noise: NoiseOptions, gate: GateOptions) -> None:
    """Refuse options that contradict each other."""
    if gate.fail_above is not None and not 0 <= gate.fail_above <= 1:
        raise InputError(f"--fail-above: expected a fraction in 0..1, got {gate.fail_above}")
    if gate.fail_above_psnr is not None:
        if not math.isfinite(gate.fail_above_psnr):
            raise InputError(f"--fail-above-psnr: expected a number of decibels, got {gate.fail_above_psnr}")
        if noise.noise is None and noise.noise_multiplier is None:
            raise InputError("--fail-above-psnr needs --noise, or --clip with --noise-multiplier: at which noise?")
    if (noise.noise_multiplier is None) != (noise.clip is None):
        raise InputError("--noise-multiplier and --clip go together: give both, or neither")
    others = (data.index, noise.noise, noise.clip, model.weights)
    if data.shapes_only and not (data.drawn and all(option is None for option in others)):
        raise InputError("--shapes-only needs no images, noise or weights; leave their options out")
    if data.dataset is not None and data.images is not None:
        raise InputError("give one of --dataset and --images")
    if data.drawn and data.index is not None:
        raise InputError("--index goes with --dataset or --images; without them a random image is drawn by --seed")


def _leaks_more(result: "Audit", limit: float | None) -> Iterator[str]:
    """Why `--fail-above` fails, if it does."""
    leaked = result.leaked_dimensions
    share = (result.structural_leaked_dimensions if leaked is None else leaked) / result.unknowns
    from leakjax.report.percentage import percentage

    if limit is None:
        return
    if result.verdict == "unknown":
        yield f"--fail-above: it is unknown how much leaks. {result.sentence}"
    elif share > limit:
        most = "at most " if leaked is None else ""
        yield f"{most}{percentage(share)} of the image leaks, more than --fail-above {limit}"


def _reaches_more(result: "Audit", limit: float | None) -> Iterator[str]:
    """Why `--fail-above-psnr` fails, if it does."""
    if limit is None:
        return
    reached = result.attainable_psnr
    if reached is None:
        yield f"--fail-above-psnr: nothing bounds an attack at this noise. {result.sentence}"
    elif reached > limit:
        yield f"an attack can reach {reached:.1f} dB at the noise asked for, more than --fail-above-psnr {limit:g}"
