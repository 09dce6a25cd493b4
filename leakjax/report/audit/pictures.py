"""The pictures of an audit's page: the image that was audited, and what an attacker gets back of it."""

import numpy as np
from jaxtyping import Float

from leakjax.metrics import psnr
from leakjax.report.audit.markup import paragraph, png, section, text
from leakjax.report.audit.record import AuditRecord

_MOST = 8  # levels of noise that are drawn


def pictures_section(audit: AuditRecord) -> str:
    """The first audited image beside what comes back of it. Returns HTML, empty where nothing was computed."""
    if audit.images is None or not audit.pictures:
        return ""
    truth = np.asarray(audit.images[0])
    panels = [_panel(truth, "The image that was audited")]
    for shown in audit.pictures[: _MOST + 1]:
        title = "What this gradient gives back" if shown.sigma is None else f"At noise σ = {shown.sigma:g}"
        panels.append(_panel(shown.image[0], f"{title}: {psnr(truth, shown.image[0]):.1f} dB"))
    words = (
        "What an attacker who knows this model gets back from one gradient, near the image, with a prior that natural "
        "images are smooth. Noise is drawn once."
    )
    if audit.examples > 1:
        words += f" The first of {audit.examples} examples."
    return section(
        "pictures", "What an attacker sees", paragraph(words), '<div class="maps">', "\n".join(panels), "</div>"
    )


def _panel(image: Float[np.ndarray, "H W C"], words: str) -> str:
    height, width = image.shape[:2]
    return (
        f'<figure><img src="{_png(image)}" width="{width}" height="{height}" alt="{text(words)}">'
        f"<figcaption>{text(words)}</figcaption></figure>"
    )


def _png(image: np.ndarray) -> str:
    shown = image if image.shape[-1] == 3 else image.mean(axis=-1)
    return png(np.round(255 * np.clip(shown, 0, 1)).astype(np.uint8))
