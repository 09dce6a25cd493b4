"""ONE way to write a share as a percentage, wherever it is printed."""

ALL = 1e-9  # a mean of many shares that is this close to 1 is 1 but for rounding


def percentage(fraction: float) -> str:
    """A share in 0..1 in percent, to one decimal; what is not quite all, or not quite nothing, never rounds to it."""
    if 0 < fraction < 0.001:
        return "< 0.1 %"
    if 0.999 < fraction < 1 - ALL:
        return "> 99.9 %"
    return "0 %" if fraction == 0 else "100 %" if fraction >= 1 - ALL else f"{100 * fraction:.1f} %"
