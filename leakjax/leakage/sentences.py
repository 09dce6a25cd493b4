"""What an audit says in plain words."""

from collections.abc import Sequence

from leakjax.leakage.structural.index import LayerCount
from leakjax.report.percentage import percentage
from leakjax.segments.geometry import Geometry


def constants_remarks(counts: Sequence[LayerCount], geometries: Sequence[Geometry]) -> list[str]:
    """What of the images the means of a train-mode norm behind the first layer hide."""
    words = _constants(counts[0], geometries[0])
    if not words:
        return []
    return [f"{words}: the normalization behind the first layer subtracts its means ({counts[0].constants} directions)"]


def _constants(count: LayerCount, geometry: Geometry) -> str:
    """What can be added to the input of a layer without a trace; "" for nothing."""
    if not count.constants:
        return ""
    if all(axis.kernel.stride == 1 for axis in geometry.axes):
        return "a constant added to an input channel cannot be told from the gradient"
    each = count.constants // geometry.channels
    more = f" ({each} for each channel)" if each > 1 else ""
    return f"a pattern that repeats with the stride{more}, added to an input channel, cannot be told from the gradient"


def layer_sentence(
    geometry: Geometry, count: LayerCount, rank: int | None, dead: int, known_share: float | None, depth: int | None
) -> str:
    """What one layer costs an attacker."""
    unknowns = geometry.unknowns
    seen = rank if rank is not None else count.rank
    words = "determines all of its input" if seen == unknowns else f"leaves {unknowns - seen:,} directions open"
    if rank is None:
        words = words.replace("determines", "may determine") if seen == unknowns else f"{words} at least"
    parts = [words[0].upper() + words[1:]]
    if dead:
        parts.append(f"{dead:,} positions of it are never read (the stride passes over them)")
    if count.constants:
        parts.append(_constants(count, geometry))
    if known_share is not None and known_share < 1:
        parts.append(f"its activation hides {percentage(1 - known_share)} of its outputs")
    if rank is not None and rank < unknowns:
        parts.append(
            f"the {depth} layer{'s' if depth > 1 else ''} before it settle{'' if depth > 1 else 's'} the rest"
            if depth
            else "the layers before it do not settle the rest"
        )
    return "; ".join(parts) + "."
