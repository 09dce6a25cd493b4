"""Which gradients are known to be multiplied by which factor: by whoever computed them, or who was told."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from leakjax.arguments import real, shown
from leakjax.errors import InputError

Gradients = Mapping[str, Shaped[np.ndarray, "V ..."]]
_WANTED = "a number other than 0, of a size from 1e-30 to 1e30"


def checksum(gradients: Gradients, victim: int) -> int:
    """Of the bytes of one victim's gradient, whatever its parameters are called: another gradient has another one."""
    return sum(zlib.crc32(np.ascontiguousarray(g[victim]).tobytes()) for g in gradients.values())


def factors_of(gradients: Gradients, factor: float | None) -> dict[int, float]:
    """What `Observation.factors` has of gradients that are all known to be multiplied by `factor`."""
    if factor is None:
        return {}
    return {checksum(gradients, v): factor for v in range(len(next(iter(gradients.values()))))}


def known_factors(gradients: Gradients, known: Mapping[int, float], told: float | None) -> tuple[float | None, ...]:
    """By victim, the factor that is `told` of all or `known` of its very gradient; None where nothing is."""
    victims = range(len(next(iter(gradients.values()))))
    if told is not None or not known:
        return (told,) * len(victims)
    return tuple(known.get(checksum(gradients, v)) for v in victims)


def check_known(known: Any) -> None:
    """Refuse what is no mapping from checksums to factors."""
    if not isinstance(known, Mapping):
        raise InputError(f"observation.factors must map checksums to factors, got {shown(known)}")
    for factor in known.values():
        if check_factor("observation.factors: every factor", factor) is None:
            raise InputError("observation.factors holds None; leave out gradients whose factor is not known")


def check_factor(name: str, value: Any) -> float | None:
    """`value` as a factor, which is not 0, or None."""
    if value is None:
        return None
    factor = real(name, value, _WANTED)
    if not abs(factor) >= 1e-30:
        raise InputError(f"{name} must be {_WANTED}, got {value!r}")
    return factor
