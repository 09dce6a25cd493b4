"""Which targets a head is read for: those that were given, every class, or the two that signs allow."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from leakjax.attacks.problem import Problem

_STILL = 1e-12  # of the largest entry of dL/dz: below it an output is where its label wants it


class Wanted(NamedTuple):
    """Of gradients of one example each: their targets (V, ...) where they were `given`, else the `classes` that each
    may be of, or `several` labels, 0 or 1 for every output, of `shape`; nothing where any numbers may be the target."""

    given: Shaped[np.ndarray, "V ..."] | None = None
    classes: tuple[int, ...] = ()
    several: bool = False
    shape: tuple[int, ...] = ()

    @property
    def free(self) -> bool:
        """Whether nothing is known of the target."""
        return self.given is None and not self.classes and not self.several

    @classmethod
    def of(cls, problem: Problem, victims: Sequence[int] | None = None) -> "Wanted":
        """What a problem of one example a gradient asks of its head, for some victims or all."""
        given = None if problem.labels is None else problem.labels[:, 0]
        if given is not None and victims is not None:
            given = given[np.asarray(victims)]
        return cls(given, tuple(problem.classes), problem.several, problem.target_shape)


def told(target: Shaped[np.ndarray, "..."]) -> tuple[int, Shaped[np.ndarray, "..."] | None]:
    """(label, target) as candidates have them: a class, or -1 and what it is no class of."""
    target = np.asarray(target)
    return (int(target), None) if not target.ndim and target.dtype.kind in "iu" else (-1, target)


def bits(
    direction: Shaped[np.ndarray, "..."], z: Shaped[np.ndarray, "..."], shape: Sequence[int]
) -> Shaped[np.ndarray, "..."]:
    """The labels, of `shape`, that push every output along `direction`, dL/dz: up for a 1, down for a 0.

    An output that is not pushed is on its label's side already (a hinge's margin is met), and has the sign of `z`.
    """
    d, z = np.asarray(direction).ravel(), np.asarray(z).ravel()
    pushed = np.abs(d) > _STILL * np.max(np.abs(d))
    return np.where(pushed, d < 0, z > 0).astype(np.int64).reshape(shape)
