"""The command line: thin commands over the library."""

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from leakjax.errors import InputError, unknown_name

_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # Click's, or the one that newer versions of Typer carry


class _OneLineErrors(TyperGroup):
    """The commands, with a mistyped option answered by one line, as every other bad input is."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run a command line."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except _USAGE_ERROR as error:
            if not standalone_mode:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                _say(error.format_message())
            sys.exit(2)
        except typer.Abort:
            sys.exit(130)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    name="leakjax",
    cls=_OneLineErrors,
    help="What a gradient gives away about the image that produced it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Option("--model", "-m", metavar="NAME|package.module:factory", help="Model to use.")]
ActivationName = Annotated[str | None, typer.Option("--activation", metavar="NAME[:PARAMETER]")]
Dataset = Annotated[str, typer.Option("--dataset", metavar="NAME", help="Data set; see `leakjax list datasets`.")]
Index = Annotated[str, typer.Option("--index", metavar="I[,J..]", help="Which images: a victim each.")]
ImagesFile = Annotated[Path | None, typer.Option("--images", metavar="FILE.npz", help="Your own images and labels.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="B", help="Consecutive images in one gradient.")]
LossName = Annotated[str | None, typer.Option("--loss", metavar="NAME", help="Loss, by Optax's name.")]
Shape = Annotated[str | None, typer.Option("--input-shape", metavar="H,W,C", help="Input shape of your own model.")]
Range = Annotated[str | None, typer.Option("--input-range", metavar="LOW,HIGH", help="Values that a pixel can have.")]
Init = Annotated[str | None, typer.Option("--init", metavar="NAME", help="Initialization: torch or uniform.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the initialization.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="float64|float32")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go.")]
Json = Annotated[bool, typer.Option("--json", help="Print the machine-readable summary, and nothing else, on stdout.")]


@app.command()
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
    loss: LossName = None,
    input_shape: Shape = None,
    input_range: Range = None,
    init: Init = None,
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
    starts: Annotated[int, typer.Option("--starts", help="Random starts that `match` solves at once.")] = 1,
    seed: Seed = 0,
    dtype: Dtype = "float64",
    out: Out = Path("leakjax-out"),
    json_output: Json = False,
) -> None:
    """Reconstruct the images behind gradients; writes report.json, reconstruction.npz and figure.png."""
    with _session() as console:
        from leakjax import inversion
        from leakjax.attacks import ATTACKS, DEFAULT_ATTACK
        from leakjax.priors import DEFAULT_PRIOR, PRIORS
        from leakjax.report.figure import draw_figure
        from leakjax.report.pairing import pair_with_truth
        from leakjax.report.record import RunInfo, build_report, unit_scale, write_report
        from leakjax.report.table import print_report
        from leakjax.setup import Setup

        attack = DEFAULT_ATTACK if attack is None else attack
        if attack not in ATTACKS:
            raise unknown_name("attack", attack, ATTACKS)
        prior = DEFAULT_PRIOR if prior is None else prior
        if prior not in PRIORS:
            raise unknown_name("prior", prior, PRIORS)
        if truth is not None and capture is None and torch_capture is None:
            raise InputError("--truth goes with --capture or --torch-capture; data sets bring their own truth")
        if sum(source is not None for source in (images, capture, torch_capture)) > 1:
            raise InputError("give one of --images, --capture and --torch-capture")
        directory = _writable(out)
        setup = Setup.load(model, activation, init, seed, loss, input_shape, input_range)
        if capture is not None or torch_capture is not None:
            observation, shown = setup.from_capture(capture, torch_capture, truth)
            _agree("--loss", loss, setup.loss, observation.loss)
            _agree("--input-shape", input_shape, setup.input_shape, observation.input_shape)
            _agree("--input-range", input_range, setup.input_range, observation.input_range)
        else:
            observation, shown = setup.observe(dataset, _integers("--index", index), images, batch_size, dtype)
        given = None if labels is None else _integers("--labels", labels)
        with _progress(console) as tell:
            result = inversion.invert(
                observation,
                attack=attack,
                dtype=dtype,
                labels=given,
                solver=solver,
                pull_back=pull_back,
                optimizer=optimizer,
                starts=starts,
                prior=prior,
                progress=tell,
            )
        pictures = unit_scale(result.images, observation.input_range)
        if shown is not None:
            shown = pair_with_truth(shown, pictures, observation.examples)
        report = build_report(RunInfo(model, setup.activation, seed), observation, result, shown)
        write_report(directory, report, result)
        draw_figure(directory / "figure.png", report, pictures, shown, result.determined)
        if json_output:
            print(json.dumps(report, allow_nan=False))
        else:
            print_report(console, report)
            console.print(f"wrote {directory}/report.json, reconstruction.npz, figure.png", highlight=False)


@app.command()
def capture(
    model: Name = "cnn6",
    activation: ActivationName = None,
    dataset: Dataset = "samples",
    index: Index = "0",
    images: ImagesFile = None,
    batch_size: BatchSize = 1,
    loss: LossName = None,
    input_shape: Shape = None,
    input_range: Range = None,
    init: Init = None,
    seed: Seed = 0,
    dtype: Dtype = "float64",
    out: Out = Path("leakjax-out"),
    json_output: Json = False,
) -> None:
    """Write the gradient that a client would send, with the weights, to capture.npz; never the image."""
    with _session() as console:
        from leakjax.captures import write_capture
        from leakjax.setup import Setup

        directory = _writable(out)
        setup = Setup.load(model, activation, init, seed, loss, input_shape, input_range)
        observation, _ = setup.observe(dataset, _integers("--index", index), images, batch_size, dtype)
        path = directory / "capture.npz"
        write_capture(observation, path)
        if json_output:
            summary = {"capture": str(path), "model": model, "activation": setup.activation, "dtype": dtype}
            print(json.dumps({**summary, "victims": observation.victims, "examples": observation.examples}))
        else:
            console.print(f"wrote {path}: {observation.victims} gradient(s) of {model}", highlight=False)


@app.command()
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
    seed: Seed = 0,
    out: Out = Path("leakjax-out"),
    json_output: Json = False,
) -> None:
    """Measure how much a model leaks, and why; writes audit.json, audit.html and leakage_map.png."""
    with _session() as console:
        from leakjax.leakage.audit import SIGMAS
        from leakjax.leakage.audit import audit as run
        from leakjax.report.audit_map import draw_map
        from leakjax.report.audit_page import draw_page
        from leakjax.report.audit_table import print_audit
        from leakjax.setup import Setup

        if fail_above is not None and not 0 <= fail_above <= 1:
            raise InputError(f"--fail-above: expected a fraction in 0..1, got {fail_above}")
        if shapes_only and (dataset is not None or images is not None or noise is not None):
            raise InputError("--shapes-only needs no --dataset, --images or --noise; leave them out")
        sigmas = SIGMAS if noise is None else _numbers("--noise", noise)
        directory = _writable(out)
        setup = Setup.load(model, activation, init, seed, loss, input_shape, input_range)
        if setup.input_shape is None:
            raise InputError("--input-shape H,W,C is needed with a model of your own")
        drawn = dataset is None and images is None
        batch = (None, None) if drawn else setup.batch(dataset, _integers("--index", index), images)
        with _progress(console) as tell:
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
            _say(f"{100 * share:.1f} % of the image leaks, more than --fail-above {fail_above}")
            raise typer.Exit(1)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="models|attacks|datasets|defenses|activations")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Also write WHAT.json there.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Without effect here.")] = 0,
    json_output: Json = False,
) -> None:
    """List what can be named on the command line."""
    del seed
    with _session():
        tables = _tables()
        if what not in tables:
            raise unknown_name("list", what, tables)
        rows = tables[what]()
        if out is not None:
            (_writable(out) / f"{what}.json").write_text(json.dumps(rows, indent=2) + "\n")
        if json_output:
            print(json.dumps(rows))
        else:
            table = Table("name", "summary", title=what, title_justify="left")
            for name, summary in rows.items():
                table.add_row(name, summary)
            Console(soft_wrap=False).print(table if rows else f"no {what} in this version")


def main() -> None:
    """Entry point of `leakjax`."""
    app()


def _tables() -> dict[str, Callable[[], dict[str, str]]]:
    def models() -> dict[str, str]:
        from leakjax.models import MODELS

        return {name: f"{spec.summary}; default {spec.activation}" for name, spec in MODELS.items()}

    def attacks() -> dict[str, str]:
        from leakjax.attacks import ATTACKS

        return {name: attack.summary for name, attack in ATTACKS.items()}

    def datasets() -> dict[str, str]:
        from leakjax.datasets import DATASETS

        return dict(DATASETS)

    def activations() -> dict[str, str]:
        from leakjax.activations import ACTIVATIONS

        return {
            name: "no parameter" if kind.default is None else f"parameter, default {kind.default:g}"
            for name, kind in ACTIVATIONS.items()
        }

    return {"models": models, "attacks": attacks, "datasets": datasets, "defenses": dict, "activations": activations}


@contextlib.contextmanager
def _session() -> Iterator[Console]:
    """Set up the process, and turn `InputError` into one line and exit status 2."""
    console = Console(stderr=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        _enable_compilation_cache()
        yield console
    except InputError as error:
        _say(str(error))
        raise typer.Exit(2) from None
    except OSError as error:
        _say(f"--out: cannot write {error.filename} ({error.strerror}); name another folder")
        raise typer.Exit(2) from None
    except MemoryError as error:
        _say(f"out of memory ({error}); use a smaller model, fewer images or --solver lsmr")
        raise typer.Exit(2) from None
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _say(f"out of memory ({str(error).splitlines()[0]}); use a smaller model, fewer images or --solver lsmr")
        raise typer.Exit(2) from None


def _say(message: str) -> None:
    print(f"leakjax: error: {' '.join(message.split())}", file=sys.stderr)


def _enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user's own settings say otherwise."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "leakjax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    with console.status("starting") as status:
        yield lambda stage: status.update(stage)


def _writable(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".leakjax-write-test"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--out: cannot write to {directory} ({reason}); name another folder") from None
    return directory


def _agree(option: str, typed: str | None, asked: Any, captured: Any) -> None:
    """A capture says for itself what it holds; an option that says otherwise is a mistake."""
    if typed is not None and asked != captured:
        raise InputError(f"{option}: {typed} contradicts the capture's own {captured}; leave the option out")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected numbers separated by commas, got {text!r}") from None


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected integers separated by commas, got {text!r}") from None


if __name__ == "__main__":
    main()
