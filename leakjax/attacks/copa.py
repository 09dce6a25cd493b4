"""COPA (Chen & Campbell, arXiv 2111.10178): the recursion, with the pull-back constraint where a layer is deficient."""

from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.attacks.recursion import recurse


def copa(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """As `rgap`, but a layer whose system leaves directions open is solved together with the layers before it.

    Its constraints are pulled back segment by segment until they determine the unknown, or the input is reached.
    """
    return recurse(problem, monitor, pulling=True)
