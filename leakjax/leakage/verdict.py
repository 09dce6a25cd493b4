"""What an audit concludes, in one word and a sentence that is no more reassuring than what was measured."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from leakjax.leakage.dense import PRIOR_DEVIATION
from leakjax.report.audit.record import NoisePoint
from leakjax.report.percentage import percentage

LIMITED = 0.1  # leaked share below which few numbers leak; a thumbnail of the image may still be made of them
DEGENERATE = 3  # times more that the shapes allow: so few numbers then belong to these weights, not to the model
GREY = -20 * math.log10(PRIOR_DEVIATION)  # dB of a guess that has seen nothing
RECOGNIZABLE, EXACT = 16.0, 60.0  # dB


class Doubt(NamedTuple):
    """Why derivatives may not say what a gradient does.

    - `spots`: operations that hide the images from them; `picture`: where these stand in front of the model alone, the
      PSNR of the image that they leave, for then everything behind them is known;
    - `silent`: weights whose gradient is zero; `beyond`: by how much more the gradient moves than they predict.
    """

    spots: tuple[str, ...] = ()
    picture: float | None = None
    silent: tuple[str, ...] = ()
    beyond: float | None = None


class Found(NamedTuple):
    """What a verdict is on.

    - `leaked` dimensions (None: not measured) of all `unknowns`; those that the shapes allow at these weights
      (`structural`), and at any (`possible`);
    - B `examples` of `channels`; what `doubt` there is; the points of `noise`, and whether the caller `asked` for any.
    """

    leaked: int | None
    structural: int
    possible: int
    unknowns: int
    examples: int
    channels: int
    doubt: Doubt = Doubt()
    noise: Sequence[NoisePoint] = ()
    asked: bool = False

    @property
    def whose(self) -> str:
        """Whose numbers."""
        return "an image" if self.examples == 1 else f"{self.examples} images"


def verdict(found: Found) -> tuple[str, str]:
    """("exact", "partial", "limited" or "unknown", a sentence); of the noise that was asked for, where it was."""
    word, sentence = _without_noise(found)
    asked = [point for point in found.noise if point.asked]
    if word == "unknown" or not found.asked:
        return word, sentence
    if not asked:
        return "unknown", f"Unknown at the noise asked for: nothing bounds an attack there. Without noise: {sentence}"
    said = "; ".join(_at_level(point) for point in asked)
    levels = [point.attainable_psnr for point in asked]
    if any(level is None for level in levels):
        return "unknown", f"Unknown at the noise asked for: {said}. Without noise: {sentence}"
    worst = max(level for level in levels if level is not None)
    if worst < RECOGNIZABLE:
        word = "limited"
    elif worst < EXACT and word == "exact":
        word = "partial"
    return word, f"{said[0].upper()}{said[1:]}. Without noise: {sentence}"


def _at_level(point: NoisePoint) -> str:
    level = point.attainable_psnr
    private = "" if point.epsilon is None else f", epsilon {point.epsilon:.3g} at delta {point.delta:g}"
    named = f"with sigma {point.sigma:g}"
    if point.noise_multiplier is not None:
        named = f"with clip {point.clip:g} and noise multiplier {point.noise_multiplier:g} (sigma {point.sigma:g})"
    if level is None:
        return f"{named}: no bound is known{private}"
    if level < GREY + 0.5:
        return f"{named}: no better than a grey guess ({level:.1f} dB{private})"
    kind = "at most" if point.psnr_bound == level else "about"
    better = "" if point.psnr_bound is not None else "; the image is not determined, and a better prior may do better"
    return f"{named}: a picture of {kind} {level:.1f} dB, as far as a smoothness prior goes{private}{better}"


def _without_noise(found: Found) -> tuple[str, str]:
    doubt = found.doubt
    if doubt.spots:
        return _behind_rounding(found)
    measured = found.leaked is not None
    leaked = found.structural if found.leaked is None else found.leaked
    if leaked >= found.unknowns:
        them = "that image" if found.examples == 1 else "them"
        how = "the gradient determines" if measured else "a gradient of this shape can determine"
        return "exact", (
            f"Everything leaks: {how} every one of the {found.unknowns:,} numbers of {found.whose}, and whoever "
            f"receives it can compute {them} to machine precision, up to other "
            "images that the model itself cannot tell apart (their parts in another order, another sign)."
        )
    few = leaked < LIMITED * found.unknowns
    if measured and (leaked == 0 or doubt.silent or (few and found.possible > DEGENERATE * leaked)):
        why = f"the gradient of {', '.join(doubt.silent[:3])} is zero" if doubt.silent else "few of its layers respond"
        return "unknown", (
            f"This instance is degenerate: {why} (all-zero or saturated weights, or units that are off), and the "
            f"gradient holds {_of(found, leaked)}. Other weights leak more: the shapes allow "
            f"{_of(found, found.possible, 'at most ')}."
        )
    if doubt.beyond is not None:
        return "unknown", (
            f"The model moves {doubt.beyond:.2g} times as far with {found.whose} as its derivative says: something "
            f"jumps, and what it gives away is not counted. The shapes allow {_of(found, found.possible, 'at most ')}."
        )
    holds = f"a gradient of this shape can hold {_of(found, leaked, 'at most ')}"
    if measured:
        holds = f"the gradient holds {_of(found, leaked)}"
    if few:
        return "limited", f"Few numbers leak, not none: {holds}{_thumbnail(found, leaked)}."
    return "partial", f"Partly exposed: {holds}; a prior over images fills in much of the rest."


def _behind_rounding(found: Found) -> tuple[str, str]:
    """The verdict where operations hide the images from every derivative."""
    names = " and ".join(found.doubt.spots)
    picture, leaked = found.doubt.picture, found.leaked
    if picture is None or leaked is None or leaked < LIMITED * found.unknowns:
        return "unknown", (
            f"No derivative sees through {names}: what passes there is not counted, and it may be the whole of "
            f"{found.whose}. The shapes allow {_of(found, found.possible, 'at most ')}."
        )
    if leaked < found.unknowns:
        return "partial", (
            f"Partly exposed: the gradient holds {_of(found, leaked)} as they are after {names}, which hides nothing "
            "of them from the layers behind it."
        )
    whole = f"the gradient determines every one of the {leaked:,} numbers of {found.whose} as they are after {names}"
    if picture >= EXACT:
        return "exact", f"Everything leaks: {whole}, which changes nothing that can be seen ({picture:.0f} dB)."
    return "partial", f"Exposed up to rounding: {whole}, a picture within {picture:.1f} dB of the original."


def _of(found: Found, count: int, bound: str = "") -> str:
    return f"{bound}{count:,} of the {found.unknowns:,} numbers of {found.whose} ({percentage(count / found.unknowns)})"


def _thumbnail(found: Found, leaked: int) -> str:
    """The size of the picture that so many numbers make."""
    side = math.isqrt(leaked // max(found.examples * found.channels, 1))
    if side < 2:
        return ""
    return f", as many as a picture of {side} x {side} pixels: a recognizable thumbnail may remain"
