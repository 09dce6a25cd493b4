"""What the numeric part of an audit is asked, and what it answers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from leakjax.leakage.dense import Jacobian, Leakage
from leakjax.leakage.layers import LayerLeakage
from leakjax.leakage.privacy import DPSGD
from leakjax.leakage.sent_buffers import SentBuffers
from leakjax.leakage.verdict import Doubt
from leakjax.models.losses import LossSpec
from leakjax.report.audit.record import NoisePoint, Picture

Tell = Callable[[str], None]
Arrays = tuple[Any, Array, Array]
"""Variables, images and labels."""


class Asked(NamedTuple):
    """What to look at: the `loss`, the `limits` of the input range, standard deviations of `noise`, a DP-SGD with
    its `epsilons`, a `seed` for random probes, a listener; whether the levels of noise were asked for by the caller;
    the `buffers` that are sent beside the gradient, None for none."""

    loss: LossSpec
    limits: tuple[float, float]
    noise: Sequence[float]
    dp_sgd: DPSGD | None
    epsilons: Sequence[float]
    seed: int
    tell: Tell
    asked: bool = False
    buffers: SentBuffers | None = None

    @property
    def scale(self) -> float:
        """The width of the input range: one pixel's unit."""
        return self.limits[1] - self.limits[0]

    def private_sigmas(self, examples: int) -> list[float]:
        """The noise of the DP-SGD in every entry of what is sent, multiplier by multiplier."""
        return [] if self.dp_sgd is None else [self.dp_sgd.sigma(m, examples) for m in self.dp_sgd.noise_multipliers]

    def private(self, points: Sequence[NoisePoint]) -> tuple[NoisePoint, ...]:
        """The points of a DP-SGD with what they are points of."""
        if self.dp_sgd is None:
            return ()
        clip, delta = self.dp_sgd.clip, self.dp_sgd.delta
        rows = zip(points, self.dp_sgd.noise_multipliers, self.epsilons, strict=True)
        return tuple(
            dataclasses.replace(p, noise_multiplier=m, clip=clip, epsilon=e, delta=delta, asked=True)
            for p, m, e in rows
        )


class Measured(NamedTuple):
    """By layer what its constraints tell, the Jacobian's `leakage`, noise `points`, singular values, the leakage `map`
    where it is an estimate, and `remarks`: None, or empty, where it was not asked for or is too large; what `doubt`
    there is that derivatives say what the gradient does; `pictures` of what comes back; the `jacobian` of `leakage`."""

    layers: Sequence[LayerLeakage] = ()
    leakage: Leakage | None = None
    points: tuple[NoisePoint, ...] | None = None
    spectrum: tuple[float, ...] | None = None
    map: Float[np.ndarray, "B ..."] | None = None
    remarks: tuple[str, ...] = ()
    doubt: Doubt = Doubt()
    pictures: tuple[Picture, ...] = ()
    jacobian: Jacobian | None = None
