"""From images that match a whole gradient, or do not, to an `Outcome` an example: rank, symmetries, candidates."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from leakjax.attacks.gradient_residual import match_programs
from leakjax.attacks.outcomes import kept, split
from leakjax.attacks.problem import Outcome, Problem
from leakjax.attacks.ranks import DENSE_SIDE, NULL_SPACE
from leakjax.attacks.symmetries import twins
from leakjax.jacobian import jacobian_gram
from leakjax.memory import fits_in_memory
from leakjax.network import Gradient, batch_gradient
from leakjax.reconstruction import LayerInfo
from leakjax.solvers.linear import LsmrSolution, lsmr_condition


class Found(NamedTuple):
    """x (B, ...), its labels, ||r|| / size, and the steps spent."""

    x: np.ndarray
    labels: np.ndarray
    residual: float
    steps: int


def problem_gradient(problem: Problem) -> Gradient:
    """(variables, x, labels) -> {path: dL/dtheta}, for what was sent."""
    return batch_gradient(problem.network.logits, problem.loss, tuple(problem.gradients))


def given(problem: Problem, victim: int, labels: np.ndarray) -> tuple[Any, Any, Any]:
    """What the compiled programs take before x: weights, the gradient sent, labels."""
    sent = {p: jnp.asarray(g[victim]) for p, g in problem.gradients.items()}
    return dict(problem.variables), sent, jnp.asarray(labels)


def matched_outcomes(problem: Problem, victim: int, trials: list[Found]) -> list[Outcome]:
    """One example each: candidates inside the range, and the whole batch as the one "layer" that was solved.

    `trials`, best first: the others that match are candidates too, and so are the twins of each. What is certified is
    said of the answer that comes first.
    """
    n = trials[0].x.size
    matching = [trial for trial in trials if trial.residual <= problem.matched]
    ranks = [_local_rank(problem, victim, trial) for trial in matching] or [(None, None, None)]
    whole = bool(matching) and all(rank == n for rank, _, _ in ranks)
    answers = []
    for k, trial in enumerate(matching or trials[:1]):
        answers.append((trial.x, trial.labels, trial.residual, k))
        if matching:
            point = problem.variables, trial.x, trial.labels, problem.matched
            pairs = twins(problem.network.logits, problem_gradient(problem), problem.loss, *point)
            answers += [(images, tags, trial.residual, k) for images, tags in pairs]
    answers = kept(problem, answers, lambda answer: answer[0], whole=whole)
    if whole and not problem.in_range(answers[0][0]):
        answers = answers[:1]
    rank, seen, condition = ranks[answers[0][3]]
    status = "failed" if not matching else "determined" if rank == n else "deficient"
    deficiency = None if rank is None else rank - n
    steps = sum(trial.steps for trial in trials)
    info = LayerInfo("network", n, rank, deficiency, condition, answers[0][2], 0, steps, status)
    images = split([answer[:3] for answer in answers])
    return [Outcome(mine, (info,), None if seen is None else seen[b]) for b, mine in enumerate(images)]


def _local_rank(problem: Problem, victim: int, found: Found) -> tuple[int | None, np.ndarray | None, float]:
    """Rank of d g / d x at x, each entry's share in its row space, and its condition."""
    _, _, look, _ = match_programs(problem_gradient(problem), float(problem.tolerance))
    probe: LsmrSolution = look(*given(problem, victim, found.labels), jnp.asarray(found.x))
    condition, n = lsmr_condition(probe), found.x.size
    if float(probe.lost) <= NULL_SPACE:
        return n, np.ones(found.x.shape), condition
    single = np.dtype(problem.dtype) != np.float64  # squares of small singular values drown in its rounding
    if single or n > DENSE_SIDE or not fits_in_memory(4 * 8 * n**2):
        return None, None, condition
    gram = jacobian_gram(problem_gradient(problem))
    values, vectors = np.linalg.eigh(
        np.asarray(gram(dict(problem.variables), jnp.asarray(found.x), jnp.asarray(found.labels)))
    )
    large = values > 1e-13 * values[-1]
    seen = np.clip(np.sum(vectors[:, large] ** 2, axis=1), 0.0, 1.0).reshape(found.x.shape)
    condition = float(np.sqrt(values[-1] / values[large][0]))
    return int(np.sum(large)), seen, condition
