"""Cholesky factors of normal matrices F^T F whose F moves what it reads no further than a few positions.

Entry (p, c) of the input of a convolution meets no other entry in F^T F than those of near positions. Cut into slabs of
whole rows, F^T F is block tridiagonal:

    F^T F + s I = L L^T,   L_ii L_ii^T = N_ii - L_i,i-1 L_i,i-1^T,   L_i,i-1 = N_i,i-1 L_i-1,i-1^-T

with a shift s of some roundings, so that directions that F hardly sees do not stop it; refinement takes it back where F
sees well.
A factor belongs to the weights of a model and serves every right-hand side, of all its clients.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int

_ROUNDING = 1e-12  # of the largest entry: what counts as 0 in a product with an impulse
_AGREES = 1e-9  # of the size of a product: how well the assembled matrix must reproduce it
_SHIFT = 1e-14  # of the largest row sum: above the rounding of a factor, below the square of what float64 resolves


class BandedFactor(NamedTuple):
    """L of n unknowns in `slabs` of `s` (the last padded by an identity), inverted on its diagonal.

    `inverse`: L_ii^-1; `below`: L_i,i-1, zeros for i = 0.
    """

    inverse: Float[Array, "slabs s s"]
    below: Float[Array, "slabs s s"]


def factor_bytes(shape: Sequence[int], reach: int) -> int:
    """Memory that the factor of an input of `shape` takes whose rows meet those up to `reach` away."""
    row = int(np.prod(shape[1:]))
    slab = max(reach, 1)
    return 8 * 2 * -(-shape[0] // slab) * (slab * row) ** 2


def solve_banded(factor: BandedFactor, b: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """(L L^T)^-1 b."""
    slabs, size, _ = factor.inverse.shape
    padded = jnp.zeros((slabs * size, b.shape[1]), b.dtype).at[: len(b)].set(b).reshape(slabs, size, -1)
    nothing = jnp.zeros((size, b.shape[1]), b.dtype)

    def forward(
        before: Float[Array, "s k"], given: tuple[Float[Array, "s s"], Float[Array, "s s"], Float[Array, "s k"]]
    ) -> tuple[Float[Array, "s k"], Float[Array, "s k"]]:
        inverse, below, right = given
        y = inverse @ (right - below @ before)
        return y, y

    def backward(
        carry: Float[Array, "s k"], given: tuple[Float[Array, "s s"], Float[Array, "s s"], Float[Array, "s k"]]
    ) -> tuple[Float[Array, "s k"], Float[Array, "s k"]]:
        inverse, below, y = given
        x = inverse.T @ (y - carry)
        return below.T @ x, x

    _, y = jax.lax.scan(forward, nothing, (factor.inverse, factor.below, padded))
    _, x = jax.lax.scan(backward, nothing, (factor.inverse, factor.below, y), reverse=True)
    return x.reshape(slabs * size, -1)[: len(b)]


def factor_gram(
    product: Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k n"]], shape: Sequence[int], most: int
) -> BandedFactor | None:
    """The factor of the symmetric matrix behind `product`, read from few products with combs of impulses.

    Arguments: `product`, v -> (N v) of several v at once, on inputs of `shape` (axes of positions, channels last),
    flat; `most`, the memory that the factor may take, in bytes. Returns None where N has negative eigenvalues, or is
    not the banded matrix that its impulses in the corners and the middle show. Raises `MemoryError` where its factor
    takes more memory.
    """
    if len(shape) < 2:
        return None
    reach = _reach(product, shape)
    if factor_bytes(shape, reach[0]) > most:
        raise MemoryError(f"a factor of {factor_bytes(shape, reach[0]):,} bytes does not fit into {most:,}")
    matrix = _assemble(product, shape, reach)
    probe = np.random.default_rng(0).normal(size=(1, int(np.prod(shape))))
    expected = product(probe)[0]
    if np.linalg.norm(matrix.multiply(probe[0]) - expected) > _AGREES * np.linalg.norm(expected):
        return None
    return matrix.factor()


class _Slabs(NamedTuple):
    """A block tridiagonal matrix: blocks N_ii, and N_i,i-1 (zeros for i = 0), of n unknowns, the rest an identity."""

    diagonal: Float[np.ndarray, "slabs s s"]
    below: Float[np.ndarray, "slabs s s"]
    unknowns: int

    def multiply(self, v: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        slabs, size, _ = self.diagonal.shape
        parts = np.pad(v, (0, slabs * size - len(v))).reshape(slabs, size)
        out = np.einsum("iab,ib->ia", self.diagonal, parts)
        out[1:] += np.einsum("iab,ib->ia", self.below[1:], parts[:-1])
        out[:-1] += np.einsum("iba,ib->ia", self.below[1:], parts[1:])
        return out.ravel()[: self.unknowns]

    def factor(self) -> BandedFactor | None:
        slabs, size, _ = self.diagonal.shape
        shift = _SHIFT * float(np.max(np.sum(np.abs(self.diagonal), axis=2) + np.sum(np.abs(self.below), axis=2)))
        inverse, below = np.zeros((slabs, size, size)), np.zeros((slabs, size, size))
        for i in range(slabs):
            block = self.diagonal[i] + shift * np.eye(size)
            if i:
                below[i] = self.below[i] @ inverse[i - 1].T
                block = block - below[i] @ below[i].T
            try:
                lower = scipy.linalg.cholesky(block, lower=True, check_finite=False)
            except scipy.linalg.LinAlgError:
                return None
            inverse[i] = scipy.linalg.solve_triangular(lower, np.eye(size), lower=True, check_finite=False)
        return BandedFactor(jnp.asarray(inverse), jnp.asarray(below))


def _reach(
    product: Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k n"]], shape: Sequence[int]
) -> tuple[int, ...]:
    """By axis of positions, how far an entry's row of N goes: of all channels at the corners and near the middle."""
    places = list(itertools.product(*({0, s // 2, max(s // 2 - 1, 0), s - 1} for s in shape[:-1])))
    impulses = np.zeros((len(places), *shape))
    for k, place in enumerate(places):
        impulses[k][place] = np.random.default_rng(k).normal(size=shape[-1])
    found = np.abs(product(impulses.reshape(len(places), -1)).reshape(len(places), *shape))
    reach = [0] * (len(shape) - 1)
    for k, place in enumerate(places):
        where = np.nonzero(found[k] > _ROUNDING * np.max(found[k], initial=0.0))
        for axis, at in enumerate(place):
            reach[axis] = max(reach[axis], int(np.max(np.abs(where[axis] - at), initial=0)))
    return tuple(reach)


def _assemble(
    product: Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k n"]],
    shape: Sequence[int],
    reach: Sequence[int],
) -> _Slabs:
    """N from products with combs: impulses of one channel that are too far apart to meet in one entry."""
    periods = [min(2 * r + 1, s) for r, s in zip(reach, shape[:-1], strict=True)]
    offsets = list(itertools.product(*(range(p) for p in periods), range(shape[-1])))
    combs = np.zeros((len(offsets), *shape))
    for comb, (*start, channel) in zip(combs, offsets, strict=True):
        comb[(*(slice(o, None, p) for o, p in zip(start, periods, strict=True)), channel)] = 1.0
    answers = product(combs.reshape(len(combs), -1)).reshape(len(combs), *shape)
    unknowns, row = int(np.prod(shape)), int(np.prod(shape[1:]))
    size = max(reach[0], 1) * row
    slabs = -(-unknowns // size)
    diagonal, below = np.zeros((slabs, size, size)), np.zeros((slabs, size, size))
    index = np.arange(unknowns).reshape(shape)
    for (*start, channel), answer in zip(offsets, answers, strict=True):
        columns = _sources(shape, reach, start, periods, channel, index)
        rows = np.nonzero(columns.ravel() >= 0)[0]
        values, columns = answer.ravel()[rows], columns.ravel()[rows]
        mine, theirs = rows // size, columns // size
        same, lower = mine == theirs, mine == theirs + 1
        diagonal[mine[same], rows[same] % size, columns[same] % size] = values[same]
        below[mine[lower], rows[lower] % size, columns[lower] % size] = values[lower]
    rest = np.arange(unknowns - (slabs - 1) * size, size)
    diagonal[-1, rest, rest] = 1.0
    return _Slabs(diagonal, below, unknowns)


def _sources(
    shape: Sequence[int],
    reach: Sequence[int],
    start: Sequence[int],
    periods: Sequence[int],
    channel: int,
    index: Int[np.ndarray, "..."],
) -> Int[np.ndarray, "..."]:
    """For every entry, the one impulse of a comb that it can meet, -1 where there is none."""
    nearest, valid = [], np.ones((), bool)
    for axis, (s, r, o, p) in enumerate(zip(shape[:-1], reach, start, periods, strict=True)):
        at = np.arange(s)
        k = o + np.round((at - o) / p).astype(int) * p if p > 2 * r else np.full(s, o)
        good = (k >= 0) & (k < s) & (np.abs(k - at) <= r)
        view = [1] * (len(shape) - 1)
        view[axis] = s
        nearest.append(np.where(good, k, 0).reshape(view))
        valid = valid & good.reshape(view)
    sources = np.where(valid, index[(*np.broadcast_arrays(*nearest), channel)], -1)
    return np.broadcast_to(sources[..., None], tuple(shape))
