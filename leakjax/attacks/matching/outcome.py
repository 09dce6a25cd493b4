"""From images that match a whole gradient, or do not, to an `Outcome` an example: rank, symmetries, candidates."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from leakjax.attacks.adaptive import Sent, Told, predicted
from leakjax.attacks.candidates import kept, split
from leakjax.attacks.certificates.other_images import same_open_set
from leakjax.attacks.certificates.symmetries import twins
from leakjax.attacks.layerwise.ranks import DENSE_SIDE
from leakjax.attacks.matching.residual import Compare, match_programs
from leakjax.attacks.problem import DeviceLabels, Labels, Outcome, Problem
from leakjax.models.losses import UNKNOWN
from leakjax.models.reader import Arrays
from leakjax.reconstruction import LayerInfo
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.solvers.jacobian import row_space
from leakjax.solvers.linear import LsmrSolution, lsmr_condition

LIKE = 1e-3
"""Relative difference of two answers, each within its error of 10 times condition times residual, that count as one: no
more than this, which is 60 dB."""


class Found(NamedTuple):
    """x (B, ...), its labels, ||r|| / size, and the steps spent.

    `condition`: of a system of full rank that the gradient alone gives and x is a root of; None where there is none.
    """

    x: Float[np.ndarray, "B ..."]
    labels: Labels
    residual: float
    steps: int
    condition: float | None = None


def compare(problem: Problem, told: Told) -> Compare:
    """How what a client sends is compared with what was sent."""
    return Compare(predicted(problem), problem.input_range, told.signs, problem.loss == UNKNOWN)


def given(problem: Problem, told: Told, labels: Labels, *, prior: bool = False) -> tuple[Arrays, Sent, DeviceLabels]:
    """What the compiled programs take before x: weights, what was sent, labels."""
    sent = told.sent if prior else told.sent._replace(prior=None)
    return dict(problem.variables), sent, to_device(labels)


def misfit(problem: Problem, told: Told, labels: Labels, x: Float[np.ndarray, "B ..."]) -> float:
    """||r|| / size, without a prior."""
    program = match_programs(compare(problem, told), problem.tolerances.solve).misfit
    return float(program(*given(problem, told, labels), to_device(x)))


def matched_outcomes(problem: Problem, told: Told, trials: list[Found]) -> list[Outcome]:
    """One example each: candidates inside the range, and the whole batch as the one "layer" that was solved.

    `trials`, best first: the others that match are candidates too, and so are the twins of each. What is certified is
    said of the answer that comes first.
    """
    n = trials[0].x.size
    matching = [trial for trial in trials if trial.residual <= told.matched]
    ranks: list[tuple[int | None, Float[np.ndarray, "B ..."] | None, float | None]]
    ranks = [_local_rank(problem, told, trial) for trial in matching]
    if matching and ranks[0][0] != n:  # where directions are open, other answers may be other points of one set
        first = matching[0]
        apart = [k == 0 or not same_open_set(problem, first.x, first.labels, t.x) for k, t in enumerate(matching)]
        matching = [trial for trial, kept in zip(matching, apart, strict=True) if kept]
        ranks = [rank for rank, kept in zip(ranks, apart, strict=True) if kept]
    ranks = ranks or [(None, None, None)]
    whole = bool(matching) and all(rank == n for rank, _, _ in ranks)
    answers = []
    for k, trial in enumerate(matching or trials[:1]):
        answers.append((trial.x, trial.labels, trial.residual, k))
        if matching:
            point = problem.variables, trial.x, trial.labels, problem.tolerances.matched
            pairs = twins(problem.network.logits, predicted(problem), problem.loss, *point)
            answers += [(images, tags, trial.residual, k) for images, tags in pairs]
    answers = kept(problem, answers, lambda answer: answer[0], whole=whole)
    if whole and not problem.in_range(answers[0][0]):
        answers = answers[:1]
    rank, seen, condition = ranks[answers[0][3]]
    status = "failed" if not matching else "determined" if rank == n else "deficient"
    deficiency = None if rank is None else rank - n
    steps = sum(trial.steps for trial in trials)
    info = LayerInfo(
        name="network",
        unknowns=n,
        rank=rank,
        rank_deficiency=deficiency,
        condition=condition,
        residual=answers[0][2],
        pull_back_depth=0,
        steps=steps,
        status=status,
        solver="match",
    )
    error = max((c * t.residual for (_, _, c), t in zip(ranks, matching, strict=False) if c), default=0.0)
    images = split([answer[:3] for answer in answers], float(np.clip(10 * error, 1e-7, LIKE)))
    return [Outcome(mine, (info,), None if seen is None else seen[b]) for b, mine in enumerate(images)]


def is_open(problem: Problem, told: Told, found: Found) -> bool:
    """Whether d r / d x at x leaves directions open: a random probe loses some of itself."""
    look = match_programs(compare(problem, told), problem.tolerances.solve).look
    return not float(look(*given(problem, told, found.labels), to_device(found.x)).lost) <= problem.tolerances.probe


def _local_rank(
    problem: Problem, told: Told, found: Found
) -> tuple[int | None, Float[np.ndarray, "B ..."] | None, float]:
    """Rank of d r / d x at x, each entry's share in its row space, and its condition."""
    if found.condition is not None:
        return found.x.size, np.ones(found.x.shape), found.condition
    programs = match_programs(compare(problem, told), problem.tolerances.solve)
    point = *given(problem, told, found.labels), to_device(found.x)
    probe: LsmrSolution = programs.look(*point)
    condition, n = lsmr_condition(probe), found.x.size
    if float(probe.lost) <= problem.tolerances.probe:
        return n, np.ones(found.x.shape), condition
    single = np.dtype(problem.dtype) != np.float64  # squares of small singular values drown in its rounding
    if single or n > DENSE_SIDE or not fits_in_memory(4 * 8 * n**2):
        return None, None, condition
    rows = sum(g[0].size for g in (*problem.gradients.values(), *problem.statistics.values()))
    space = row_space(lambda v: programs.products(*point, to_device(v)), rows, n)
    if space.rank:
        condition = float(np.sqrt(space.values[-1] / space.values[n - space.rank]))
    return space.rank, space.share.reshape(found.x.shape), condition
