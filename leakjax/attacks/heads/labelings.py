"""Which labels the examples behind a gradient may have had."""

import numpy as np
from jaxtyping import Float, Int

from leakjax.attacks.adaptive import all_sent, dummy_gradient
from leakjax.attacks.heads.labels import rank_labels
from leakjax.attacks.heads.single import read_head
from leakjax.attacks.heads.wanted import Wanted
from leakjax.attacks.problem import Problem
from leakjax.errors import InputError

TARGETS_REMEDY = "give them (labels=..., what the loss compares each example's outputs with)"


def labelings(problem: Problem, victim: int, most: int) -> list[Int[np.ndarray, " B"] | Float[np.ndarray, "B K"]]:
    """The given labels or the target alone, or up to `most` label vectors of one gradient, the most plausible first."""
    if problem.labels is not None:
        return [problem.labels[victim]]
    target = problem.target(victim)
    if target is not None:
        return [target[None]]
    if not problem.classes:
        raise InputError(
            f"the targets of this loss are no classes, and the last layer does not show them; {TARGETS_REMEDY}"
        )
    sent = {p: np.asarray(g) for p, g in all_sent(problem, victim).items()}
    return rank_labels(
        problem.network.logits,
        dummy_gradient(problem),
        problem.variables,
        sent,
        problem.batch_shape,
        problem.input_range,
        most,
    )


def likeliest_labels(problem: Problem) -> Int[np.ndarray, "V B"]:
    """One label vector of every gradient: the given one, what the head's gradient shows of an example, or counts.

    Of several explanations of a head the one that fits best.
    """
    heads = _head_labels(problem)
    return np.stack([heads[v] if v in heads else labelings(problem, v, 1)[0] for v in range(problem.victims)])


def _head_labels(problem: Problem) -> dict[int, Int[np.ndarray, " 1"]]:
    """By victim; empty for batches, given labels, and models whose last segment is no affine map with parameters."""
    head = None if problem.chain is None else problem.chain.segments[-1]
    if problem.labels is not None or problem.examples > 1 or head is None or not (head.linear and head.paths):
        return {}
    sent = {p: np.asarray(problem.gradients[p], problem.dtype) for p in head.paths}
    found = read_head(
        head,
        problem.variables,
        sent,
        problem.loss,
        wanted=Wanted.of(problem),
        tolerance=problem.tolerances.solve,
        accept=problem.tolerances.matched,
    ).candidates
    best = sorted(found, key=lambda candidate: -candidate.residual)
    return {c.victim: np.array([c.label]) if c.target is None else c.target[None] for c in best}
