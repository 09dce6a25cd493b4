"""`figure.png`: original, reconstruction and error of each victim, each captioned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from leakjax.files.whole import write_figure

_COLORS = {"exact": "#cf222e", "approximate": "#bc4c00", "ambiguous": "#9a6700", "failed": "#57606a"}
_SHOWN = 8


def draw_figure(
    path: Path, report: Mapping[str, Any], images: np.ndarray, truth: np.ndarray | None, determined: np.ndarray
) -> None:
    """Draw up to eight victims, a row each.

    Arguments: `report`, the object of report.json; `images` (V, H, W, C) on a [0, 1] scale; `truth` likewise or None
    (then only the reconstruction and its leakage map are shown); `determined` (V, H, W, C).
    """
    rows = min(len(images), _SHOWN)
    columns = 3 if truth is not None else 2
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(2.7 * columns + 0.9, 2.85 * rows + 0.75), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        for k in range(rows):
            example = report["examples"][k]
            certificate = example["certificate"]["status"]
            label = f"label {example['label']} ({example['label_source']})"
            if truth is not None:
                _show(axes[k, 0], truth[k], "original")
                score = "PSNR unknown" if example["psnr"] is None else f"{example['psnr']:.1f} dB"
                _show(axes[k, 1], images[k], f"from the gradient\n{score}", label)
                _errors(figure, axes[k, 2], np.abs(truth[k] - images[k]).max(axis=-1))
            else:
                _show(axes[k, 0], images[k], "from the gradient", label)
                drawn = axes[k, 1].imshow(determined[k].mean(axis=-1), vmin=0, vmax=1, cmap="cividis")
                figure.colorbar(drawn, ax=axes[k, 1], fraction=0.046, pad=0.04)
                axes[k, 1].set_title("determined share")
                _bare(axes[k, 1])
            axes[k, columns - 1].set_xlabel(
                f"{certificate} · {example['unseen_pixels']} unseen pixels",
                color=_COLORS[certificate], fontweight="bold",
            )  # fmt: skip
        title = f"{report['model']} · {report['activation'] or 'own activation'} · {report['attack']}"
        if len(images) > rows:
            title += f" · first {rows} of {len(images)}"
        figure.suptitle(title, fontsize=11, fontweight="bold")
        write_figure(path, figure)


def _show(axis: Any, image: np.ndarray, title: str, below: str = "") -> None:
    clipped = np.clip(image, 0, 1)
    axis.imshow(clipped if clipped.shape[-1] == 3 else clipped.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title)
    axis.set_xlabel(below)
    _bare(axis)


def _errors(figure: Figure, axis: Any, error: np.ndarray) -> None:
    floor = max(float(error[error > 0].min()) if np.any(error > 0) else 1e-17, 1e-17)
    top = max(float(error.max()), 10 * floor)
    drawn = axis.imshow(np.maximum(error, floor), norm=LogNorm(floor, top), cmap="magma")
    bar = figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.04)
    bar.ax.yaxis.set_major_locator(LogLocator(numticks=5))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))  # text as it is, no TeX
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title("largest error of a channel")
    _bare(axis)


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
