"""Which labels the examples behind a gradient may have had."""

import numpy as np
from jaxtyping import Int

from leakjax.attacks.problem import Problem
from leakjax.attacks.told import dummy_gradient
from leakjax.labels import rank_labels


def labelings(problem: Problem, victim: int, most: int) -> list[Int[np.ndarray, " B"]]:
    """The given labels alone, or up to `most` label vectors of one gradient, the most plausible first."""
    if problem.labels is not None:
        return [problem.labels[victim]]
    sent = {p: problem.gradients[p][victim] for p in problem.gradients}
    return rank_labels(
        problem.network.logits,
        dummy_gradient(problem),
        problem.variables,
        sent,
        problem.batch_shape,
        problem.input_range,
        most,
    )
