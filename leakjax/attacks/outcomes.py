"""From finished paths to an `Outcome` a victim: which candidates stand, judged by the gradient alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.attacks.path import Path
from leakjax.attacks.problem import Outcome, Problem
from leakjax.heads import loss_pull
from leakjax.reconstruction import Candidate
from leakjax.residuals import pull_gradients, push_forward
from leakjax.segments import Segment


def outcomes(problem: Problem, paths: list[Path]) -> list[Outcome]:
    """Every victim's candidates inside the input range, best match first."""
    residuals = _gradient_residuals(problem, paths)
    low, high = problem.input_range
    slack = 5e-3 * (high - low)
    found = []
    for victim in range(problem.victims):
        mine = [(r, p) for r, p in zip(residuals, paths, strict=True) if p.victim == victim]
        inside = [(r, p) for r, p in mine if p.x.min() >= low - slack and p.x.max() <= high + slack]
        mine = sorted(inside or mine, key=lambda pair: pair[0])
        best = mine[0][0] if mine else np.inf
        mine = [pair for pair in mine if pair[0] <= max(10 * best, problem.matched)]
        candidates = tuple(Candidate(p.x[0], p.label, float(r)) for r, p in mine)
        found.append(Outcome(candidates, mine[0][1].layers if mine else (), _seen(mine[0][1]) if mine else None))
    return found


def _seen(path: Path) -> np.ndarray | None:
    later = [info.status for info in path.layers[1:]]
    whole = all(status in ("determined", "pulled_back") for status in later) and path.layers[0].status != "failed"
    return path.seen[0] if whole and path.seen is not None else None


def _gradient_residuals(problem: Problem, paths: list[Path]) -> list[float]:
    """||g(x) - g|| / ||g|| of every path, through the chain of segments."""
    gradient = _gradient_of(problem.segments, problem.loss)
    residuals = []
    for path in paths:
        found = gradient(dict(problem.variables), jnp.asarray(path.x, problem.dtype), jnp.asarray(path.label))
        given = {p: problem.gradients[p][path.victim] for p in found}
        error = np.sqrt(sum(np.sum((np.asarray(found[p]) - given[p]) ** 2) for p in found))
        residuals.append(float(error / np.sqrt(sum(np.sum(g**2) for g in given.values()))))
    return residuals


@functools.lru_cache(maxsize=32)
def _gradient_of(segments: tuple[Segment, ...], loss: str) -> Any:
    """(variables, x, label) -> {path: dL/dtheta}, by the same segments that the layers are solved with."""

    def gradient(variables: Any, x: Any, label: Any) -> Any:
        xs, zs, slopes = push_forward(segments, variables, x)
        dz = loss_pull(segments[-1], variables, loss, zs[-1], label)
        return pull_gradients(segments, variables, xs, slopes, dz)[0]

    return jax.jit(gradient)
