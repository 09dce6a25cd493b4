"""An audit on a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leakjax.report.audit.record import AuditRecord, NoisePoint
from leakjax.report.names import shortened


def print_audit(console: Console, audit: AuditRecord) -> None:
    """The verdict, a row for every layer, what noise leaves and what would help."""
    console.print(Text.assemble((audit.verdict, "bold"), f": {audit.sentence}"))
    leaked = audit.leaked_dimensions
    shown = f"at most {audit.structural_leaked_dimensions:,}" if leaked is None else f"{leaked:,}"
    console.print(f"leaked dimensions {shown} of {audit.unknowns:,}; c(M) {audit.c_m:.2f}", highlight=False)
    table = Table("layer", title="layers", title_justify="left")
    for column in ("unknowns", "rank", "by shapes", "condition", "dead", "weight", "pull-back"):
        table.add_column(column, justify="right")
    for name, layer in zip(shortened([layer.name for layer in audit.layers]), audit.layers, strict=True):
        table.add_row(
            name,
            f"{layer.unknowns:,}",
            "-" if layer.rank is None else f"{layer.rank:,}",
            ("" if layer.rank == layer.structural_rank else "<= ") + f"{layer.structural_rank:,}",
            "-" if layer.condition is None else f"{layer.condition:.1e}",
            str(layer.dead_pixels),
            f"{layer.weight:.2f}",
            "-" if layer.pull_back_depth is None else str(layer.pull_back_depth),
        )
    console.print(table)
    for point in audit.noise or ():
        console.print(f"noise {point.sigma:g}: {_bounds(point, leaked)}{_private(point)}", highlight=False)
    for change in audit.changes[:3]:
        console.print(
            f"{change.layer}: {change.change} leaves at most {change.leaked_dimensions:,} "
            f"({change.parameters:+,} weights)",
            highlight=False,
            markup=False,
        )
    for held in audit.withheld:
        measured = held.measured_dimensions
        left = f"at most {held.leaked_dimensions:,}" if measured is None else f"{measured:,}"
        console.print(f"without the gradients of {', '.join(held.layers)}: {left}", highlight=False, markup=False)
    for remark in audit.remarks:
        console.print(f"note: {remark}", highlight=False, markup=False)


def _bounds(point: NoisePoint, leaked: int | None) -> str:
    if leaked is None:
        error = point.effective_dimensions_error
        spread = "" if error is None else f" +- {error:,.0f}"
        return f"{point.effective_dimensions:,.0f}{spread} effective dimensions"
    bound = "undetermined" if point.psnr_bound is None else f"{point.psnr_bound:.1f} dB unbiased"
    bound += "" if point.psnr_estimate_prior is None else f", {point.psnr_estimate_prior:.1f} dB with a prior"
    return bound + ("" if point.psnr_at_image is None else f", {point.psnr_at_image:.1f} dB at this image")


def _private(point: NoisePoint) -> str:
    if point.noise_multiplier is None:
        return ""
    return f" (DP-SGD, multiplier {point.noise_multiplier:g}, epsilon {point.epsilon:.3g} at delta {point.delta:g})"
