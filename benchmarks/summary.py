"""The tables of a suite, from its records alone."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.cases import Case, case_of
from benchmarks.nets import net_spec, plain_size
from benchmarks.published import published
from benchmarks.records import Record
from benchmarks.statistics import Exponent, fit_exponent, spread_of
from benchmarks.suites import BASE

WRONG_BELOW = 60.0
"""PSNR of an `exact` answer below which its certificate is wrong."""


class Row(NamedTuple):
    """The records of cases that differ in image and seed alone."""

    case: Case
    records: list[Record]

    @property
    def done(self) -> list[Record]:
        """Those that did not fail."""
        return [r for r in self.records if "failed" not in r]

    def values(self, name: str) -> list[float]:
        """The numbers of one entry where there are any."""
        return [r[name] for r in self.done if r.get(name) is not None]

    @property
    def activation(self) -> str:
        """By name, also where it is the paper's."""
        return self.case.activation or net_spec(self.case.model).activation

    @property
    def attack(self) -> str:
        """With its options and, above one, the batch."""
        words = [self.case.attack, *(f"{k} {v}" for k, v in self.case.options)]
        return ", ".join([*words, *([] if self.case.batch == 1 else [f"batches of {self.case.batch}"])])

    @property
    def client(self) -> str:
        """What the client does besides computing a gradient, and in what precision."""
        words = [] if self.case.dtype == "float64" else [self.case.dtype]
        words += [] if self.case.train is None else [f"train, statistics {self.case.train}"]
        words += [] if self.case.local_steps == 1 else [f"{self.case.local_steps} local steps"]
        words += [] if self.case.defense is None else [self.case.defense]
        return ", ".join(words) or "-"

    @property
    def cpu_seconds(self) -> float | None:
        """Median of an image, of programs compiled before where there are such records."""
        timed = [r for r in self.done if r.get("cpu_seconds") is not None]
        warm = [r for r in timed if r.get("warm")] or timed
        return statistics.median(r["cpu_seconds"] for r in warm) if warm else None


def rows(records: Iterable[Record], order: Sequence[Case] = ()) -> list[Row]:
    """The records by row, in the order of `order`; others follow as they come. The last of one case counts."""
    latest = {(case := case_of(record)).key: (case, record) for record in records}
    keys = [case.key for case in order if case.key in latest]
    grouped: dict[Case, list[Record]] = {}
    for key in dict.fromkeys([*keys, *latest]):
        case, record = latest[key]
        grouped.setdefault(dataclasses.replace(case, index=0, seed=0), []).append(record)
    return [Row(case, group) for case, group in grouped.items()]


def table(records: Iterable[Record], order: Sequence[Case] = ()) -> str:
    """Markdown: a row for all images of a model, activation, client and attack; then exponents of cost, if any."""
    made = rows(records, order)
    lines = [
        "| model | activation | client | attack | images | PSNR dB: median [95 %] | mean | worst "
        "| SSIM: median, worst | certificates | wrong | labels | CPU s | published PSNR dB |",
        "|" + "---|" * 14,
    ]
    lines += [_line(row) for row in made]
    fits = exponents(made)
    if fits:
        lines += ["", "| cost of an image against | sizes | CPU s | exponent |", "|---|---|---|---|"]
        for fit in fits:
            costs = f"{fit.costs[0]:.2g} to {fit.costs[-1]:.2g}"
            sizes = ", ".join(map(str, fit.sizes))
            lines.append(f"| {fit.name} | {sizes} | {costs} | {fit.law.exponent:.2f} ± {fit.law.error:.2f} |")
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    case, done = row.case, row.done
    counts = Counter(r.get("status", "refused") for r in row.records)
    quality, similarity = row.values("psnr"), row.values("ssim")
    if quality:
        s = spread_of(quality)
        cells = [f"{s.median:.1f} [{s.low:.1f}, {s.high:.1f}]", f"{s.mean:.1f}", f"{s.least:.1f}"]
    else:
        cells = ["-"] * 3
    cells.append(f"{statistics.median(similarity):.3f}, {min(similarity):.3f}" if similarity else "-")
    cells.append(", ".join(f"{n} {status}" for status, n in counts.most_common()))
    cells.append(str(sum(r["status"] == "exact" and r["psnr"] < WRONG_BELOW for r in done)))
    cells.append(f"{sum(bool(r.get('labels_right')) for r in done)} of {len(done)}")
    cells.append("-" if row.cpu_seconds is None else f"{row.cpu_seconds:.3g}")
    peers = published(case.model, case.attack, row.activation) if case.defense is None and case.batch == 1 else []
    cells.append("; ".join(f"{p.psnr} ({p.source})" for p in peers) or "-")
    named = [case.model, row.activation, row.client, row.attack, str(len(row.records))]
    return "| " + " | ".join([*named, *cells]) + " |"


class Fit(NamedTuple):
    """The cost of an image, in CPU seconds, at sizes of one kind, the others as in `suites.BASE`."""

    name: str
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    law: Exponent


def exponents(made: Sequence[Row]) -> list[Fit]:
    """The fits of plain nets' records, where at least three sizes of a kind are there."""
    points: dict[str, dict[int, float]] = {}
    for row in made:
        size, cost = plain_size(row.case.model), row.cpu_seconds
        if size is None or cost is None:
            continue
        if size == BASE and row.case.attack == "match":
            points.setdefault("batch size (match, an image)", {})[row.case.batch] = cost
        for k, name in enumerate(("image side", "width", "depth")):
            if row.case.batch == 1 and row.case.attack != "match" and _others(size, k) == _others(BASE, k):
                points.setdefault(f"{name} ({row.case.attack})", {})[size[k]] = cost
    fits = []
    for name, found in points.items():
        if len(found) >= 3:
            sizes, costs = zip(*sorted(found.items()), strict=True)
            fits.append(Fit(name, sizes, costs, fit_exponent(sizes, costs)))
    return fits


def _others(size: tuple[int, ...], k: int) -> tuple[int, ...]:
    return size[:k] + size[k + 1 :]
