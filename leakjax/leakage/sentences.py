"""What an audit says in plain words."""

from leakjax.leakage.structural.counts import Count
from leakjax.report.percentage import percentage


def layer_sentence(
    unknowns: int, count: Count, rank: int | None, dead: int, known_share: float | None, depth: int | None
) -> str:
    """What one layer costs an attacker."""
    seen = rank if rank is not None else count.rank
    words = "determines all of its input" if seen == unknowns else f"leaves {unknowns - seen:,} directions open"
    if rank is None:
        words = words.replace("determines", "may determine") if seen == unknowns else f"{words} at least"
    parts = [words[0].upper() + words[1:]]
    if dead:
        parts.append(f"{dead:,} positions of it are never read (the stride passes over them)")
    if known_share is not None and known_share < 1:
        parts.append(f"its activation hides {percentage(1 - known_share)} of its outputs")
    if rank is not None and rank < unknowns:
        parts.append(
            f"the {depth} layer{'s' if depth > 1 else ''} before it settle{'' if depth > 1 else 's'} the rest"
            if depth
            else "the layers before it do not settle the rest"
        )
    return "; ".join(parts) + "."
