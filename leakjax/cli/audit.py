"""`leakjax audit`."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leakjax.cli.options import (
    ActivationName,
    ImagesFile,
    Init,
    Json,
    LossName,
    Name,
    Out,
    Range,
    Seed,
    Shape,
    Weights,
    integers,
    numbers,
)
from leakjax.cli.session import progress, say, session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError
from leakjax.files.whole import write_npz, write_text

if TYPE_CHECKING:
    from leakjax.report.audit.audit import Audit


def audit(
    model: Name = "cnn6",
    activation: ActivationName = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Images of a data set; see `leakjax list datasets`.")
    ] = None,
    index: Annotated[
        str | None, typer.Option("--index", metavar="I[,J..]", help="Which images (0); one batch together.")
    ] = None,
    images: ImagesFile = None,
    noise: Annotated[
        str | None, typer.Option("--noise", metavar="S[,T..]", help="Standard deviations of noise in the gradient.")
    ] = None,
    noise_multiplier: Annotated[
        str | None,
        typer.Option("--noise-multiplier", metavar="M[,N..]", help="DP-SGD's noise over its clip; with --clip."),
    ] = None,
    clip: Annotated[float | None, typer.Option("--clip", metavar="C", help="DP-SGD's norm of a gradient.")] = None,
    sampling_rate: Annotated[float, typer.Option("--sampling-rate", help="Share of the examples in a batch.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", help="Steps of DP-SGD that epsilon is for.")] = 1,
    delta: Annotated[float, typer.Option("--delta", help="Delta of (epsilon, delta).")] = 1e-5,
    shapes_only: Annotated[bool, typer.Option("--shapes-only", help="Count on shapes alone: no weights.")] = False,
    fail_above: Annotated[
        float | None, typer.Option("--fail-above", metavar="FRACTION", help="Exit with 1 if more than this leaks.")
    ] = None,
    fail_above_psnr: Annotated[
        float | None,
        typer.Option(
            "--fail-above-psnr",
            metavar="DB",
            help="Exit with 1 if an attack can reach more at the worst noise asked for, or if nothing bounds it.",
        ),
    ] = None,
    loss: LossName = None,
    input_shape: Shape = None,
    input_range: Range = None,
    init: Init = None,
    weights: Weights = None,
    seed: Seed = 0,
    out: Out = Path("leakjax-out"),
    json_output: Json = False,
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

        if fail_above is not None and not 0 <= fail_above <= 1:
            raise InputError(f"--fail-above: expected a fraction in 0..1, got {fail_above}")
        if fail_above_psnr is not None:
            if not math.isfinite(fail_above_psnr):
                raise InputError(f"--fail-above-psnr: expected a number of decibels, got {fail_above_psnr}")
            if noise is None and noise_multiplier is None:
                raise InputError("--fail-above-psnr needs --noise, or --clip with --noise-multiplier: at which noise?")
        if (noise_multiplier is None) != (clip is None):
            raise InputError("--noise-multiplier and --clip go together: give both, or neither")
        drawn = dataset is None and images is None
        if shapes_only and not (drawn and all(option is None for option in (index, noise, clip, weights))):
            raise InputError("--shapes-only needs no images, noise or weights; leave their options out")
        if dataset is not None and images is not None:
            raise InputError("give one of --dataset and --images")
        if drawn and index is not None:
            raise InputError("--index goes with --dataset or --images; without them a random image is drawn by --seed")
        dp_sgd = None
        if clip is not None and noise_multiplier is not None:
            multipliers = tuple(numbers("--noise-multiplier", noise_multiplier))
            dp_sgd = DPSGD(clip, multipliers, sampling_rate=sampling_rate, steps=steps, delta=delta)
        sigmas = SIGMAS if noise is None else numbers("--noise", noise)
        directory = writable(out)
        setup = Setup.load(model, activation, init, seed, loss, input_shape, input_range, weights)
        if setup.input_shape is None:
            raise InputError("--input-shape H,W,C is needed with a model of your own")
        batch = (
            (None, None)
            if drawn
            else setup.batch(dataset, integers("--index", "0" if index is None else index), images)
        )
        with progress(console) as tell:
            result = run(
                setup.model,
                setup.input_shape,
                images=batch[0],
                labels=batch[1],
                loss=setup.loss,
                input_range=setup.input_range,
                noise=sigmas,
                dp_sgd=dp_sgd,
                shapes_only=shapes_only,
                seed=seed,
                name=model if setup.activation is None else f"{model} ({setup.activation})",
                progress=tell,
            )
        looked_at = result.data
        if not drawn:
            source = dataset if images is None else file_and_hash(images)
            looked_at = f"{source}, index {index or '0'}"
        initialized = f"initialized with seed {seed}" if ":" not in model else f"those of {model}"
        used = initialized if weights is None else file_and_hash(weights)
        result = dataclasses.replace(result, data=looked_at, weights=used)
        summary = result.to_json()
        write_text(directory / "audit.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        write_text(directory / "audit.html", result.to_html())
        mapped = draw_map(directory / "leakage_map.png", result)
        if mapped:
            write_npz(directory / "maps.npz", result.maps(), compressed=True)
        if json_output:
            answer(json.dumps(summary, allow_nan=False))
        else:
            print_audit(console, result)
            files = "audit.json, audit.html" + (", leakage_map.png, maps.npz" if mapped else "")
            console.print(f"wrote {directory}/{files}", highlight=False)
        failures = [*_leaks_more(result, fail_above), *_reaches_more(result, fail_above_psnr)]
        for failure in failures:
            say(failure)
        if failures:
            raise typer.Exit(1)


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
