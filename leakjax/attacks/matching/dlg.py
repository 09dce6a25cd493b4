"""Deep Leakage from Gradients (Zhu, Liu & Han, arXiv 1906.08935): image and label together, by L-BFGS.

    min_{x, l}  ||d/dtheta loss(model(x), softmax(l)) - g||^2

from x, l ~ N(0, 1), by L-BFGS with learning rate 1 and no line search, as in the authors' code: 300 calls of PyTorch's
optimizer with up to 20 iterations each. The label is the largest entry of l.
"""

import optax
from jaxtyping import Array, Int

from leakjax.attacks.matching.descent import Limits, Recipe, match_by_descent, squared_distance
from leakjax.attacks.problem import Monitor, Outcome, Problem

RATE, MEMORY = 1.0, 100  # PyTorch's, as the authors use it
STEPS = 300 * 20
PATIENCE = 500


def lbfgs(steps: int | Int[Array, ""], limits: Limits) -> optax.GradientTransformation:
    """L-BFGS with fixed steps."""
    del steps, limits
    return optax.lbfgs(RATE, memory_size=MEMORY, linesearch=None)


DLG = Recipe(squared_distance, lbfgs, STEPS, PATIENCE)


def dlg(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """Match every victim's gradient by images and soft labels; labels that are given are kept."""
    return match_by_descent(problem, monitor, DLG, problem.labels)
