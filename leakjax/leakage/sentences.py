"""What an audit says in plain words."""

from leakjax.leakage.structural import Count

SAFE = 0.1  # leaked fraction below which an image is a blur at best


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
        parts.append(f"its activation hides {100 * (1 - known_share):.0f} % of its outputs")
    if rank is not None and rank < unknowns:
        parts.append(
            f"the {depth} layer{'s' if depth > 1 else ''} before it settle{'' if depth > 1 else 's'} the rest"
            if depth
            else "the layers before it do not settle the rest"
        )
    return "; ".join(parts) + "."


def verdict(leaked: int, unknowns: int, examples: int, *, numeric: bool) -> tuple[str, str]:
    """("exact", "partial" or "safe", a sentence), of so many leaked of all unknowns."""
    share = leaked / unknowns
    whose, them = ("an image", "that image") if examples == 1 else (f"{examples} images", "them")
    how = "the gradient" if numeric else "a gradient of this shape can"
    if leaked >= unknowns:
        verb = "determines" if numeric else "determine"
        return "exact", (
            f"Not safe to share: {how} {verb} every one of the {unknowns:,} numbers of {whose}, and whoever "
            f"receives it can compute {them} to machine precision."
        )
    numbers = f"{leaked:,} of the {unknowns:,} numbers of {whose} ({100 * share:.0f} %)"
    holds = f"{how} {'holds' if numeric else 'hold'} {'' if numeric else 'at most '}{numbers}"
    if share < SAFE:
        return "safe", f"Little to reconstruct: {holds}; a blur at best, though not nothing."
    return "partial", f"Partly exposed: {holds}; a prior over images fills in much of the rest."
