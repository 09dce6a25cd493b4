"""Null spaces of matrices, by the shifted Gram matrix: several times as fast as singular values."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Float, Int
from scipy.sparse.csgraph import connected_components

_SHIFT = 1e-13
_NULL, _SEEN = 1e-9, 1e-7  # singular values below and above, relative to the largest; nothing may lie in between
_SPARSE = 0.1  # density of a Gram matrix below which it is factorized as a sparse one


def null_space(matrix: Float[np.ndarray, "m n"], guess: int) -> Float[np.ndarray, "n k"] | None:
    """Orthonormal N (n, k) with matrix @ N = 0 for a matrix (m, n) of which k is about `guess`.

    Inverse subspace iteration on A^T A + shift: what A does not see grows, all else decays. None where the matrix has
    no clear gap between the singular values that are 0 and the others.
    """
    matrix = np.asarray(matrix, np.float64)
    n = matrix.shape[1]
    if not np.all(np.isfinite(matrix)):
        return None
    if not np.any(matrix):
        return np.eye(n)
    matrix = matrix / np.max(np.abs(matrix))  # squares neither overflow nor vanish
    sparse = scipy.sparse.csr_array(matrix)
    gram = sparse.T @ sparse if sparse.nnz < _SPARSE * matrix.size else matrix.T @ matrix
    largest = np.sqrt(_largest_eigenvalue(gram))
    solve = _inverse(gram, _SHIFT * gram.trace())
    columns = min(n, int(1.1 * guess) + 16)
    while True:
        basis = np.random.default_rng(0).normal(size=(n, columns))
        for _ in range(2):
            basis = np.linalg.qr(solve(basis))[0]
        image = sparse @ basis if sparse.nnz < _SPARSE * matrix.size else matrix @ basis
        _, s, vt = np.linalg.svd(image, full_matrices=len(image) < columns)
        s = np.pad(s, (0, columns - len(s)))
        null = s < _NULL * largest
        if np.all(null) and columns < n:
            columns = min(n, 2 * columns)
            continue
        if np.any((s >= _NULL * largest) & (s < _SEEN * largest)):
            return None
        return basis @ vt[null].T


def stacked_null_space(
    first: Float[np.ndarray, "l n"], second: Float[np.ndarray, "m n"], guess: int
) -> Float[np.ndarray, "n k"] | None:
    """`null_space` of two blocks of rows, where `first` falls apart into components that share no column.

    N = N_1 N_2, N_1 the null space of `first`, component by component, N_2 that of second @ N_1: a gradient block
    holds one and the same small matrix for every input channel.
    """
    pieces = _components(first)
    if len(pieces) == 1:
        return null_space(np.concatenate([first, second]), guess)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for rows, columns in pieces:
        small = first[np.ix_(rows, columns)]
        s, vt = np.linalg.svd(small, full_matrices=True)[1:] if len(rows) else (np.zeros(0), np.eye(len(columns)))
        s = np.pad(s, (0, len(columns) - len(s)))
        largest = np.max(s, initial=0.0)
        if np.any((s >= _NULL * largest) & (s < _SEEN * largest) & (s > 0)):
            return None
        parts.append((columns, vt[s <= _NULL * largest].T))
    seen = np.concatenate([second[:, columns] @ null for columns, null in parts], axis=1)
    inner = null_space(seen, guess) if seen.shape[1] else np.zeros((0, 0))
    if inner is None:
        return None
    basis, start = np.zeros((first.shape[1], inner.shape[1])), 0
    for columns, null in parts:
        basis[columns] = null @ inner[start : start + null.shape[1]]
        start += null.shape[1]
    return basis


def _components(matrix: Float[np.ndarray, "m n"]) -> list[tuple[Int[np.ndarray, " r"], Int[np.ndarray, " c"]]]:
    """(rows, columns) of every connected component of a matrix's non-zero pattern; columns of zeros are one each."""
    rows = len(matrix)
    pattern = scipy.sparse.csr_array(matrix != 0)
    graph = scipy.sparse.block_array([[None, pattern], [pattern.T, None]])
    count, owner = connected_components(graph, directed=False)
    order = np.argsort(owner, kind="stable")
    groups = np.split(order, np.searchsorted(owner[order], np.arange(1, count)))
    split = [(group[group < rows], group[group >= rows] - rows) for group in groups]
    return [(r, c) for r, c in split if len(c)]


def _inverse(
    gram: Float[np.ndarray, "n n"] | Any, shift: float
) -> Callable[[Float[np.ndarray, "n k"]], Float[np.ndarray, "n k"]]:
    """b -> (gram + shift)^-1 b."""
    if isinstance(gram, np.ndarray):
        gram[np.diag_indices(len(gram))] += shift
        factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
        return lambda b: scipy.linalg.cho_solve(factor, b, check_finite=False)
    shifted = scipy.sparse.csc_array(gram + shift * scipy.sparse.eye_array(gram.shape[0]))
    return scipy.sparse.linalg.splu(shifted, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve


def _largest_eigenvalue(gram: Float[np.ndarray, "n n"] | Any) -> float:
    vector = np.random.default_rng(1).normal(size=gram.shape[0])
    for _ in range(20):
        vector = gram @ (vector / np.linalg.norm(vector))
    return float(np.linalg.norm(vector))
