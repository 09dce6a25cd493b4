"""A matrix made ready for minimum-norm solutions and for projections onto its null space, by Cholesky factors."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from leakjax.solvers.null_space import null_space

_SHIFT = 1e-13


class NullProjection(NamedTuple):
    """`basis` B (r, n): B^T B is the projector onto the null space of A where `null`, else onto its row space.

    `used` rows of A are not 0; `factor` L and `rows` solve with them.
    """

    basis: Float[np.ndarray, "r n"]
    null: bool
    used: Bool[np.ndarray, " m"]
    factor: Float[np.ndarray, "k k"]
    rows: Float[np.ndarray, "l n"]

    def solve(self, vector: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
        """A^+ b of a consistent right-hand side b (m,)."""
        vector = vector[self.used]
        if self.null:
            return scipy.linalg.cho_solve((self.factor, True), self.rows.T @ vector, check_finite=False)
        return self.rows.T @ scipy.linalg.solve_triangular(self.factor, vector, lower=True, check_finite=False)

    @property
    def seen(self) -> Float[np.ndarray, " n"]:
        """The diagonal of the projector onto the row space: the share of each unknown that A determines."""
        share = np.clip(np.sum(self.basis**2, axis=0), 0.0, 1.0)
        return 1.0 - share if self.null else share


def null_projection(matrix: Float[np.ndarray, "m n"], guess: int) -> NullProjection | None:
    """Of A (m, n), whose null space has about `guess` dimensions; None where there is no telling them, and
    where A is zero or not finite.

    With no more rows than columns B = L^{-1} A, L L^T = A A^T + shift (singular values far below 1e-6 of the largest
    are not seen). Else B is `null_space`'s N, and L L^T = A^T A + s N N^T.
    """
    used = np.any(matrix != 0, axis=1)
    rows = np.asarray(matrix[used], np.float64)
    if not len(rows) or not np.all(np.isfinite(rows)):
        return None
    if len(rows) <= rows.shape[1]:
        gram = rows @ rows.T
        gram[np.diag_indices(len(gram))] += max(_SHIFT * np.trace(gram), np.finfo(float).tiny)
        factor = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
        basis = scipy.linalg.solve_triangular(factor, rows, lower=True, check_finite=False)
        return NullProjection(basis=basis, null=False, used=used, factor=factor, rows=basis)
    null = null_space(rows, guess)
    if null is None or null.shape[1] == 0:
        return None
    gram = rows.T @ rows
    gram += (np.trace(gram) / len(gram)) * (null @ null.T)
    return NullProjection(
        basis=null.T.copy(), null=True, used=used, factor=scipy.linalg.cholesky(gram, lower=True), rows=rows
    )
