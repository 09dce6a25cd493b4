"""The command line: thin commands over the library."""

import typer

from leakjax.cli.audit import audit
from leakjax.cli.capture import capture
from leakjax.cli.data import data
from leakjax.cli.effects import Checked
from leakjax.cli.invert import invert
from leakjax.cli.listing import list_
from leakjax.cli.session import OneLineErrors
from leakjax.cli.train import train

app = typer.Typer(
    name="leakjax",
    cls=OneLineErrors,
    help="What a gradient gives away about the image that produced it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (invert, capture, audit, train):
    app.command(cls=Checked)(command)
app.command("list")(list_)
app.add_typer(data)


def main() -> None:
    """Entry point of `leakjax`."""
    app()
