"""Is what is left of a gradient noise, and how much of it? From the residual alone, after the best fit.

Three ways in which noise is spread over the entries of a gradient, each with one unknown level a:

    white        a                    noise added for privacy, the same in every entry
    parameter    a ||g_p|| / sqrt(m)  rounding while the m entries of a parameter's gradient were summed
    entry        a |g_i|              rounding of the entries themselves, as when a gradient is stored in bfloat16

The likeliest is taken. A wrong loss, other weights or a missing example leave a residual too, but one with structure: a
few directions hold most of it, or some layers far more than others. Then it is not called noise.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Spread = Literal["white", "parameter", "entry"]

GROUP = 24
"""Entries from which on the rms of a group is known to some 15 %: by less no two groups are told apart."""

EVEN = 3.0
"""Largest ratio of the rms of two groups of noise; of groups of 24 normal numbers it is 2 in one case of ten thousand,
and what a fit takes away from small parameters is left out of account."""

SPIKE = 1.6
"""How many times a noise matrix's expected largest singular value, squared, counts as structure."""

ROUNDED = 8.0
"""Times the rounding of the entries themselves that is left where their sums were rounded as well."""

Arrays = Mapping[str, Float[np.ndarray, "..."]]


class Noise(NamedTuple):
    """The standard deviation of every entry by parameter, how it is spread, and its level `a`."""

    sigma: dict[str, Float[np.ndarray, "..."]]
    spread: Spread
    level: float


def read_noise(residual: Arrays, gradient: Arrays, unknowns: int) -> Noise | None:
    """The noise behind a `residual` that a fit of `unknowns` numbers to a `gradient` left; None where it is no noise.

    The level is corrected for the fit: a^2 = mean (r_i / s_i)^2 P / (P - unknowns), s_i the spread with a = 1. None too
    where there are hardly more numbers than unknowns: then nothing can be read off what is left.
    """
    entries = sum(r.size for r in residual.values())
    if entries < 1.25 * unknowns + GROUP:
        return None
    best: tuple[float, Noise] | None = None
    for spread in ("white", "parameter", "entry"):
        unit = _unit(spread, gradient)
        used = {p: u > 0 for p, u in unit.items()}
        scaled = {p: residual[p][used[p]] / unit[p][used[p]] for p in residual}
        count = sum(a.size for a in scaled.values())
        if count < 1.25 * unknowns + GROUP or any(np.any(residual[p][~used[p]]) for p in residual):
            continue
        level = float(np.sqrt(sum(float(np.sum(a**2)) for a in scaled.values()) / (count - unknowns)))
        if not 0 < level < np.inf:
            continue
        logs = sum(float(np.sum(np.log(unit[p][used[p]]))) for p in residual)
        surprise = np.log(level) + logs / count
        found = Noise({p: level * u for p, u in unit.items()}, spread, level)
        if best is None or surprise < best[0]:
            best = surprise, found
    return best[1] if best is not None and looks_random(residual, best[1]) else None


def read_rounding(residual: Arrays, gradient: Arrays, unknowns: int, rounding: float) -> Noise | None:
    """The noise of entries that were rounded to a relative `rounding`, which is known; None where more is left.

    Uniform over the last digit, sigma_i = rounding |g_i| / sqrt(12) up to the position of g_i between powers of two.
    A residual of up to `ROUNDED` times that is the rounding of sums before; the level follows it.
    """
    unit = {
        p: rounding * np.exp2(np.floor(np.log2(np.maximum(np.abs(g), 1e-300)))) / 12**0.5 for p, g in gradient.items()
    }
    unit = {p: np.where(gradient[p] != 0, u, 0.0) for p, u in unit.items()}
    squares = sum(float(np.sum(u**2)) for u in unit.values())
    entries = sum(int(np.count_nonzero(u)) for u in unit.values())
    left = sum(float(np.sum(r**2)) for r in residual.values())
    free = max(1.0 - unknowns / max(entries, 1), 0.1)
    level = float(np.sqrt(left / max(squares * free, 1e-300)))
    if not level <= ROUNDED:
        return None
    return Noise({p: max(level, 1.0) * u for p, u in unit.items()}, "entry", max(level, 1.0))


def looks_random(residual: Arrays, noise: Noise) -> bool:
    """Whether the residual, entry by entry over its sigma, is even over groups and has no direction of its own."""
    sizes = []
    for path, r in residual.items():
        scaled = np.where(noise.sigma[path] > 0, r / np.where(noise.sigma[path] > 0, noise.sigma[path], 1.0), 0.0)
        live = scaled[noise.sigma[path] > 0]
        if live.size >= 2 * GROUP:
            sizes += [float(np.sqrt(np.mean(part**2))) for part in np.array_split(live, min(4, live.size // GROUP))]
        matrix = scaled.reshape(-1, scaled.shape[-1]) if scaled.ndim > 1 else scaled[None]
        if min(matrix.shape) >= 4 and matrix.size >= 4 * GROUP:
            values = np.linalg.svd(matrix, compute_uv=False)
            rows, columns = matrix.shape
            expected = (1.0 / np.sqrt(rows) + 1.0 / np.sqrt(columns)) ** 2
            if values[0] ** 2 > SPIKE * expected * np.sum(values**2):
                return False
    return not sizes or max(sizes) <= EVEN * min(sizes)


def draw_noise(noise: Noise, rng: np.random.Generator) -> dict[str, Float[np.ndarray, "..."]]:
    """A draw of it, normal in every entry."""
    return {path: sigma * rng.normal(size=sigma.shape) for path, sigma in noise.sigma.items()}


def _unit(spread: Spread, gradient: Arrays) -> dict[str, Float[np.ndarray, "..."]]:
    """s_i with a = 1."""
    if spread == "white":
        return {p: np.ones(g.shape) for p, g in gradient.items()}
    if spread == "entry":
        return {p: np.abs(g).astype(float) for p, g in gradient.items()}
    return {p: np.full(g.shape, float(np.linalg.norm(g)) / np.sqrt(max(g.size, 1))) for p, g in gradient.items()}
