"""Which answers stand as candidates: those inside the input range, each once, best first."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from leakjax.attacks.problem import Labels, Problem
from leakjax.reconstruction import Candidate

T = TypeVar("T")


def kept(problem: Problem, answers: list[T], x: Callable[[T], Float[np.ndarray, "B ..."]], *, whole: bool) -> list[T]:
    """The answers whose images `x(answer)` lie in the input range, or all where none does.

    Where the images are not determined (`whole` False) another image of the same answer may lie inside: then all are
    kept, those that lie inside first.
    """
    inside = [answer for answer in answers if problem.in_range(x(answer))]
    outside = [answer for answer in answers if not problem.in_range(x(answer))]
    return inside if whole and inside else inside + outside


def split(
    answers: Sequence[tuple[Float[np.ndarray, "B ..."], Labels, float]], alike: float = 1e-7
) -> list[tuple[Candidate, ...]]:
    """Candidates of every example, from (images (B, ...), labels (B,) or targets (B, K), residual) of whole gradients.

    Best first.
    The examples of a gradient have no order: each answer is put into the order of the first. What several answers say
    `alike` of an example, by their relative difference, is one candidate.
    """
    first = answers[0][0].reshape(len(answers[0][0]), -1)
    found: list[list[Candidate]] = [[] for _ in first]
    for images, labels, residual in answers:
        distance = np.linalg.norm((first[:, None] - images.reshape(1, len(images), -1)).astype(float), axis=2)
        order = linear_sum_assignment(np.nan_to_num(distance, nan=1e150, posinf=1e150))
        for b, k in zip(*order, strict=True):
            classes = labels.ndim == 1 and labels.dtype.kind in "iu"
            label, target = (int(labels[k]), None) if classes else (-1, labels[k])
            if not any(label == c.label and _alike(images[k], c.image, alike) for c in found[b]):
                found[b].append(Candidate(images[k], label, residual, target))
    return [tuple(mine) for mine in found]


def _alike(a: Float[np.ndarray, "*image"], b: Float[np.ndarray, "*image"], tolerance: float) -> bool:
    return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b))
