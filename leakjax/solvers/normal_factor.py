"""A map F, factored once for all right-hand sides: x with F x = a, but for the few directions that F hardly sees.

The factor is that of F^T F (`banded`). It squares the condition of F, which refinement makes up for where F sees well;
the weak directions, at most `MOST_WEAK`, are kept as a basis V, to be closed by other rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.solvers.banded import BandedFactor, factor_gram, solve_banded
from leakjax.solvers.linear import inverse_power

WEAK = 1e-3
"""Singular values below this share of the largest count as weak: above it a solve by the squared factor and two
refinements is exact to 1e3 roundings."""

MOST_WEAK = 96
"""A basis of more takes longer to close than the iterations that it replaces (cnn6: 600 steps)."""

_ROUNDS = 5  # of inverse iteration on a block: 1e-2 of a singular value's square a round, for those a tenth of the cut
_STEPS = 6  # of a power iteration: the largest singular value to some per cent


class NormalFactor(NamedTuple):
    """The factor of F^T F; V (n, k), orthonormal, and the least singular value of F outside of it."""

    banded: BandedFactor
    weak: Float[Array, "n k"]
    least: Float[Array, ""]


def factor_map(
    gram: Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k n"]],
    shape: Sequence[int],
    most: int,
) -> NormalFactor | None:
    """The factor of a map F on inputs of `shape`; None where it has none, or F sees too little.

    Arguments: `gram`, v -> F^T F v of several flat v at once; `most`, the memory that the factor may take, in bytes.
    Raises `MemoryError` where it takes more (see `factor_gram`).
    """
    banded = factor_gram(gram, shape, most)
    if banded is None:
        return None
    unknowns = int(np.prod(shape))
    rng = np.random.default_rng(0)
    start = rng.normal(size=(unknowns, 1))
    largest = _power(gram, start[:, 0])
    least = float(_least(banded, jnp.asarray(start, banded.inverse.dtype)))
    count = 0
    while least < WEAK * largest and count < MOST_WEAK:
        count = min(2 * count or MOST_WEAK // 4, MOST_WEAK, unknowns)
        basis = rng.normal(size=(unknowns, count))
        for _ in range(_ROUNDS):
            basis = np.linalg.qr(np.asarray(_solve(banded, jnp.asarray(basis, banded.inverse.dtype))))[0]
        values, turn = np.linalg.eigh(gram(basis.T) @ basis)
        if np.sqrt(max(values[-1], 0.0)) >= WEAK * largest or count == unknowns:
            return _factor(banded, basis @ turn, float(np.sqrt(max(values[-1], 0.0))))
    if least < WEAK * largest:
        return None
    return _factor(banded, np.zeros((unknowns, 0)), least)


def _factor(banded: BandedFactor, weak: Float[np.ndarray, "n k"], least: float) -> NormalFactor:
    dtype = banded.inverse.dtype
    return NormalFactor(banded, jnp.asarray(weak, dtype), jnp.asarray(least, dtype))


def _power(gram: Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k n"]], v: Float[np.ndarray, " n"]) -> float:
    """The largest singular value of F, to some per cent."""
    size = 1.0
    for _ in range(_STEPS):
        v = gram((v / np.linalg.norm(v))[None])[0]
        size = float(np.linalg.norm(v))
    return float(np.sqrt(size))


@jax.jit
def _solve(banded: BandedFactor, b: Float[Array, "n k"]) -> Float[Array, "n k"]:
    return solve_banded(banded, b)


@jax.jit
def _least(banded: BandedFactor, start: Float[Array, "n 1"]) -> Float[Array, ""]:
    return inverse_power(lambda v: solve_banded(banded, v), start)
