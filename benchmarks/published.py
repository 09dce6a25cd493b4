"""What other programs reached on the same nets: their papers' figures, and theirs as measured here once.

PSNR has peak 1 on [0, 1] pixels everywhere; figures printed with peak 255 are converted (48.13 dB less), and those
published as mean squared errors are -10 log10 of them.
"""

import math
from typing import NamedTuple


class Published(NamedTuple):
    """A peer's PSNR in dB for an attack of ours on a net (any activation where that is None), and whose it is."""

    model: str
    attack: str
    psnr: str
    source: str
    activation: str | None = None


def from_mse(value: float) -> str:
    """The PSNR of a mean squared error."""
    return f"{-10 * math.log10(value):.1f}"


_RGAP = "R-GAP's code, 4 photos"
_COPA = "COPA's code, 4 photos"
_RCONV = "R-CONV's paper"
_RCONV_CODE = "R-CONV's code, 4 photos"
_DEFICIENT = ["cnn2_c2", "cnn2_c4", "cnn3_c1", "cnn3_c2", "cnn3_c4", "cnn4_c1", "cnn4_c2"]

PUBLISHED: tuple[Published, ...] = (
    Published("cnn6", "rgap", "49.0", "breaching, one image"),
    Published("cnn6", "rgap", "12 to 37", f"{_RGAP}, 340 CPU s"),
    Published("cnn6d", "rgap", "-2 to 5", f"{_RGAP}, 104 CPU s"),
    Published("fcn3", "rgap", "10 to 13", "R-GAP's code, 9 CPU s"),
    Published("cnn2_c1", "rgap", "148 to 153", f"{_COPA}, 103 CPU s"),
    Published("cnn2_c5", "rgap", "133 to 141", f"{_COPA}, 78 CPU s"),
    Published("cnn3_c3", "rgap", "127 to 133", f"{_COPA}, 110 CPU s"),
    *(Published(model, "rgap", "10 to 19", f"{_COPA}, 2 to 39 CPU s") for model in _DEFICIENT),
    Published("cnn2_c6", "rgap", "21 to 31", f"{_COPA}, 13 CPU s"),
    Published("cnn4_c3", "rgap", "6.8", f"{_COPA}, 56 CPU s"),
    Published("lenet", "rgap", "-78", f"{_COPA}, 92 CPU s"),
    Published("cnn2_c1", "hybrid", "31.9", f"{_COPA}, 994 CPU s"),
    Published("cnn3_c1", "hybrid", "12.2", f"{_COPA}, 1312 CPU s"),
    Published("cnn3_c2", "hybrid", "12.9", f"{_COPA}, 367 CPU s"),
    Published("cnn3_c3", "hybrid", "31.5", f"{_COPA}, 3242 CPU s"),
    Published("cnn4_c1", "hybrid", "11.6", f"{_COPA}, 1417 CPU s"),
    Published(model="rconv_lenet", attack="rconv", psnr=from_mse(1.4e-15), source=_RCONV, activation="relu"),
    Published("rconv_lenet_o", "rconv", from_mse(1.1e-18), _RCONV),
    Published("rconv_cnn6", "rconv", from_mse(4.4e-18), _RCONV),
    Published("rconv_4relu", "rconv", from_mse(2.3e-22), _RCONV),
    Published("rconv_relu", "rconv", from_mse(1.2e-25), _RCONV),
    Published(model="rconv_lenet", attack="rconv", psnr="172 to 207", source=_RCONV_CODE, activation="relu"),
    Published(model="rconv_lenet", attack="rconv", psnr="187 to 217", source=_RCONV_CODE, activation="leaky_relu:0.2"),
    Published(model="rconv_lenet", attack="rconv", psnr="129 to 168", source=_RCONV_CODE, activation="tanh"),
    Published(model="rconv_lenet", attack="rconv", psnr="150 to 178", source=_RCONV_CODE, activation="sigmoid"),
)


def published(model: str, attack: str, activation: str) -> list[Published]:
    """The figures that belong beside a row of a table."""
    return [p for p in PUBLISHED if (p.model, p.attack) == (model, attack) and p.activation in (None, activation)]
