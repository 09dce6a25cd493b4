"""A chart as inline SVG that stretches with the page: its curves scale, its text and strokes do not.

The box inside the padding that the style sheet gives to `.chart` is the plot; positions in it are percentages, so the
same markup serves a phone and a wide screen, and colors are the style sheet's.
"""

import dataclasses
import math
from collections.abc import Sequence

from leakjax.report.audit.markup import power_of_ten, text

_SCALE = 1000


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range with its `ticks` (value, label); values are logarithms where the axis is logarithmic."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def part(self, value: float) -> float:
        """Where a value lies between `low` (0) and `high` (1), clipped."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)


@dataclasses.dataclass(frozen=True)
class Series:
    """A line through `points` (x, y), a y of None being a gap; `kind` is its class, "first" or "second"."""

    points: Sequence[tuple[float, float | None]]
    kind: str
    markers: bool = False


def decades(title: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis over positive values: whole powers of ten, at most eight ticks."""
    low = math.floor(math.log10(min(values)) + 1e-9)
    high = max(math.ceil(math.log10(max(values)) - 1e-9), low + 1)
    step = math.ceil((high - low) / 7)
    return Axis(title, low, high, tuple((k, power_of_ten(k)) for k in range(low, high + 1, step)))


def linear(title: str, low: float, high: float) -> Axis:
    """A linear axis from `low` to `high` at least: steps of 1, 2 or 5 times a power of ten, at most seven ticks."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 6))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= span / 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    labels = ((k * step, f"{k * step:,.10g}".replace("-", "−")) for k in range(first, last + 1))
    return Axis(title, first * step, last * step, tuple(labels))


def chart(label: str, x: Axis, y: Axis, series: Sequence[Series], mark: tuple[float, str] | None = None) -> str:
    """The SVG of some series.

    Arguments: `label`, what a screen reader says of it; `x`, `y`, the axes; `series`, in the axes' values; `mark`, an x
    and the words beside a vertical line there.
    """
    lines = "".join(_line(s, x, y) for s in series)
    markers = "".join(_markers(s, x, y) for s in series if s.markers)
    return (
        f'<svg class="chart" role="img" aria-label="{text(label)}">{_grid(x, y)}{_mark(mark, x)}'
        f'<svg viewBox="0 0 {_SCALE} {_SCALE}" preserveAspectRatio="none" width="100%" height="100%">{lines}</svg>'
        f"{markers}{_words(mark, x)}</svg>"
    )


def _grid(x: Axis, y: Axis) -> str:
    across = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
        f'<text x="-8" y="{at}" dy="4" text-anchor="end">{label}</text>'
        for at, label in ((_share(1 - y.part(value)), label) for value, label in y.ticks)
    )
    up = "".join(
        f'<text x="{at}" y="100%" dy="18" text-anchor="middle">{label}</text>'
        for at, label in ((_share(x.part(value)), label) for value, label in x.ticks)
    )
    titles = (
        f'<text class="title" x="-48" y="0" dy="-14">{text(y.title)}</text>'
        f'<text class="title" x="100%" y="100%" dy="38" text-anchor="end">{text(x.title)}</text>'
    )
    return across + up + titles


def _line(series: Series, x: Axis, y: Axis) -> str:
    runs: list[list[str]] = [[]]
    for across, up in series.points:
        if up is None:
            runs.append([])
        else:
            runs[-1].append(f"{_SCALE * x.part(across):.5g},{_SCALE * (1 - y.part(up)):.5g}")
    return "".join(f'<polyline class="{series.kind}" points="{" ".join(run)}"/>' for run in runs if len(run) > 1)


def _markers(series: Series, x: Axis, y: Axis) -> str:
    places = [(_share(x.part(a)), _share(1 - y.part(b))) for a, b in series.points if b is not None]
    if series.kind == "first":
        return "".join(f'<circle class="first" cx="{a}" cy="{b}" r="4"/>' for a, b in places)
    square = 'width="7" height="7" transform="translate(-3.5 -3.5)"'
    return "".join(f'<rect class="second" x="{a}" y="{b}" {square}/>' for a, b in places)


def _mark(mark: tuple[float, str] | None, x: Axis) -> str:
    at = "" if mark is None else _share(x.part(mark[0]))
    return at and f'<line class="mark" x1="{at}" x2="{at}" y1="0" y2="100%"/>'


def _words(mark: tuple[float, str] | None, x: Axis) -> str:
    if mark is None:
        return ""
    part = x.part(mark[0])
    anchor, shift = ("end", -8) if part > 0.5 else ("start", 8)
    place = f'x="{_share(part)}" y="70%" dx="{shift}" text-anchor="{anchor}"'
    return f'<text class="note" {place}>{text(mark[1])}</text>'


def _share(part: float) -> str:
    return f"{100 * part:.5g}%"
