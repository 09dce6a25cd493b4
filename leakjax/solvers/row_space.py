"""The row space of a matrix, by one Cholesky factor: minimum-norm solutions, and projections onto the null space."""

from typing import NamedTuple

import numpy as np
import scipy.linalg

_SHIFT = 1e-13


class RowSpace(NamedTuple):
    """`rows` Q (m, n) with Q^T Q the projector onto the row space of A, and what turns a right-hand side into Q^T's."""

    rows: np.ndarray
    rotation: np.ndarray | None
    factor: np.ndarray

    def solve(self, vector: np.ndarray) -> np.ndarray:
        """A^+ b of a consistent right-hand side b (m,)."""
        turned = vector if self.rotation is None else self.rotation.T @ vector
        return self.rows.T @ scipy.linalg.solve_triangular(self.factor, turned, lower=True, check_finite=False)

    @property
    def seen(self) -> np.ndarray:
        """The diagonal of the projector: the share of each unknown that A determines."""
        return np.clip(np.sum(self.rows**2, axis=0), 0.0, 1.0)


def row_space(matrix: np.ndarray) -> RowSpace:
    """Q = L^{-1} A where L L^T = A A^T + shift: singular values far below 1e-6 of the largest are not seen.

    A matrix with more rows than columns is first rotated to a square one.
    """
    matrix, rotation = np.asarray(matrix, np.float64), None
    if len(matrix) > matrix.shape[1]:
        rotation, matrix = np.linalg.qr(matrix)
    gram = matrix @ matrix.T
    gram[np.diag_indices(len(gram))] += max(_SHIFT * np.trace(gram), np.finfo(float).tiny)
    factor = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
    rows = scipy.linalg.solve_triangular(factor, matrix, lower=True, check_finite=False)
    return RowSpace(rows, rotation, factor)
