"""`leakjax list`."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from leakjax.cli.options import Json
from leakjax.cli.session import session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError, unknown_name
from leakjax.files.whole import write_text


def list_(
    what: Annotated[str, typer.Argument(metavar="models|attacks|datasets|defenses|activations")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Also write WHAT.json there.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Without effect here.")] = 0,
    json_output: Json = False,
) -> None:
    """List what can be named on the command line."""
    del seed
    with session():
        tables = _tables()
        if what not in tables:
            raise unknown_name("list", what, tables)
        rows = tables[what]()
        if out is not None:
            write_text(writable(out) / f"{what}.json", json.dumps(rows, indent=2) + "\n")
        if json_output:
            answer(json.dumps(rows))
        else:
            table = Table("name", "summary", title=what, title_justify="left")
            for name, summary in rows.items():
                table.add_row(name, summary)
            held = io.StringIO()
            console = Console(file=held, markup=False, emoji=False, soft_wrap=False)
            console.print(table if rows else f"no {what} in this version")
            answer(held.getvalue().rstrip("\n"))


def _tables() -> dict[str, Callable[[], dict[str, str]]]:
    def models() -> dict[str, str]:
        from leakjax.models import MODELS

        return {name: f"{spec.summary}; default {spec.activation}" for name, spec in MODELS.items()}

    def attacks() -> dict[str, str]:
        from leakjax.attacks import ATTACKS

        return {name: attack.summary for name, attack in ATTACKS.items()}

    def datasets() -> dict[str, str]:
        from leakjax.datasets import DATASETS
        from leakjax.datasets.prepared import prepared_sets
        from leakjax.datasets.preparing import data_home

        try:
            return {**DATASETS, **prepared_sets(data_home(None))}
        except InputError:  # no home directory: nothing can be prepared there
            return dict(DATASETS)

    def activations() -> dict[str, str]:
        from leakjax.models.activations import ACTIVATIONS

        return {
            name: "no parameter" if kind.default is None else f"parameter, default {kind.default:g}"
            for name, kind in ACTIVATIONS.items()
        }

    def defenses() -> dict[str, str]:
        from leakjax.client.defenses import DEFENSES

        def typed(name: str) -> str:
            values = ", ".join(f"{p.name} {p.default:g}" for p in DEFENSES[name].parameters)
            return f"parameters, default: {values}" if values else "no parameter"

        return {name: f"{defense.summary}; {typed(name)}" for name, defense in DEFENSES.items()}

    return {
        "models": models,
        "attacks": attacks,
        "datasets": datasets,
        "defenses": defenses,
        "activations": activations,
    }
