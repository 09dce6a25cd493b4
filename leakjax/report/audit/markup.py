"""Small pieces of HTML: text that is escaped, numbers that are readable, tables that scroll, sections with a name.

Every value becomes text through `text` or `name`, as an autoescaping template would have it; the test of the page puts
markup into every name that a user chooses. A template engine would be a dependency more for pages that are mostly
numbers, of which each kind has a function here.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from leakjax.report.percentage import percentage

MISSING = '<span aria-hidden="true">–</span><span class="spoken">no value</span>'
_LONG = 24
_THIN = "\N{NARROW NO-BREAK SPACE}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(value: object) -> str:
    """Anything as text of a page: escaped, quotes included."""
    return html.escape(str(value), quote=True)


def name(value: object) -> str:
    """A name as text of a page, which a long one lets break after its separators."""
    shown = text(value)
    return re.sub(r"([._:/]+)", r"\1<wbr>", shown) if len(shown) > _LONG else shown


def at_most(number: str) -> str:
    """A number (HTML) that is a bound from above, and never printed as what it bounds."""
    return f"≤ {number} <small>bound</small>"


def integer(value: int | None, signed: bool = False) -> str:
    """A whole number with separated thousands and a true minus sign.

    Arguments: `value`, None where it was not computed; `signed`, whether a positive number carries a plus sign.
    Returns: HTML; where it reads differently from the bare number, a `data` element holds that for machines.
    """
    if value is None:
        return MISSING
    shown = format(value, "+,d" if signed and value else ",d").replace("-", "−")
    return _data(str(value), shown)


def real(value: float | None, digits: int = 3) -> str:
    """A real number to some significant digits, as a power of ten where it is large or small.

    Arguments: `value`, None where it was not computed (NaN says the same); `digits`, at least 1.
    Returns: HTML, the full number in a `data` element.
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 10**6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        head = "" if mantissa == "1" else "−" if mantissa == "-1" else f"{mantissa}{_THIN}×{_THIN}"
        shown = f"{head}10<sup>{int(exponent):d}</sup>"
    else:
        places = max(digits - 1 - (math.floor(math.log10(abs(value))) if value else 0), 0)
        shown = f"{value:,.{places}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return _data(repr(float(value)), shown.replace("-", "−"))


def percent(fraction: float | None) -> str:
    """A share as a percentage; what is not quite all, or not quite nothing, never rounds to it."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return text(percentage(fraction)).replace(" ", _THIN)


def power_of_ten(exponent: int) -> str:
    """10 to a whole power, in plain characters (for a plot's axis)."""
    return "1" if exponent == 0 else "10" + str(exponent).translate(_SUPERSCRIPT)


def section(key: str, title: str, *body: str) -> str:
    """A section with a heading of the second level.

    Arguments: `key`, its id; `title`, plain text; `body`, HTML, one piece a line.
    """
    inner = "\n".join(filter(None, body))
    heading = f'<h2 id="{key}-title">{text(title)}</h2>'
    return f'<section id="{key}" aria-labelledby="{key}-title">\n{heading}\n{inner}\n</section>'


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of HTML, with a class where one is named."""
    return f'<p class="{kind}">{words}</p>' if kind else f"<p>{words}</p>"


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,), note: str = ""
) -> str:
    """A table in a container that scrolls by itself and can be reached by the keyboard.

    Arguments: `caption` and `columns`, plain text; `rows`, cells of HTML, the first of which names its row; `words`,
    the columns that hold words (aligned left), not numbers; `note`, plain text below the table.
    """
    heads = "".join(f'<th scope="col"{_words(k, words)}>{text(column)}</th>' for k, column in enumerate(columns))
    body = "\n".join(f"<tr>{_row(row, words)}</tr>" for row in rows)
    below = f'\n<p class="below">{text(note)}</p>' if note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">\n<table>\n'
        f"<caption><span>{text(caption)}</span></caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>{below}"
    )


def definitions(pairs: Iterable[tuple[str, str]], kind: str = "") -> str:
    """A list of terms (plain text) and what is said of them (HTML)."""
    classed = f' class="{kind}"' if kind else ""
    return f"<dl{classed}>\n" + "\n".join(f"<div><dt>{name(a)}</dt><dd>{b}</dd></div>" for a, b in pairs) + "\n</dl>"


def _row(row: Sequence[str], words: Sequence[int]) -> str:
    head = f'<th scope="row" class="words"><span>{row[0]}</span></th>'
    return head + "".join(f"<td{_words(k, words)}>{cell}</td>" for k, cell in enumerate(row[1:], 1))


def _words(k: int, words: Sequence[int]) -> str:
    return ' class="words"' if k in words else ""


def _data(value: str, shown: str) -> str:
    return shown if value in (shown, shown + ".0") else f'<data value="{value}">{shown}</data>'


def png(pixels: Shaped[np.ndarray, "H W *C"]) -> str:
    """An image of bytes, (H, W) or (H, W, 3), as a `data:` address within the page."""
    held = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(held, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii")
