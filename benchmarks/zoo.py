"""`python -m benchmarks zoo --out DIR`: reconstructions of the zoo, a record an image; and their table.

A run continues what the folder holds already, as those of the suites do.
"""

import argparse
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import asking, runner
from benchmarks.cases import MAP, Case, on_images, options
from benchmarks.progress import progress
from leakjax.arguments import choice
from leakjax.attacks import ATTACKS
from leakjax.errors import InputError
from leakjax.models import MODELS
from leakjax.models.activations import parse_activation
from leakjax.preparation import SOLVERS
from leakjax.runtime.precision import DTYPES


def table(records: list[dict[str, Any]]) -> str:
    """A markdown row for every model, activation, dtype, attack and batch size."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        attack = f"{r['attack']}, solver {r['solver']}" if "solver" in r else r["attack"]
        attack += ", map given" if r.get("labels") == MAP else ""
        groups.setdefault((r["model"], r["activation"], r["dtype"], attack, r["batch"]), []).append(r)
    lines = [
        "| model | activation | gradient | attack | images | leaked dimensions | certificates "
        "| determined part, dB (least, median) | whole, dB (least, median) | wrong | CPU s |",
        "|" + "---|" * 11,
    ]
    for (model, activation, dtype, attack, batch), group in groups.items():
        done = [r for r in group if "failed" not in r]
        leaked = sorted({r["leaked_dimensions"] for r in done if r["leaked_dimensions"] is not None})
        unknowns = done[0]["unknowns"] if done else None
        counts = Counter(r.get("status", "refused") for r in group)
        wrong = sum(r["status"] == "exact" and r["psnr"] < 60 for r in done)
        attack = attack if batch == 1 else f"{attack}, batches of {batch}"
        lines.append(
            f"| {model} | {activation} | {dtype} | {attack} | {len(group)} | {_span(leaked)} of {unknowns} "
            f"| {', '.join(f'{n} {status}' for status, n in counts.most_common())} "
            f"| {_least_median(done, 'psnr_determined')} | {_least_median(done, 'psnr')} | {wrong} "
            f"| {_mean([r['cpu_seconds'] for r in done if r['cpu_seconds'] is not None])} |"
        )
    return "\n".join(lines) + "\n"


def _span(values: list[int]) -> str:
    return "-" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" if values else "-"


def _least_median(records: list[dict[str, Any]], name: str) -> str:
    values = [r[name] for r in records if r[name] is not None]
    return f"{min(values):.0f}, {statistics.median(values):.0f}" if values else "-"


def main(words: Sequence[str]) -> None:
    """Run what the options name, or print the table of a file."""
    parser = asking.Parser(prog="python -m benchmarks zoo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/zoo"), metavar="DIR")
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="print the table of records, run nothing")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--activations", default="tanh,leaky_relu,relu")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dataset", default="samples")
    parser.add_argument("--index", default="0,1")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--attack", default="copa")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--labels", choices=[MAP], help="give networks that class every pixel their label maps")
    given = parser.parse_args(words)
    if given.table is None:
        cases = _cases(given)
        asking.folder(given.out)
        with progress(Console(stderr=True)) as tell:
            runner.run(cases, given.out, tell=tell)
    print(asking.printed(given.table or given.out, table), end="")


def _cases(given: argparse.Namespace) -> list[Case]:
    solver = {} if given.solver == "auto" else {"solver": given.solver}
    known_maps = {} if given.labels is None else {"labels": given.labels}
    seeds, indices = asking.whole_numbers("--seeds", given.seeds), asking.whole_numbers("--index", given.index)
    for kind, text, known in (("model", given.models, MODELS), ("attack", given.attack, ATTACKS)):
        for name in text.split(","):
            choice(kind, name, known)
    for text in given.activations.split(","):
        parse_activation(text)
    for kind, name, known in (("dtype", given.dtype, DTYPES), ("solver", given.solver, SOLVERS)):
        choice(kind, name, known)
    if given.batch < 1:
        raise InputError(f"--batch must be a positive integer, got {given.batch}")
    names = [seeds, *(part.split(",") for part in (given.models, given.activations))]
    cases = []
    for seed, model, activation in itertools.product(*names):
        data = "foolbox/mnist" if MODELS[model].input_shape[-1] == 1 else given.dataset
        asked = options(**solver, **(known_maps if MODELS[model].maps else {}))
        told = {"dtype": given.dtype, "batch": given.batch, "options": asked}
        case = Case(model, given.attack, data, activation=activation, seed=seed, **told)
        cases += on_images(case, indices)
    return cases
