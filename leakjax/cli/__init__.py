"""The command line: thin commands over the library."""

from typing import Annotated

import typer

from leakjax.cli.audit import audit
from leakjax.cli.capture import capture
from leakjax.cli.data import data
from leakjax.cli.effects import Checked
from leakjax.cli.invert import invert
from leakjax.cli.listing import list_
from leakjax.cli.options import flattened
from leakjax.cli.session import OneLineErrors
from leakjax.cli.train import train
from leakjax.version import __version__

app = typer.Typer(
    name="leakjax",
    cls=OneLineErrors,
    help="What a gradient gives away about the image that produced it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXAMPLES = {
    invert: "leakjax invert --model cnn6 --index 0,1,2,3 --out demo",
    capture: "leakjax capture --model cnn6 --index 0 --out sent",
    audit: "leakjax audit --model cnn6 --dataset samples --noise 1e-4 --fail-above 0.1",
    train: "leakjax train --model cnn3_c4 --dataset samples --epochs 2 --out trained",
}
for command, example in _EXAMPLES.items():
    app.command(cls=Checked, epilog=f"Example: {example}")(flattened(command))
app.command("list")(list_)
app.add_typer(data)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"leakjax {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and no more.")
    ] = False,
) -> None:
    """What a gradient gives away about the image that produced it."""


def main() -> None:
    """Entry point of `leakjax`."""
    app()
