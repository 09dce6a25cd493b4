"""The tables that commands print on standard error."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from leakjax.report.names import shortened


def print_report(console: Console, report: Mapping[str, Any]) -> None:
    """One row a victim, then the layers of the first one."""
    title = f"{report['model']} ({report['activation'] or 'own'}), {report['attack']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for name in ("image", "label", "PSNR dB", "SSIM", "unseen", "residual", "certificate"):
        table.add_column(name, justify="right" if name not in ("certificate",) else "left")
    for k, example in enumerate(report["examples"]):
        certificate = example["certificate"]
        words = _certificate(certificate)
        if example["gradient_scale"] is None:
            words += ", times a factor that is not known"
        elif example["gradient_scale"] != 1:
            words += f", gradient times {example['gradient_scale']:.4g}"
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
    _reasons(console, report["examples"])
    for remark in report["remarks"]:
        console.print(f"note: {remark}", highlight=False, markup=False)
    layers = Table(
        title="layers of image 0, first to last",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
    )
    for name in ("layer", "unknowns", "rank", "missing", "condition", "residual", "solver", "status"):
        layers.add_column(name, justify="left" if name in ("layer", "solver", "status") else "right")
    infos = report["examples"][0]["layers"]
    for name, info in zip(shortened([info["name"] for info in infos]), infos, strict=True):
        layers.add_row(
            name,
            str(info["unknowns"]),
            _number(info["rank"], "d"),
            _number(None if info["rank_deficiency"] is None else -info["rank_deficiency"], "d"),
            _number(info["condition"], ".3g"),
            _number(info["residual"], ".1e"),
            f"{info['solver']} {info['steps'] or ''}".rstrip(),
            info["status"],
        )
    console.print(layers)
    seconds = "  ".join(f"{name} {value:.2f} s" for name, value in report["seconds"].items())
    console.print(seconds, style="dim", highlight=False)


def _reasons(console: Console, examples: Sequence[Mapping[str, Any]]) -> None:
    """Each reason once, with the images it is said of."""
    reasons: dict[str, list[int]] = {}
    for k, example in enumerate(examples):
        if example["certificate"]["reason"]:
            reasons.setdefault(example["certificate"]["reason"], []).append(k)
    for reason, images in reasons.items():
        listed = ", ".join(map(str, images[:8])) + (", .." if len(images) > 8 else "")
        console.print(f"image {listed}: {reason}", highlight=False, markup=False)


def _certificate(certificate: Mapping[str, Any]) -> str:
    status = certificate["status"]
    if status == "exact":
        return f"exact ({certificate['proof']})"
    if status == "approximate":
        return f"approximate, about {certificate['psnr_estimate']:.0f} dB"
    if status == "failed":
        return f"failed at {certificate['layer']}" if certificate["layer"] else "failed"
    words = f"ambiguous, {certificate['leaked_dimensions']}/{certificate['unknowns']} determined"
    count = len(certificate["candidates"])
    words += f", {count} candidates" if count > 1 else ""
    return words + (f" ({certificate['symmetry']})" if certificate["symmetry"] else "")


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
