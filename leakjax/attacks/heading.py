"""The first step of every path: what the head's gradient says of its input."""

import numpy as np

from leakjax.attacks.labelings import labelings
from leakjax.attacks.layer_step import pull_back_cotangent
from leakjax.attacks.path import Path, layer_info, noise_level
from leakjax.attacks.problem import Problem
from leakjax.attacks.ranks import NULL_SPACE, head_rank
from leakjax.batch_heads import read_batch_head
from leakjax.errors import UnreadableModelError
from leakjax.heads import read_head
from leakjax.segments import Segment
from leakjax.solvers.linear import lsmr_condition

LABELINGS = 8


def start(problem: Problem, head: Segment) -> list[Path]:
    """All paths of all victims; raises `UnreadableModelError` where a batch's head does not separate its examples."""
    return _of_one(problem, head) if problem.examples == 1 else _of_batches(problem, head)


def _of_one(problem: Problem, head: Segment) -> list[Path]:
    reading = read_head(
        head,
        problem.variables,
        {p: np.asarray(problem.gradients[p], problem.dtype) for p in head.paths},
        problem.loss,
        labels=None if problem.labels is None else problem.labels[:, 0],
        tolerance=problem.tolerance,
        accept=problem.matched,
    )
    paths = []
    for candidate in reading.candidates:
        v = candidate.victim
        lost, residual = float(reading.solution.lost[v]), float(reading.solution.residual[v])
        condition, rank, seen = lsmr_condition(reading.solution, v), candidate.x.size, np.ones(candidate.x.shape)
        if lost > NULL_SPACE:
            rank, seen = head_rank(problem, head, candidate.dz)
        info = layer_info(
            problem, head.name, candidate.x.size, rank, condition, residual, int(reading.solution.steps[v])
        )
        dx = pull_back_cotangent(head, problem.variables, candidate.x, candidate.dz)
        noise = noise_level(problem, candidate.x, residual)
        paths.append(Path(v, np.array([candidate.label]), candidate.x, dx, noise, (info,), seen))
    return paths


def _of_batches(problem: Problem, head: Segment) -> list[Path]:
    paths, readable = [], False
    for v in range(problem.victims):
        found = read_batch_head(
            head,
            problem.variables,
            {p: problem.gradients[p][v] for p in head.paths},
            problem.loss,
            labelings=labelings(problem, v, LABELINGS),
            rounding=problem.rounding,
        )
        readable |= found is not None
        for one in found or []:
            info = layer_info(problem, head.name, one.x.size, one.x.size, one.condition, one.residual, 0)
            dz = (one.dz / problem.examples).reshape(head.output.shape).astype(problem.dtype)
            x = one.x.astype(problem.dtype)
            dx = pull_back_cotangent(head, problem.variables, x, dz)
            noise = noise_level(problem, x, one.condition * one.residual)
            paths.append(Path(v, one.labels, x, dx, noise, (info,), np.ones(x.shape)))
    if not readable:
        raise UnreadableModelError(
            f"the last layer's gradient does not separate the {problem.examples} examples behind it (it must be dense, "
            'with more outputs than examples, no two of them alike); use attack="match" (--attack match)'
        )
    return paths
