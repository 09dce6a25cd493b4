"""`audit.html`: one page that loads nothing, for whoever decides whether a model is shipped to clients."""

import importlib.resources
import math

from leakjax.report.audit.glossary import glossary
from leakjax.report.audit.map import draw_map
from leakjax.report.audit.markup import definitions, integer, name, paragraph, percent, real, section, text
from leakjax.report.audit.pictures import pictures_section
from leakjax.report.audit.record import AuditRecord
from leakjax.report.audit.sections import (
    changes_section,
    layers_section,
    map_section,
    noise_section,
    parts_of,
    shapes_only,
    spectrum_section,
    withheld_section,
)
from leakjax.version import __version__

__all__ = ["draw_map", "draw_page"]

_VERDICTS = {
    "exact": (
        "Exact: the image comes back to machine precision",
        "Whoever sees one such gradient can rebuild the image that it was computed from.",
        '<path d="M8 2h8l6 6v8l-6 6H8l-6-6V8z"/><path d="M12 7v6M12 16.5v.5"/>',
    ),
    "partial": (
        "Partial: a part of the image comes back",
        "Whoever sees one such gradient has that part; the rest is left to a guess, and a good prior guesses well.",
        '<path d="M12 3 22 20H2z"/><path d="M12 9.5v5M12 17v.5"/>',
    ),
    "limited": (
        "Limited: few numbers of the image come back",
        "Few numbers can still be a thumbnail that people recognize, and labels, or many updates together, tell more.",
        '<path d="M12 3 22 20H2z"/><path d="M12 9.5v5M12 17v.5"/>',
    ),
    "unknown": (
        "Unknown: nothing sound can be said of what leaks",
        "Take it for a leak: that none was counted is no sign that there is none.",
        '<circle cx="12" cy="12" r="10"/><path d="M9 9.5a3 3 0 1 1 3.6 2.9q-.6.2-.6 1.6M12 16.8v.5"/>',
    ),
}


def draw_page(audit: AuditRecord) -> str:
    """The page of an audit, whole: style, images and plots are within it, and it needs no script.

    Arguments: `audit`; what it leaves out (None) is named as not computed, or left out.
    Returns: an HTML document.
    """
    style = importlib.resources.files("leakjax.report.audit").joinpath("audit.css").read_text(encoding="utf-8")
    shape = "\u202f×\u202f".join(str(n) for n in audit.input_shape)
    main = (
        _verdict(audit), _key_numbers(audit), pictures_section(audit), changes_section(audit), map_section(audit),
        layers_section(audit), spectrum_section(audit), noise_section(audit), withheld_section(audit), _left_out(audit),
        _remarks(audit), _provenance(audit), glossary(),
    )  # fmt: skip
    body = "\n".join(filter(None, main))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="leakjax {text(__version__)}">
<title>Leakage audit: {text(audit.model)}, input {shape}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<p class="kicker">Leakage audit</p>
<h1>{name(audit.model)}</h1>
<p>Input {shape} · {_examples(audit)} · {integer(audit.unknowns)} unknowns</p>
</header>
<main>
{body}
</main>
<footer><p>Written by leakjax {text(__version__)}</p></footer>
</body>
</html>
"""


def _left_out(audit: AuditRecord) -> str:
    """One line for all sections that have nothing to show. Returns HTML, empty where none is missing."""
    missing = [title for title, there in parts_of(audit).items() if not there]
    if not missing:
        return ""
    why = "shapes only" if shapes_only(audit) else "no derivative sees through what the verdict names"
    if not shapes_only(audit) and not audit.blind:
        why = "not asked for, or too large; see the remarks"
    return section("left-out", "Not computed", paragraph(f"{text(', '.join(missing))} ({why})."))


def _examples(audit: AuditRecord) -> str:
    return f"{integer(audit.examples)} example" + ("" if audit.examples == 1 else "s") + " a gradient"


def _verdict(audit: AuditRecord) -> str:
    title, meaning, icon = _VERDICTS.get(
        audit.verdict, (f"Verdict: {audit.verdict}", "", '<circle cx="12" cy="12" r="10"/>')
    )
    if shapes_only(audit):
        meaning += " Judged by shapes alone, which bound the leak from above."
    kind = audit.verdict if audit.verdict in _VERDICTS else "other"
    return (
        f'<section class="verdict {kind}" aria-labelledby="verdict-title">\n'
        f'<svg viewBox="0 0 24 24" width="36" height="36" aria-hidden="true">{icon}</svg>\n'
        f'<div>\n<h2 id="verdict-title">{text(title)}</h2>\n{paragraph(text(audit.sentence), "reason")}\n'
        f"{paragraph(text(meaning)) if meaning else ''}\n</div>\n</section>"
    )


def _key_numbers(audit: AuditRecord) -> str:
    unseen = "Not computed (shapes only)." if shapes_only(audit) else "Not computed."
    if audit.unseen_pixels is not None:
        unseen = f"{_figure(integer(audit.unseen_pixels))} {_positions(audit)} The gradient sees them in no channel."
    rounded = f"{integer(audit.c_m_rounded)} rounded layer by layer."
    index = (
        f"{_figure(real(audit.c_m + 0.0, 7))} {rounded} 0 means that every layer is determined. "
        "<strong>Negative does not mean safe:</strong> the layers before, or a prior, may close what one leaves open."
    )
    numbers = (("Leaked dimensions", _leaked(audit)), ("Unseen pixels", unseen), ("Index c(M)", index))
    return section("numbers", "Key numbers", definitions(numbers, "numbers"))


def _leaked(audit: AuditRecord) -> str:
    of = f"of {integer(audit.unknowns)} unknowns"
    structural = integer(audit.structural_leaked_dimensions)
    if audit.leaked_dimensions is None:
        share = percent(audit.structural_leaked_dimensions / audit.unknowns if audit.unknowns else None)
        bound = "<strong>An upper bound from shapes</strong>, not a measurement."
        return f"{_figure(f'≤ {structural}')} {of}, {share}. {bound}"
    fraction = audit.leaked_fraction
    if fraction is None and audit.unknowns:
        fraction = audit.leaked_dimensions / audit.unknowns
    return (
        f"{_figure(integer(audit.leaked_dimensions))} {of}, {percent(fraction)}. The shapes allow at most {structural}."
    )


def _positions(audit: AuditRecord) -> str:
    if audit.leakage_map is None:
        return ""
    return f"of {integer(math.prod(audit.leakage_map.shape[:3]))} positions."


def _figure(number: str) -> str:
    return f'<span class="figure">{number}</span>'


def _provenance(audit: AuditRecord) -> str:
    """What ties the page to a model, images and a run. Returns HTML, empty where nothing is known of it."""
    version = None if audit.leakjax is None else f"leakjax {audit.leakjax}"
    held = (("Made by", version), ("Date", audit.date), ("Device", audit.device), ("Loss", audit.loss),
            ("Seed", audit.seed), ("Images", audit.data), ("Weights", audit.weights))  # fmt: skip
    known = [(title, name(value)) for title, value in held if value is not None]
    return section("provenance", "Where this comes from", definitions(known, "pairs")) if known else ""


def _remarks(audit: AuditRecord) -> str:
    if not audit.remarks:
        return ""
    return section("remarks", "Remarks", "<ul>", *(f"<li>{text(remark)}</li>" for remark in audit.remarks), "</ul>")
