"""The leakage map of an audit: `leakage_map.png`, and the same panels as images within a page."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from leakjax.files.whole import write_figure
from leakjax.report.audit.markup import integer, percent, png, text
from leakjax.report.audit.record import UNSEEN, AuditRecord
from leakjax.report.percentage import percentage

_COLORS = "cividis"
_SHOWN = 8
_COLUMNS = 4


def draw_map(path: Path | str, audit: AuditRecord) -> bool:
    """Write the leakage map as a PNG: a panel an example (at most eight), each pixel's mean over its channels.

    Arguments: `path`, where to; `audit`, whose `leakage_map` is drawn.
    Returns: whether there was a map; without one nothing is written.
    """
    if audit.leakage_map is None or not len(audit.leakage_map):
        return False
    panels = audit.leakage_map[:_SHOWN]
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(max(2.5 * columns, 3.3) + 0.9, 2.6 * rows + 0.8), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        scale = ScalarMappable(Normalize(0, 1), _COLORS)
        for k, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
            axis.imshow(panel.mean(axis=-1), norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
            axis.set_title(
                f"example {k} · {percentage(float(panel.mean()))} leaked\n{_unseen(panel):,} unseen pixels", fontsize=9
            )
        bar = figure.colorbar(scale, ax=axes, fraction=0.05, pad=0.03)
        bar.set_label("share that the gradient determines")
        figure.suptitle(_title(audit), fontsize=11, fontweight="bold")
        write_figure(path, figure, metadata={"Software": None})
    return True


def map_panels(held: Float[np.ndarray, "B H W C"], what: str = "") -> str:
    """A leakage map as HTML: images within the page, a caption each, and the scale of their colors.

    Arguments: `held`, the map; `what`, words for each caption.
    Returns: HTML, empty where the map is.
    """
    if not len(held):
        return ""
    panels = "\n".join(_panel(k, panel, what) for k, panel in enumerate(held[:_SHOWN]))
    scale = (
        f'<p class="scale"><span>0 unseen</span>'
        f'<img src="{_png(np.linspace(0, 1, 256)[None])}" alt="Color scale from 0, dark blue, to 1, yellow">'
        f"<span>1 determined</span></p>"
    )
    return f'<div class="maps">\n{panels}\n</div>\n{scale}'


def shown_panels(audit: AuditRecord) -> int:
    """How many examples' maps are drawn."""
    return 0 if audit.leakage_map is None else min(len(audit.leakage_map), _SHOWN)


def _panel(k: int, panel: np.ndarray, what: str) -> str:
    height, width = panel.shape[:2]
    unseen = _unseen(panel)
    said = f"Leakage map of example {k}{what and ' ' + what}, {height} by {width} pixels, {unseen} of them unseen"
    words = f"{percent(float(panel.mean()))} leaked, {integer(unseen)} of {integer(height * width)} pixels unseen"
    return (
        f'<figure><img src="{_png(panel.mean(axis=-1))}" width="{width}" height="{height}" alt="{text(said)}">'
        f"<figcaption>Example {k}{what and ' ' + text(what)}: {words}</figcaption></figure>"
    )


def _unseen(panel: np.ndarray) -> int:
    return int(np.sum(np.all(panel < UNSEEN, axis=-1)))


def _png(shares: np.ndarray) -> str:
    return png(mpl.colormaps[_COLORS](np.clip(shares, 0, 1), bytes=True)[..., :3])


def _title(audit: AuditRecord) -> str:
    held, shown = len(audit.leakage_map) if audit.leakage_map is not None else 0, shown_panels(audit)
    name = audit.model if len(audit.model) <= 40 else audit.model[:39] + "…"
    return f"Leakage map · {name}" + (f" · first {shown} of {held}" if held > shown else "")
