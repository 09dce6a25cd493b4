"""The pictures of a suite, from the rows of its table; Okabe and Ito's colors, which nearly all eyes tell apart."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.statistics import spread_of
from benchmarks.summary import Row, exponents
from leakjax.files.whole import write_figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "os^Dv<>"


def write_plots(made: Sequence[Row], directory: Path, title: str) -> list[Path]:
    """Draw what there is to draw; the files written."""
    written = []
    if any(row.values("psnr") for row in made):
        written.append(directory / "psnr.png")
        _save(_strips(made, title), written[-1])
    if exponents(made):
        written.append(directory / "scaling.png")
        _save(_scaling(made), written[-1])
    return written


def _save(figure: Figure, path: Path) -> None:
    write_figure(path, figure, dpi=150, bbox_inches="tight")


def _strips(made: Sequence[Row], title: str) -> Figure:
    """A line a row: every image a dot, the median a bar, its interval a thick line; a color and mark an attack."""
    drawn = [row for row in made if row.values("psnr")]
    attacks = list(dict.fromkeys(row.case.attack for row in drawn))
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(drawn)))
    axes: Axes = figure.subplots()
    for y, row in enumerate(drawn):
        values, look = row.values("psnr"), attacks.index(row.case.attack) % len(COLORS)
        s = spread_of(values)
        axes.plot([s.low, s.high], [y, y], color=COLORS[look], linewidth=5, alpha=0.3, solid_capstyle="butt")
        axes.plot(values, [y] * len(values), MARKS[look], color=COLORS[look], markersize=4, alpha=0.6, mew=0)
        axes.plot([s.median] * 2, [y - 0.35, y + 0.35], color="black", linewidth=1.5)
    axes.set_yticks(range(len(drawn)), [_name(row) for row in drawn], fontsize=8)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel("PSNR, dB (every image a mark; black: median; band: its 95 % interval)")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return figure


def _name(row: Row) -> str:
    words = [row.case.model, row.activation, row.attack]
    return ", ".join([*words, *([] if row.client == "-" else [row.client])])


def _scaling(made: Sequence[Row]) -> Figure:
    """CPU seconds of an image against size, both axes logarithmic, with the fitted powers."""
    fits = exponents(made)
    figure = Figure(figsize=(3.2 * len(fits), 3.2))
    for k, (axes, fit) in enumerate(zip(figure.subplots(1, len(fits), squeeze=False)[0], fits, strict=True)):
        color = COLORS[k % len(COLORS)]
        axes.loglog(fit.sizes, fit.costs, MARKS[k % len(MARKS)], color=color)
        ends = fit.sizes[0], fit.sizes[-1]
        axes.loglog(ends, [fit.law.factor * size**fit.law.exponent for size in ends], color=color, linewidth=1)
        axes.set_title(f"exponent {fit.law.exponent:.2f} ± {fit.law.error:.2f}", fontsize=9)
        axes.set_xlabel(fit.name, fontsize=8)
        axes.set_xticks(fit.sizes, map(str, fit.sizes), fontsize=8)
        axes.set_xticks([], minor=True)
        if k == 0:
            axes.set_ylabel("CPU s an image")
    figure.tight_layout()
    return figure
