"""Improved DLG (Zhao, Mopuri & Bilen, arXiv 2001.02610): the label first, then DLG on the image alone.

With one example and softmax cross-entropy dL/dz = p - onehot(y): one negative entry, and it is the label's.
"""

from leakjax.attacks.heads.labelings import likeliest_labels
from leakjax.attacks.matching.descent import match_by_descent
from leakjax.attacks.matching.dlg import DLG
from leakjax.attacks.problem import Monitor, Outcome, Problem


def idlg(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """`dlg` with the labels that the last layer's gradient shows, or that are given; counts for batches."""
    return match_by_descent(problem, monitor, DLG, likeliest_labels(problem))
