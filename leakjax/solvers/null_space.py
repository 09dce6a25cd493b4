"""Null spaces of matrices, by the shifted Gram matrix: several times as fast as singular values."""

import numpy as np
import scipy.linalg

_SHIFT = 1e-13
_NULL, _SEEN = 1e-9, 1e-7  # singular values below and above, relative to the largest; nothing may lie in between


def null_space(matrix: np.ndarray, guess: int) -> np.ndarray | None:
    """Orthonormal N (n, k) with matrix @ N = 0 for a matrix (m, n) of which k is about `guess`.

    Inverse subspace iteration on A^T A + shift: what A does not see grows, all else decays. None where the matrix has
    no clear gap between the singular values that are 0 and the others.
    """
    matrix = np.asarray(matrix, np.float64)
    n = matrix.shape[1]
    gram = matrix.T @ matrix
    largest = np.sqrt(_largest_eigenvalue(gram))
    gram[np.diag_indices(n)] += _SHIFT * np.trace(gram)
    factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
    columns = min(n, int(1.1 * guess) + 16)
    while True:
        basis = np.random.default_rng(0).normal(size=(n, columns))
        for _ in range(2):
            basis = np.linalg.qr(scipy.linalg.cho_solve(factor, basis, overwrite_b=True, check_finite=False))[0]
        image = matrix @ basis
        _, s, vt = np.linalg.svd(image, full_matrices=len(image) < columns)
        s = np.pad(s, (0, columns - len(s)))
        null = s < _NULL * largest
        if np.all(null) and columns < n:
            columns = min(n, 2 * columns)
            continue
        if np.any((s >= _NULL * largest) & (s < _SEEN * largest)):
            return None
        return basis @ vt[null].T


def _largest_eigenvalue(gram: np.ndarray) -> float:
    vector = np.random.default_rng(1).normal(size=len(gram))
    for _ in range(20):
        vector = gram @ (vector / np.linalg.norm(vector))
    return float(np.linalg.norm(vector))
