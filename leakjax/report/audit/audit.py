"""`Audit`: the record of an audit that draws its own page."""

import dataclasses
import html

from leakjax.report.audit.page import draw_page
from leakjax.report.audit.record import AuditRecord


@dataclasses.dataclass(frozen=True)
class Audit(AuditRecord):
    """An `AuditRecord`, as `audit` returns it; in a notebook it shows itself as the page of audit.html."""

    def to_html(self) -> str:
        """The page of audit.html: one HTML document without scripts or links, readable offline."""
        return draw_page(self)

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        return f'<iframe srcdoc="{page}" title="Leakage audit" style="width:100%;height:40rem;border:0"></iframe>'
