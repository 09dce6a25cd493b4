"""Candidates on their way from the head to the image, and when one is dropped."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from leakjax.attacks.problem import Labels, Problem
from leakjax.attacks.tolerances import Tolerances
from leakjax.reconstruction import LayerInfo
from leakjax.segments.chain import Segment

LEAST = 3e-12  # of the size of x: what solves in float64 leave of an exact zero behind well-conditioned layers
EXACT_SHARE, NOISY_SHARE = 0.03, 0.002  # of the misfit left by the next layer, for the tolerance of this one


@dataclasses.dataclass(frozen=True, eq=False)
class Anchor:
    """A layer that waits for the ones before it: its position, what is known at its output, and behind the activations
    inside it, as far as it is known (last first; None where it is not read in stages)."""

    position: int
    x: Float[np.ndarray, "..."]
    dx: Float[np.ndarray, "..."]
    noise: float
    inside: tuple[Float[np.ndarray, "..."], ...] | None = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Weak:
    """The direction in which x and dL/dx at the output of the segment at `position` are known less well (`fiber`)."""

    position: int
    x: Float[np.ndarray, "..."]
    dx: Float[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """One candidate: labels (B,), x_{i+1}, dL/dx_{i+1}, the noise level of the former, and the layers solved so far.

    `seen`: share of each entry of x that the last solved layer determines; None where that is not known. `source`:
    whose constraints gave the image itself. `weights` (B,): of the examples in what was sent, where it is no mean.
    `row`: its place in a sweep of several layers (see `sweep`). `weak`: the direction that the last unsent statistics
    left. `entry`: position of the segment that it came in at, without anything of the later ones (see `entry`); None
    for the head.
    """

    victim: int
    labels: Labels
    x: Float[np.ndarray, "..."]
    dx: Float[np.ndarray, "..."]
    noise: float
    layers: tuple[LayerInfo, ...]
    seen: Float[np.ndarray, "..."] | None
    anchor: Anchor | None = None
    source: Anchor | None = None
    weights: Float[np.ndarray, " B"] | None = None
    row: int = 0
    weak: Weak | None = None
    entry: int | None = None

    @property
    def certain(self) -> bool:
        """Whether every layer so far is determined."""
        return self.anchor is None and all(info.status in ("determined", "pulled_back") for info in self.layers)


def noise_level(problem: Problem, x: Float[np.ndarray, "..."], residual: float) -> float:
    """Absolute level under which an entry of x may be rounding."""
    return float(level_of(problem.tolerances, x, residual, np))


def level_of(tolerances: Tolerances, x: Any, residual: Any, numpy: Any) -> Any:
    """`noise_level`, by `numpy` or by what computes like it under jit."""
    known = numpy.where(residual < tolerances.error, residual, 0.0)
    share = numpy.maximum(known, max(tolerances.rounding, LEAST))
    return 30 * share * numpy.sqrt(numpy.mean(x**2))


def solve_tolerance(problem: Problem, residual: float) -> float:
    """Relative tolerance of a layer's solve: well below the misfit that the layer after it left, and no lower."""
    return float(tolerance_of(problem.tolerances, misfit_share(problem), residual, np))


def tolerance_of(tolerances: Tolerances, share: float, residual: Any, numpy: Any) -> Any:
    """`solve_tolerance`, by `numpy` or by what computes like it under jit."""
    return numpy.clip(share * residual, tolerances.solve, 1e-7)


def misfit_share(problem: Problem) -> float:
    """The share of a misfit that the next tolerance is."""
    return EXACT_SHARE if problem.noise < 1e-12 else NOISY_SHARE


def layer_info(
    problem: Problem, name: str, unknowns: int, rank: int | None, condition: float | None, residual: float, steps: int
) -> LayerInfo:
    """What a layer's own system gave, with the status that follows."""
    fitting = "determined" if rank == unknowns else "deficient"
    status = fitting if residual <= problem.tolerances.matched else "failed"
    deficiency = None if rank is None else rank - unknowns
    return LayerInfo(
        name=name,
        unknowns=unknowns,
        rank=rank,
        rank_deficiency=deficiency,
        condition=condition,
        residual=residual,
        pull_back_depth=0,
        steps=steps,
        status=status,
    )


def drop_impossible(problem: Problem, segment: Segment, paths: list[Path]) -> list[Path]:
    """Drop a victim's paths whose x_{i+1} the activation cannot give, where it has others (a head's wrong sign)."""
    if len({path.victim for path in paths}) == len(paths):
        return paths
    low, high = segment.activation.reach(problem.variables, problem.dtype)

    def outside(path: Path) -> bool:
        beyond = max(low - float(path.x.min()), float(path.x.max()) - high)
        return path.anchor is None and beyond > 1e-2 * float(np.sqrt(np.mean(path.x**2)))

    good = {path.victim for path in paths if not outside(path)}
    return [path for path in paths if path.victim not in good or not outside(path)]


def drop_misfits(problem: Problem, paths: list[Path]) -> list[Path]:
    """Drop a victim's paths that fit a layer far worse than its best one."""
    kept = []
    for path in paths:
        best = np.nanmin([p.layers[0].residual for p in paths if p.victim == path.victim] + [np.inf])
        if path.anchor is not None or path.layers[0].residual <= max(1e3 * best, problem.tolerances.matched):
            kept.append(path)
    return kept
