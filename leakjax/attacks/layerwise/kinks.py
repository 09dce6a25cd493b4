"""Rounding can hide on which side of a kink an entry lies, and then the layer's system does not fit: try the other."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from leakjax.attacks.layerwise.iterative import max_steps
from leakjax.attacks.layerwise.layer_solution import LayerSolution
from leakjax.attacks.layerwise.layer_step import Step, run_steps
from leakjax.attacks.layerwise.system import LayerState
from leakjax.attacks.problem import Problem
from leakjax.models.activations import preimage_program
from leakjax.segments.chain import Segment

NOISE_FACTORS = (0.1, 10.0, 0.01, 100.0)
MOST_KINKS, MOST_TRIALS = 4, 32  # entries moved across a kink, and tried at a time


class Solved(NamedTuple):
    """Solutions of several paths' systems, dL/dx of each, and the states that they came from."""

    solution: LayerSolution
    dx: Float[np.ndarray, "P ..."]
    state: LayerState


def mend_kinks(
    problem: Problem,
    step: Step,
    size: int,
    victims: list[int],
    solved: Solved,
    certain: Bool[np.ndarray, " P"],
) -> Solved:
    """`solved` with the misfits among `certain` paths replaced by better ones where a kink explains them.

    A path behind a layer that was not determined is left alone: its misfit has another cause.
    """

    segment = step.segment

    def run(state: LayerState, owners: Int[np.ndarray, " R"]) -> Solved:
        return Solved(*run_steps(problem, step, size, state, [victims[k] for k in owners]), state)

    def misfits(solved: Solved) -> Int[np.ndarray, " M"]:
        """Paths whose system was solved and does not fit (where a step limit was met, it is conditioning)."""
        solution = solved.solution
        converged = solution.steps < max_steps(segment)
        return np.flatnonzero(certain & converged & (solution.residual > problem.tolerances.kinked))

    if segment.activation.has_masks:
        for factor in NOISE_FACTORS:  # an entry near 0 was taken for the wrong side: move the level
            bad = misfits(solved)
            if not len(bad):
                break
            state = jax.tree.map(lambda a, bad=bad: a[bad], solved.state)
            other = run(state._replace(noise=state.noise * factor), bad)
            better = np.asarray(other.solution.residual < 0.5 * solved.solution.residual[bad])
            solved = _replace(solved, bad[better], other, better)
    for _ in range(MOST_KINKS):  # one entry at a time is put on the other side; the best is kept
        trials = [(k, x) for k in misfits(solved) for x in _other_sides(problem, segment, solved.state, int(k))]
        if not trials:
            break
        owners = np.array([k for k, _ in trials])
        state = jax.tree.map(lambda a, owners=owners: a[owners], solved.state)
        other = run(state._replace(x=np.stack([x for _, x in trials])), owners)
        residual = other.solution.residual
        mine = [np.flatnonzero(owners == k) for k in np.unique(owners)]
        best = np.array([m[np.argmin(residual[m])] for m in mine])
        best = best[residual[best] < 0.7 * solved.solution.residual[owners[best]]]
        if not len(best):
            break
        solved = _replace(solved, owners[best], other, best)
    return solved


def _other_sides(problem: Problem, segment: Segment, state: LayerState, k: int) -> list[Float[np.ndarray, "..."]]:
    """x_{i+1} of path k with one entry moved to where the slope changes, for the entries that are nearest to it."""
    x, noise = state.x[k].reshape(segment.output.shape), state.noise[k]

    def slope(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        preimage = preimage_program(segment.activation)
        return np.asarray(preimage(dict(problem.variables), x, np.asarray(noise, x.dtype)).slope)

    here, move = slope(x), np.zeros_like(x)
    steps = np.geomspace(1e-3, 1, 10) if segment.activation.has_masks else np.ones(1)
    for distance in 3 * noise * steps:
        for d in (-distance, distance):
            there = slope(x + d)
            kinked = np.abs(there - here) > 0.05 * np.maximum(np.abs(there), np.abs(here))
            move = np.where((move == 0) & kinked, d, move)
    found = []
    for position in sorted(np.flatnonzero(move), key=lambda p: abs(move.flat[p]))[:MOST_TRIALS]:
        moved = x.copy()
        moved.flat[position] += move.flat[position]
        found.append(moved.reshape(state.x[k].shape))
    return found


def _replace(
    old: Solved, where: Int[np.ndarray, " M"], new: Solved, chosen: Int[np.ndarray, " M"] | Bool[np.ndarray, " R"]
) -> Solved:
    """`old` with its rows `where` taken from the rows `chosen` of `new`, leaf by leaf."""

    def replace(
        old: Shaped[Array | np.ndarray, "P ..."], new: Shaped[Array | np.ndarray, "R ..."]
    ) -> Shaped[np.ndarray, "P ..."]:
        old = np.array(old)
        old[where] = np.asarray(new)[chosen]
        return old

    return jax.tree.map(replace, old, new)
