"""Zeros and ones for every output, read when the image is known, and told where no others explain dL/dz."""

import dataclasses

import numpy as np

from leakjax.attacks.heads.targets import pull_at, solve_labels
from leakjax.attacks.problem import Outcome, Problem
from leakjax.reconstruction import Candidate


def of_several(problem: Problem) -> bool:
    """Whether the target of one example is zeros and ones that a head without bias was read for."""
    head = problem.segments[-1] if problem.several and problem.chain is not None and problem.examples == 1 else None
    return head is not None and head.linear and bool(head.paths)


def with_bits(
    asked: Problem, freed: Problem, victim: int, outcome: Outcome, good: list[Candidate], *, noisy: bool
) -> Outcome:
    """The outcome with its labels, where no others explain dL/dz, and the factor that they show."""
    target, scale, first = None, outcome.scale, good[0]
    known = asked.factor(victim) is not None
    if first.target is not None and (known or not noisy):
        head, variables = freed.segments[-1], dict(freed.variables)
        z, dz = pull_at(freed, first.image, first.target)
        fit = _NEAR if noisy else max(_CLOSE, 1e3 * freed.tolerances.rounding)
        options = {"scaled": not known, "fit": fit}
        target, factor = solve_labels(head, asked.loss, variables, z, dz, asked.target_shape, **options)
        scale = scale if known else factor
    found = tuple(dataclasses.replace(c, target=target) for c in good)
    return dataclasses.replace(outcome, candidates=found, scale=scale, target=target)


def with_sure_bits(problem: Problem, outcome: Outcome) -> Outcome:
    """The outcome, of a head without bias, whose labels are kept where no others have the same dL/dz."""
    head, variables, kept = problem.segments[-1], dict(problem.variables), []
    for c in outcome.candidates:
        bits = c.target
        if bits is not None and np.all(np.isfinite(c.image)):
            z, dz = pull_at(problem, c.image, bits)
            bits, _ = solve_labels(head, problem.loss, variables, z, dz, problem.target_shape, scaled=False, fit=_CLOSE)
        kept.append(dataclasses.replace(c, target=bits))
    target = kept[0].target if kept else None
    return dataclasses.replace(outcome, candidates=tuple(kept), target=target)


_CLOSE = 1e-6  # of the largest entry of dL/dz: a label that leaves no more explains it
_NEAR = 2e-2  # of the same, under noise
