"""`leakjax audit`."""

import json
from pathlib import Path
from typing import Annotated

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
from leakjax.errors import InputError


def audit(
    model: Name = "cnn6",
    activation: ActivationName = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Images of a data set; see `leakjax list datasets`.")
    ] = None,
    index: Annotated[str, typer.Option("--index", metavar="I[,J..]", help="Which images; one batch together.")] = "0",
    images: ImagesFile = None,
    noise: Annotated[
        str | None, typer.Option("--noise", metavar="S[,T..]", help="Standard deviations of noise in the gradient.")
    ] = None,
    shapes_only: Annotated[bool, typer.Option("--shapes-only", help="Count on shapes alone: no weights.")] = False,
    fail_above: Annotated[
        float | None, typer.Option("--fail-above", metavar="FRACTION", help="Exit with 1 if more than this leaks.")
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
    """Measure how much a model leaks, and why; writes audit.json, audit.html and leakage_map.png."""
    with session() as console:
        from leakjax.leakage.audit import SIGMAS
        from leakjax.leakage.audit import audit as run
        from leakjax.report.audit_map import draw_map
        from leakjax.report.audit_page import draw_page
        from leakjax.report.audit_table import print_audit
        from leakjax.setup import Setup

        if fail_above is not None and not 0 <= fail_above <= 1:
            raise InputError(f"--fail-above: expected a fraction in 0..1, got {fail_above}")
        if shapes_only and any(option is not None for option in (dataset, images, noise, weights)):
            raise InputError("--shapes-only needs no --dataset, --images, --noise or --weights; leave them out")
        sigmas = SIGMAS if noise is None else numbers("--noise", noise)
        directory = writable(out)
        setup = Setup.load(model, activation, init, seed, loss, input_shape, input_range, weights)
        if setup.input_shape is None:
            raise InputError("--input-shape H,W,C is needed with a model of your own")
        drawn = dataset is None and images is None
        batch = (None, None) if drawn else setup.batch(dataset, integers("--index", index), images)
        with progress(console) as tell:
            result = run(
                setup.model,
                setup.input_shape,
                images=batch[0],
                labels=batch[1],
                loss=setup.loss,
                input_range=setup.input_range,
                noise=sigmas,
                shapes_only=shapes_only,
                seed=seed,
                name=model if setup.activation is None else f"{model} ({setup.activation})",
                progress=tell,
            )
        summary = result.to_json()
        (directory / "audit.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        (directory / "audit.html").write_text(draw_page(result), encoding="utf-8")
        mapped = draw_map(directory / "leakage_map.png", result)
        if json_output:
            print(json.dumps(summary, allow_nan=False))
        else:
            print_audit(console, result)
            files = "audit.json, audit.html" + (", leakage_map.png" if mapped else "")
            console.print(f"wrote {directory}/{files}", highlight=False)
        leaked = result.leaked_dimensions
        share = (result.structural_leaked_dimensions if leaked is None else leaked) / result.unknowns
        if fail_above is not None and share > fail_above:
            say(f"{100 * share:.1f} % of the image leaks, more than --fail-above {fail_above}")
            raise typer.Exit(1)
