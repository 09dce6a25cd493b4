"""A plan as a table."""

from rich import box
from rich.console import Console
from rich.table import Table

from leakjax.reconstruction import Plan


def print_plan(console: Console, plan: Plan) -> None:
    """One row a layer, for one client, and what all of them take."""
    table = Table(title="cost of a client", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("layer", "unknowns", "equations", "solver", "MFLOP", "a step", "max steps", "MiB"):
        table.add_column(name, justify="left" if name in ("layer", "solver") else "right")
    for layer in plan.layers:
        table.add_row(
            layer.name,
            str(layer.unknowns),
            str(layer.equations),
            layer.solver,
            _number(layer.operations, 1e6),
            _number(layer.step or None, 1e6),
            "-" if not layer.most_steps else str(layer.most_steps),
            _number(layer.bytes, 2**20),
        )
    console.print(table)
    clients = f"{plan.clients} client{'s' if plan.clients > 1 else ''}, {plan.together} at a time"
    words = f"{clients}: {plan.operations / 1e9:.3g} GFLOP and the steps; {plan.bytes / 2**20:.0f} MiB a program"
    console.print(words, highlight=False)


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3g}"
