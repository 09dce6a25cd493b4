"""The tables that commands print on standard error."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """One row a victim, then the layers of the first one."""
    title = f"{report['model']} ({report['activation'] or 'own'}), {report['attack']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for name in ("image", "label", "PSNR dB", "SSIM", "unseen", "residual", "certificate"):
        table.add_column(name, justify="right" if name not in ("certificate",) else "left")
    for k, example in enumerate(report["examples"]):
        certificate = example["certificate"]
        words = certificate["status"] + (f" at {certificate['layer']}" if certificate["layer"] else "")
        if certificate["status"] == "ambiguous":
            count = len(certificate["candidates"])
            words += f", {certificate['leaked_dimensions']}/{certificate['unknowns']} determined"
            words += f", {count} candidates" if count > 1 else ""
        table.add_row(
            str(k),
            str(example["label"]),
            _number(example["psnr"], ".1f"),
            _number(example["ssim"], ".4f"),
            str(example["unseen_pixels"]),
            _number(example["gradient_residual"], ".1e"),
            words,
        )
    console.print(table)
    layers = Table(
        title="layers of image 0, first to last",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
    )
    for name in ("layer", "unknowns", "rank", "missing", "condition", "residual", "steps", "status"):
        layers.add_column(name, justify="left" if name in ("layer", "status") else "right")
    for info in report["examples"][0]["layers"]:
        layers.add_row(
            info["name"],
            str(info["unknowns"]),
            _number(info["rank"], "d"),
            _number(None if info["rank_deficiency"] is None else -info["rank_deficiency"], "d"),
            _number(info["condition"], ".3g"),
            _number(info["residual"], ".1e"),
            str(info["steps"]),
            info["status"],
        )
    console.print(layers)
    seconds = "  ".join(f"{name} {value:.2f} s" for name, value in report["seconds"].items())
    console.print(seconds, style="dim", highlight=False)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
