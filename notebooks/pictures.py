"""Panels for the notebooks: photos, maps with a color scale, error pictures. Drawing only."""

import logging
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

logging.getLogger("absl").setLevel("ERROR")  # tensorflow-datasets says which image decoder it prefers

plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "figure.dpi": 100})

SIDE = 1.65  # inches of a panel


def halved(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C) of half the height and width: the mean of every 2 x 2 pixels."""
    n, height, width, channels = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def photos(panels: Sequence[tuple[np.ndarray, str]], columns: int = 6, side: float = SIDE) -> None:
    """Show (image (H, W, C) on a [0, 1] scale, title) panels, `columns` in a row."""
    for axis, (image, title) in zip(_axes(len(panels), columns, side)[1], panels, strict=False):
        shown = np.clip(image, 0, 1)
        axis.imshow(shown if shown.shape[-1] == 3 else shown.mean(-1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
    plt.show()


def maps(
    panels: Sequence[tuple[np.ndarray, str]],
    label: str,
    limits: tuple[float, float] = (0.0, 1.0),
    colors: str = "cividis",
    log: bool = False,
    columns: int = 6,
    side: float = SIDE,
) -> None:
    """Show (array (H, W), title) panels on one color scale, named `label`."""
    figure, axes = _axes(len(panels), columns, side, extra=0.75)
    scale = {"norm": LogNorm(*limits)} if log else {"vmin": limits[0], "vmax": limits[1]}
    for axis, (values, title) in zip(axes, panels, strict=False):
        shown = np.maximum(values, limits[0]) if log else values
        drawn = axis.imshow(shown, cmap=colors, interpolation="nearest", **scale)
        axis.set_title(title)
    figure.colorbar(drawn, ax=list(axes), fraction=0.05, pad=0.02, label=label)
    plt.show()


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, columns aligned."""
    lines = [[_text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        first, *rest = line
        print(
            "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]).rstrip()
        )


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _axes(count: int, columns: int, side: float, extra: float = 0.0) -> tuple[Any, list[Any]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    size = (columns * side + extra, rows * (side + 0.32))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", dpi=100, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, list(axes.flat)
