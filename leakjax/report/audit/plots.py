"""The two plots of an audit's page: the spectrum, and what noise leaves an attacker."""

import math
from collections.abc import Iterator, Sequence

from leakjax.report.audit.chart import Axis, Series, chart, decades, linear
from leakjax.report.audit.markup import integer, real
from leakjax.report.audit.record import AuditRecord, NoisePoint

_DRAWN = 600
_FLOOR = 1e-18


def spectrum_plot(audit: AuditRecord) -> str:
    """The logarithms of the Jacobian's singular values against their index, the leaked dimensions marked.

    Arguments: `audit`, whose `spectrum` is drawn.
    Returns: HTML, a figure with its caption; empty where no singular value is positive.
    """
    values = [v for v in audit.spectrum or () if math.isfinite(v)]
    top = max(values, default=0.0)
    if top <= 0:
        return ""
    floor = min(v for v in values if v > _FLOOR * top)
    kept = _thinned(len(values))
    y = decades("singular value", [floor, top])
    points = [(k + 1.0, math.log10(max(values[k], floor))) for k in kept]
    mark = None
    if audit.leaked_dimensions is not None:
        mark = (float(audit.leaked_dimensions), f"{audit.leaked_dimensions:,} leaked dimensions")
    x = linear("index", 0, len(values))
    x = Axis(x.title, x.low, max(len(values), 1), tuple(t for t in x.ticks if t[0] <= max(len(values), 1)))
    drawn = chart("The singular values, largest first, on a logarithmic scale", x, y, [Series(points, "first")], mark)
    return f"<figure>{drawn}<figcaption>{_spectrum_words(audit, values, floor)}</figcaption></figure>"


def noise_plot(noise: Sequence[NoisePoint]) -> str:
    """The bound, and the estimate with a prior, against the noise.

    Arguments: `noise`, the points; those without noise have no place on the logarithmic axis.
    Returns: HTML, a figure with its caption; empty where nothing can be drawn.
    """
    shown = sorted((p for p in noise if p.sigma > 0), key=lambda p: p.sigma)
    bound = [(math.log10(p.sigma), _finite(p.psnr_bound)) for p in shown]
    prior = [(math.log10(p.sigma), _finite(p.psnr_estimate_prior)) for p in shown]
    heights = [v for _, v in (*bound, *prior) if v is not None]
    if not heights or len(shown) < 2:  # one dot says no more than the table
        return ""
    x = decades("noise σ in every gradient entry", [p.sigma for p in shown])
    y = linear("PSNR, dB", min(*heights, 0.0), max(*heights, 1.0))
    series = [Series(prior, "second", markers=True), Series(bound, "first", markers=True)]
    drawn = chart("PSNR against the noise; the table above holds the same numbers", x, y, series)
    legend = (
        '<span class="key first">unbiased attack, at most</span> '
        '<span class="key second">attack with a smoothness prior, estimate</span>'
    )
    return f'<figure>{drawn}<figcaption class="legend">{legend}</figcaption></figure>'


def _spectrum_words(audit: AuditRecord, values: Sequence[float], floor: float) -> str:
    words = f"{integer(len(values))} singular values, from {real(values[0])} down to {real(values[-1])}."
    rank = audit.leaked_dimensions
    if rank is not None and 0 < rank <= len(values):
        words += f" The last one that counts as leaked, number {integer(rank)}, is {real(values[rank - 1])}."
    below = sum(v < floor for v in values)
    if below:
        words += f" {integer(below)} of them, at or near zero, are drawn at the lowest value shown."
    return words


def _thinned(count: int) -> Iterator[int]:
    """At most `_DRAWN` indices of `count`, evenly spaced, first and last among them."""
    drawn = min(count, _DRAWN)
    return (round(k * (count - 1) / max(drawn - 1, 1)) for k in range(drawn))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
