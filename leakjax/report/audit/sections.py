"""The sections of an audit's page below its key numbers, each empty or a sentence where there is nothing to say."""

from collections.abc import Sequence

import numpy as np

from leakjax.report.audit.map import map_panels, shown_panels
from leakjax.report.audit.markup import (
    at_most,
    definitions,
    integer,
    name,
    paragraph,
    percent,
    real,
    section,
    table,
    text,
)
from leakjax.report.audit.plots import noise_plot, spectrum_plot
from leakjax.report.audit.record import AuditRecord, LayerAudit, NoisePoint, Withheld

_LAYER_COLUMNS = (
    "Layer", "Unknowns", "Rank", "Deficiency", "Structural rank", "Condition", "Dead pixels", "Weight in c(M)",
    "Known share", "Pull-back depth", "Parameters",
)  # fmt: skip
_PADDED_COLUMNS = "Layer", "Rows", "Columns", "Rank", "Columns left open"
_DP_COLUMNS: tuple[tuple[str, str], ...] = (
    ("epsilon", "ε"), ("delta", "δ"), ("noise_multiplier", "Noise multiplier"), ("clip", "Clip"),
)  # fmt: skip
_OPEN = "open"


def shapes_only(audit: AuditRecord) -> bool:
    """Whether nothing numeric was asked for: the audit knows shapes alone."""
    unmeasured = audit.leaked_dimensions is None and all(layer.rank is None for layer in audit.layers)
    return unmeasured and not audit.blind and audit.verdict != "unknown"


def parts_of(audit: AuditRecord) -> dict[str, bool]:
    """By title, whether a section has something to show."""
    shown = bool(audit.leakage_map is not None and len(audit.leakage_map))
    return {"Leakage map": shown, "Spectrum": bool(audit.spectrum), "Noise": bool(audit.noise)}


def layers_section(audit: AuditRecord) -> str:
    """Every layer's numbers, first to last, and its sentence. Returns HTML."""
    rows = [_layer_row(layer) for layer in audit.layers]
    padded = [_padded_row(layer) for layer in audit.layers]
    note = "A dash: not computed." if any(layer.rank is None for layer in audit.layers) else ""
    sentences = definitions([(layer.name, text(layer.sentence)) for layer in audit.layers], "pairs")
    return section(
        "layers",
        "Layer by layer",
        table("Layers, first to last", _LAYER_COLUMNS, rows, note=note),
        sentences,
        table("The same systems as R-GAP counts them, padding among the unknowns", _PADDED_COLUMNS, padded),
    )


def map_section(audit: AuditRecord) -> str:
    """The leakage map, a panel an example. Returns HTML."""
    panels = "" if audit.leakage_map is None else map_panels(audit.leakage_map)
    if not panels:
        return ""
    held, shown = len(audit.leakage_map) if audit.leakage_map is not None else 0, shown_panels(audit)
    words = "How much of each pixel the gradient determines, mean over channels: bright pixels leak, dark ones do not."
    if held > shown:
        words += f" The first {shown} of {held} examples."
    return section("map", "Leakage map", paragraph(words), panels)


def spectrum_section(audit: AuditRecord) -> str:
    """The singular values of the gradient's Jacobian. Returns HTML."""
    if not audit.spectrum:
        return ""
    words = (
        "How strongly the gradient responds to each direction of the image, strongest first. Directions after the drop "
        "leave no trace; a long slope above it means that little noise already hides the weaker ones."
    )
    plot = spectrum_plot(audit) or paragraph("Every singular value is zero: the gradient does not depend on the image.")
    return section("spectrum", "Spectrum", paragraph(words), plot)


def noise_section(audit: AuditRecord) -> str:
    """What noise in the gradient leaves an attacker. Returns HTML."""
    if not audit.noise:
        return ""
    words = (
        "How good an image can become when noise is added to every entry of the gradient. Higher PSNR is a better "
        "image; on photos a mid-grey guess scores about 10 to 15 dB."
    )
    plain = [point for point in audit.noise if point.noise_multiplier is None]
    private = [point for point in audit.noise if point.noise_multiplier is not None]
    parts = [*_noise_parts("Noise and the image it leaves", plain, audit), _uncertainty(audit)] if plain else []
    if private:
        parts.append(paragraph("After the gradient of each example is clipped, as DP-SGD does:"))
        parts += _noise_parts("DP-SGD and the image it leaves", private, audit)
    return section("noise", "Noise", paragraph(words), *parts)


def _noise_parts(title: str, points: Sequence[NoisePoint], audit: AuditRecord) -> list[str]:
    """A table of points and their plot."""
    known = [(f, name) for f, name in _DP_COLUMNS if any(getattr(p, f) is not None for p in points)]
    columns = ["Noise σ", *(name for _, name in known), "PSNR bound, dB", "PSNR with prior, dB"]
    here = any(p.psnr_at_image is not None for p in points)
    columns += ["PSNR at this image, dB"] * here + ["Effective dimensions"]
    measured = audit.leaked_dimensions is not None
    rows = [_noise_row(point, [field for field, _ in known], measured, here) for point in points]
    note = "“open”: the image is not determined, an unbiased attack has no finite error."
    shown = note if measured and any(p.psnr_bound is None for p in points) else ""
    return [table(title, columns, rows, note=shown), noise_plot(points)]


def changes_section(audit: AuditRecord) -> str:
    """Changes of one layer and what they cost. Returns HTML, empty where there are none."""
    if not audit.changes:
        return ""
    now = audit.structural_leaked_dimensions
    rows = [
        (
            name(c.layer),
            text(c.change),
            *_after(c.leaked_dimensions, now, audit, bound=True),
            integer(c.parameters, signed=True),
        )
        for c in audit.changes
    ]
    columns = ("Layer", "Change", "Leaked dimensions after it", "Share", "Difference", "Parameters it costs")
    words = f"Each change alone, judged by shapes, against the at most {integer(now)} dimensions that they allow now."
    return section(
        "changes", "What would help", paragraph(words), table("Changes of one layer", columns, rows, words=(0, 1))
    )


def withheld_section(audit: AuditRecord) -> str:
    """Which layers' gradients to keep back. Returns HTML, empty where nothing is known of it."""
    if not audit.withheld:
        return ""
    now = audit.structural_leaked_dimensions if audit.leaked_dimensions is None else audit.leaked_dimensions
    rows = [
        (
            text(", ".join(w.layers)) or "none",
            *_after(_remaining(w), now, audit, bound=w.measured_dimensions is None),
        )
        for w in audit.withheld
    ]
    columns = ("Layers not sent", "Leaked dimensions", "Share", "Difference")
    most = "at most " if audit.leaked_dimensions is None else ""
    words = f"What still leaks when the gradients of these layers stay on the client, against {most}{integer(now)} now."
    panels = [map_panels(w.leakage_map, "without them") for w in audit.withheld if w.leakage_map is not None]
    after = paragraph("What the gradient then still determines of each pixel:") if panels else ""
    parts = paragraph(words), table("Gradients withheld", columns, rows), after, *panels
    return section("withheld", "Which gradients to withhold", *parts)


def _remaining(held: Withheld) -> int:
    return held.leaked_dimensions if held.measured_dimensions is None else held.measured_dimensions


def _layer_row(layer: LayerAudit) -> tuple[str, ...]:
    bound = integer(layer.structural_rank)
    depth = _OPEN if layer.pull_back_depth is None and layer.rank is not None else integer(layer.pull_back_depth)
    return (
        name(layer.name),
        integer(layer.unknowns),
        integer(layer.rank),
        integer(layer.rank_deficiency),
        bound if layer.structural_exact and layer.rank == layer.structural_rank else at_most(bound),
        real(layer.condition),
        integer(layer.dead_pixels),
        real(layer.weight),
        percent(layer.known_share),
        depth,
        integer(layer.parameters),
    )


def _padded_row(layer: LayerAudit) -> tuple[str, ...]:
    rows, columns, rank, missing = map(integer, (*layer.padded, layer.padded.missing))
    if layer.rank is None:
        rank, missing = at_most(rank), f"≥ {missing} <small>bound</small>"
    return name(layer.name), rows, columns, rank, missing


def _noise_row(point: NoisePoint, private: list[str], measured: bool, here: bool) -> tuple[str, ...]:
    bound = _OPEN if point.psnr_bound is None and measured else _decibels(point.psnr_bound)
    prior = _decibels(point.psnr_estimate_prior)
    rest = (real(getattr(point, field)) for field in private)
    error = point.effective_dimensions_error
    dimensions = real(point.effective_dimensions, 4) + ("" if error is None else f" ± {real(error, 2)}")
    image = [_decibels(point.psnr_at_image)] if here else []
    return real(point.sigma), *rest, bound, prior, *image, dimensions


def _decibels(value: float | None) -> str:
    return real(value, 4) if value is None or not np.isfinite(value) else f"{value:.1f}".replace("-", "−")


def _after(dimensions: int, now: int, audit: AuditRecord, bound: bool) -> tuple[str, str, str]:
    share = percent(dimensions / audit.unknowns if audit.unknowns else None)
    shown = integer(dimensions)
    return at_most(shown) if bound else shown, share, integer(dimensions - now, signed=True)


def _uncertainty(audit: AuditRecord) -> str:
    if audit.uncertainty is None or not audit.noise or not audit.uncertainty.size:
        return ""
    known = audit.uncertainty[np.isfinite(audit.uncertainty)]
    middle = f"the median value to ± {real(float(np.median(known)))} (pixels in 0 to 1)" if known.size else "no value"
    return paragraph(
        f"At the first level, σ = {real(audit.noise[0].sigma)}, an unbiased attack determines {middle}; "
        f"{percent(1 - known.size / audit.uncertainty.size)} of the values stay open altogether."
    )
