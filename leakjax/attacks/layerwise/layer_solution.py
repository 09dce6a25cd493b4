"""What a layer's step gave for several paths, whichever solver gave it."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from leakjax.attacks.layerwise.direct import DirectSolution, Estimates
from leakjax.attacks.problem import Problem
from leakjax.solvers.linear import LsmrSolution, lsmr_condition
from leakjax.solvers.lsmr import extreme_singular_values

MOST_CONDITION = 1e4
"""Up to which an answer of a gradient block alone stands. It leaves out rows that may see better what that block hardly
sees, and LSMR weighs all of them: beside forward rows of condition 6, a K1 of condition 1e4 gave 256 dB where LSMR gave
290, one of 1e7 would give 200. R-CONV's nets have up to 2e3 and gain 40 dB on LSMR, whose steps stop earlier there."""


class LayerSolution(NamedTuple):
    """Of P paths' systems: x, ||A x - b|| / ||b||, what a random probe lost (see `LsmrSolution`), LSMR's steps, the
    condition (see `of_direct`), and whether the solve was direct."""

    x: Float[np.ndarray, "P ..."]
    residual: Float[np.ndarray, " P"]
    lost: Float[np.ndarray, " P"]
    steps: Int[np.ndarray, " P"]
    condition: Float[np.ndarray, " P"]
    direct: Bool[np.ndarray, " P"]

    @classmethod
    def of_direct(cls, found: DirectSolution) -> "LayerSolution":
        """Of direct solves. The condition of one that left out rows (a gradient block or the weights alone) is at most
        the one that is given, since rows can only see more; where two blocks were joined it is an estimate."""
        count = len(found.residual)
        return cls(
            x=np.asarray(found.x),
            residual=np.asarray(found.residual),
            lost=np.asarray(found.lost),
            steps=np.max(found.estimates.steps, axis=1),
            condition=np.array([_condition(jax.tree.map(lambda a, k=k: a[k], found.estimates)) for k in range(count)]),
            direct=np.ones(count, bool),
        )

    @classmethod
    def of_lsmr(cls, found: LsmrSolution, lost: Float[np.ndarray, " P"]) -> "LayerSolution":
        """Of LSMR's, with what it `lost` of the probe; the condition is a lower bound from its bidiagonalization."""
        count = len(found.residual)
        return cls(
            x=np.asarray(found.x),
            residual=np.asarray(found.residual),
            lost=lost,
            steps=np.asarray(found.steps),
            condition=np.array([lsmr_condition(found, k) for k in range(count)]),
            direct=np.zeros(count, bool),
        )

    def stands(self, problem: Problem, *, alone: bool) -> Bool[np.ndarray, " P"]:
        """Which direct answers stand: nothing of the probe is lost, the rows fit, and where one block was solved
        `alone`, it sees well."""
        good = (self.lost <= problem.tolerances.probe) & (self.residual <= problem.tolerances.clean)
        return good & (self.condition <= MOST_CONDITION) if alone else good


def merged(old: Any, new: Any, where: Int[np.ndarray, " M"]) -> Any:
    """The tree `old` with its rows `where` replaced by those of `new`."""

    def put(a: Any, b: Any) -> Any:
        a = np.array(a)
        a[where] = b
        return a

    return jax.tree.map(put, old, new)


def rows_of(tree: Any, where: Int[np.ndarray, " M"]) -> Any:
    """The rows `where` of every array of a tree."""
    return jax.tree.map(lambda a: np.asarray(a)[where], tree)


def _condition(estimates: Estimates) -> float:
    """Of one system that was solved directly: ||A|| over the smallest singular value on each of its sides."""
    if not (np.isfinite(estimates.largest) and estimates.least > 0):
        return float("inf")
    left = [
        extreme_singular_values(a, b, s)[0]
        for a, b, s in zip(estimates.alphas, estimates.betas, estimates.recorded, strict=True)
        if s > 0
    ]
    least = min([float(estimates.least), *left])
    return float(estimates.largest) / least if least > 0 else float("inf")
