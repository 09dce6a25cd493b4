"""R-GAP (Zhu & Blaschko, arXiv 2010.07733): the layer systems solved one after another, last layer to first."""

from leakjax.attacks.layerwise.recursion import recurse
from leakjax.attacks.problem import Monitor, Outcome, Problem


def rgap(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """Every segment's input is the minimum-norm least-squares solution of its own forward and gradient constraints."""
    return recurse(problem, monitor, pulling=False)
