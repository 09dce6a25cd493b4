"""COPA (Chen & Campbell, arXiv 2111.10178): the recursion, with the pull-back constraint where a layer is deficient."""

import dataclasses

import numpy as np

from leakjax.attacks.heads.targets import shares_positions
from leakjax.attacks.layerwise.entry import read_entries
from leakjax.attacks.layerwise.kept_activations import keep_activations
from leakjax.attacks.layerwise.recursion import recurse
from leakjax.attacks.matching.match import match
from leakjax.attacks.matching.spans import can_span
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.errors import UnreadableModelError


def copa(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """As `rgap`, but a layer whose system leaves directions open is solved together with the layers before it.

    Its constraints are pulled back segment by segment until they determine the unknown, or the input is reached. Where
    the recursion has no start (behind global pooling the head knows its input by means alone; one that all positions
    share, by sums), or meets an activation that no output inverts and fails there, the gradient is matched as a whole
    instead: `match`. So it is where tokens lie in spans that the gradient shows, and no added parameter shows dL/dz.
    """
    if shares_positions(problem) or (not read_entries(problem) and can_span(problem)):
        return match(problem, monitor)
    try:
        found = recurse(problem, monitor, pulling=True)
    except UnreadableModelError:
        if problem.segments[-1].linear and problem.segments[-1].paths:
            raise
        return match(dataclasses.replace(problem, chain=None), monitor)
    size = problem.examples
    for victim in range(problem.victims):
        group = slice(victim * size, (victim + 1) * size)
        if _has_no_start(problem, found[group]):
            found[group] = _matched_instead(problem, monitor, victim, found[group])
    return found


def _has_no_start(problem: Problem, group: list[Outcome]) -> bool:
    """Whether a failed gradient's recursion began with an open head, or met an activation without an inverse."""
    first = group[0]
    if not first.candidates:
        return False
    failed = any(info.status == "failed" for info in first.layers) or not (
        first.candidates[0].gradient_residual <= problem.tolerances.matched
    )
    open_head = first.layers[-1].status == "deficient"
    return failed and (open_head or keep_activations(problem) is not problem)


def _matched_instead(problem: Problem, monitor: Monitor, victim: int, group: list[Outcome]) -> list[Outcome]:
    other = match(problem.alone(victim, chain=None), monitor)
    residuals = [np.nan_to_num(o[0].candidates[0].gradient_residual, nan=np.inf) for o in (group, other)]
    return other if residuals[1] < residuals[0] else group
