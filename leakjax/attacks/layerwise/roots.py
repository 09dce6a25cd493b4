"""Nonlinear constraints may have several solutions: those that a handful of starts lead to, in range."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from leakjax.attacks.layerwise.path import Path
from leakjax.attacks.layerwise.pull_back import Known, PullBack, pull_back
from leakjax.attacks.layerwise.starts import input_limits, starts
from leakjax.attacks.problem import Problem
from leakjax.models.activations import preimage_program
from leakjax.segments.chain import Segment

MORE = 12  # starts beyond the first few, where the first solution leaves the range
SPARE = 2.0  # equations for every unknown, from which on a second solution would be a coincidence


def all_roots(
    problem: Problem,
    position: int,
    segments: Sequence[Segment],
    known: Known,
    own: Sequence[Float[np.ndarray, "..."]],
    found: PullBack,
) -> list[PullBack]:
    """Every solution that the starts `own` lead to, those in range alone where there are any; `found` is the first.

    The other starts are tried where the first solution leaves the range, or where the equations are fewer than `SPARE`
    times the unknowns: these may have several isolated solutions, more of them in general position have one.
    """
    low, high = input_limits(problem, position)

    def inside(one: PullBack) -> bool:
        width = high - low if np.isfinite(high - low) else float(np.sqrt(np.mean(np.asarray(one.x) ** 2)))
        slack = problem.tolerances.slack * width
        return low - slack <= float(np.min(one.x)) and float(np.max(one.x)) <= high + slack

    solutions = [found]
    if not inside(found) or _equations(problem, segments, known) < SPARE * found.x.size:
        more = () if inside(found) else starts(problem, position, np.asarray(found.x), MORE)
        for start in itertools.chain(own, more):
            other = pull_back(problem, segments, known, [start], quick=True)
            alike = problem.tolerances.alike
            same = any(np.linalg.norm(other.x - one.x) <= alike * np.linalg.norm(one.x) for one in solutions)
            if float(other.residual) <= problem.tolerances.matched and not same:
                solutions.append(other)
    return [one for one in solutions if inside(one)] or solutions


def near(problem: Problem, position: int, path: Path) -> Float[np.ndarray, "..."]:
    """A guess of the input of the segment at `position`, or else its output, from what the path holds."""
    segment, anchor = problem.segments[position], path.anchor
    guessed = anchor is not None and anchor.position == position and path.x is not anchor.x  # whoever waited has one
    if segment.linear or guessed:
        return path.x
    x = path.x.reshape(segment.output.shape)
    return np.asarray(preimage_program(segment.activation)(dict(problem.variables), x, path.noise).value)


def _equations(problem: Problem, segments: Sequence[Segment], known: Known) -> int:
    """How many equations the segments put on what enters them: known outputs, and gradient entries that are not 0."""
    top = segments[-1]
    preimage = preimage_program(top.activation)
    given = preimage(dict(problem.variables), np.asarray(known.x).reshape(top.output.shape), known.noise)
    outputs = int(np.count_nonzero(np.asarray(given.known)))
    return outputs + sum(int(np.count_nonzero(problem.gradients[p][known.victim])) for s in segments for p in s.paths)
