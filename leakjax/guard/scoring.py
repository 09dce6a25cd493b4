"""What one outgoing update gives away about the batch behind it: a score cheap enough for a training loop."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from leakjax.guard.derivative import CHUNK, Derivative, each
from leakjax.guard.quadrature import errors_at_least
from leakjax.metrics import PSNR_CAP
from leakjax.solvers.lapack import eigh, right_singular, singular_values, triangular

OVERSAMPLING = 16


class Score(NamedTuple):
    """What an update u(x) gives away about the n pixels of its batch x, J = du/dx its Jacobian (parameters, n).

    - `leaked_dimensions`: the rank of J, or an upper bound of it; `leaked_fraction`: of the n pixels;
    - `predicted_psnr`: 10 log10(1 / mean squared error) in dB, pixels in [0, 1], that is left to an attacker who knows
      the prior, at most 350;
    - `worst_leaked_fraction`, `worst_psnr`: the same two of the image of which most leaks, or upper bounds of them; the
      share of an image is the mean over its pixels of the diagonal of J^+ J, the projector onto the row space of J;
    - `allowed`: whether all is within the limits, and nothing keeps the score from being one;
    - `reason`: why it is not allowed, a sum of `LIMIT` ... `NOT_FINITE`, 0 where it is; `explain` puts it in words.
    """

    leaked_dimensions: Float[Array, ""]
    leaked_fraction: Float[Array, ""]
    predicted_psnr: Float[Array, ""]
    worst_leaked_fraction: Float[Array, ""]
    worst_psnr: Float[Array, ""]
    allowed: Bool[Array, ""]
    reason: Int[Array, ""]


LIMIT, BLIND, OUTSIDE, STILL, NOT_FINITE = 1, 2, 4, 8, 16
REASONS = {
    LIMIT: "more leaks than the limits allow",
    BLIND: "no derivative sees through {spots}: what passes there is not counted, and may be the images themselves",
    OUTSIDE: "pixels lie outside input_range, in whose unit noise and PSNR are",
    STILL: "the update depends on the images but its derivative at them is zero (all-zero or saturated weights?): "
    "nothing can be counted",
    NOT_FINITE: "the update or its derivative is not finite",
}


def explain(score: Score, spots: Sequence[str] = ()) -> str:
    """Why a score's update is not allowed, in words; "allowed" where it is. `spots`: operations that hide images."""
    code, named = int(score.reason), " and ".join(spots) or "an operation of the model"
    return "; ".join(words.format(spots=named) for bit, words in REASONS.items() if code & bit) or "allowed"


class Leak(NamedTuple):
    """rank(J), the mean error in units of the prior's variance, and both of the worst image (rank as a fraction)."""

    dimensions: Array
    error: Array
    worst_fraction: Array
    worst_error: Array


def exact(j: Derivative, key: Array, ridge: float) -> Leak:
    """`leaked_exactly` and `errors_exactly`; `ridge` = (noise / prior)^2, 0 without noise: then the error of the batch
    is 1 - rank / n, and that of an image 1 - its share of the rank."""
    rank, basis = leaked_exactly(j, key)
    fraction, leaked = rank / j.start.size, jnp.arange(j.start.size) < rank
    worst = jnp.max(_shares(j, basis, leaked)) if j.examples > 1 else fraction
    if not ridge:
        return Leak(rank, 1.0 - fraction, worst, 1.0 - worst)
    errors = errors_exactly(j, basis, leaked, ridge)
    return Leak(rank, jnp.mean(errors), worst, jnp.min(errors))


def sketch(j: Derivative, key: Array, ridge: float, probes: int, steps: int, blocks: int) -> Leak:
    """Upper bounds of the rank and of an image's share, lower ones of the errors (but for sampling); `ridge` as above.

    No image of B has more than all of what the batch gives away: its share is at most min(1, B rank / n), its error at
    least 1 - B (1 - error of the batch). With `blocks` = B and noise every image's own error is bounded, at B times the
    passes that `blocks` = 1 takes; the share has the count alone.
    """
    starts = jax.random.rademacher(key, (probes, j.start.size), j.start.dtype)
    dimensions = leaked_at_most(j, each(j.forward, starts))
    fraction = dimensions / j.start.size
    error, least = 1.0 - fraction, jnp.zeros_like(fraction)
    if ridge:
        errors = errors_at_least(j, starts, ridge, steps, blocks).astype(error.dtype)
        error, least = jnp.maximum(error, jnp.mean(errors)), jnp.min(errors) if blocks == j.examples else least
    worst_error = jnp.maximum(least, j.examples * error - (j.examples - 1))
    return Leak(dimensions, error, jnp.minimum(1.0, j.examples * fraction), worst_error)


def leaked_exactly(j: Derivative, key: Array) -> tuple[Array, Float[Array, "n n"]]:
    """rank(J) as the number of singular values of S diag(weights) J, S (5n/4 + 16, P) of random signs, above rounding;
    and its right singular vectors as rows, of which the first rank(J) span the row space of J.

    The sketch keeps the rank (but for a probability that is rounding) and the singular values within a factor of about
    twenty, and squares nothing, hence it is good in float32 too: there the directions below 32 eps sqrt(9n/4) times
    the largest, which the update's own rounding hides, are not counted. 5n/4 + 16 reverse passes, memory 5n^2/4.
    Reference: Halko, Martinsson & Tropp 2011, arXiv 0909.4061, section 4.
    """
    n, parameters, dtype = j.start.size, j.weights.size, j.start.dtype

    def row(key: Array) -> Array:
        return j.adjoint(j.weights * jax.random.rademacher(key, (parameters,), dtype))

    rows = jax.lax.map(row, jax.random.split(key, n + n // 4 + OVERSAMPLING), batch_size=CHUNK)
    values, basis = right_singular(triangular(rows))
    return _count(values, rows), basis


def leaked_at_most(j: Derivative, columns: Float[Array, "k P"]) -> Array:
    """An upper bound of rank(J) from k random directions: `columns` are J omega_1 ... J omega_k, omega of random signs.

    min(n, the parameters whose row of J is not zero); where rank(J Omega) < k it is that number, which is then rank(J)
    itself. So k probes decide every limit below k / n; above, the count decides, which is close for narrow networks
    and large batches, and n for all others.
    """
    n, probes = j.start.size, columns.shape[0]
    live = jnp.count_nonzero(jnp.any(columns != 0, axis=0))
    rank = _rank(columns * j.weights[None])
    return jnp.minimum(n, jnp.where(rank < probes, rank, live))


def errors_exactly(
    j: Derivative, basis: Float[Array, "n n"], leaked: Bool[Array, " n"], ridge: float
) -> Float[Array, " B"]:
    """Mean over the pixels of each image of the diagonal of t (J^T J + t)^-1, t = `ridge`: mean squared error / prior
    variance; over the batch (1/n) sum_k t / (s_k^2 + t), s_k the singular values of J.

    From the Gram matrix J^T J within the row space, which the `leaked` rows of the `basis` span: there its eigenvalues
    are at least rounding of the largest, outside 0, so that no error is above the truth by more than rounding.
    n forward and reverse passes, memory n^2.
    """
    gram = jax.lax.map(lambda d: j.adjoint(j.forward(d)), basis, batch_size=CHUNK) @ basis.T
    inside = leaked[:, None] & leaked[None]
    apart = -jnp.max(jnp.diag(gram))  # below every eigenvalue of the row space, hence no eigenvector is of both
    gram = jnp.where(inside, 0.5 * (gram + gram.T), jnp.diag(jnp.where(leaked, 0.0, apart)))
    values, vectors = eigh(gram)
    rounding = 4 * jnp.finfo(gram.dtype).eps * values[-1]
    values = jnp.where(leaked[::-1], jnp.maximum(values, rounding), 0.0)
    errors = jnp.square(basis.T @ vectors) @ (ridge / (values + ridge))
    return jnp.mean(errors.reshape(j.examples, -1), axis=1)


def score_of(
    leak: Leak, pixels: int, prior: float, fraction_limit: float, limit: float, worst: bool, faults: Array
) -> Score:
    """The score of an update that leaks so much of `pixels`; the limits are on the `worst` image or on the batch.

    Arguments: `faults`, the sum of what keeps the numbers from being a score, 0 for nothing.
    """
    fraction = (leak.dimensions / pixels).astype(jnp.float32)
    means = fraction, _psnr(leak.error, prior)
    worsts = leak.worst_fraction.astype(jnp.float32), _psnr(leak.worst_error, prior)
    limited = worsts if worst else means
    within = (limited[0] <= fraction_limit) & (limited[1] <= limit)
    reason = faults + jnp.where(within, 0, LIMIT).astype(jnp.int32)
    lost = (faults & ~STILL) != 0
    share, psnr, worst_share, worst_psnr = (
        jnp.where(lost, most, value) for most, value in zip((1.0, PSNR_CAP) * 2, (*means, *worsts), strict=True)
    )
    dimensions = jnp.where(lost, float(pixels), leak.dimensions.astype(jnp.float32))
    return Score(
        leaked_dimensions=dimensions,
        leaked_fraction=share,
        predicted_psnr=psnr,
        worst_leaked_fraction=worst_share,
        worst_psnr=worst_psnr,
        allowed=reason == 0,
        reason=reason,
    )


def _psnr(error: Array, prior: float) -> Array:
    psnr = -10.0 * jnp.log10(jnp.maximum(error.astype(jnp.float32) * prior**2, 10.0 ** (-PSNR_CAP / 10.0)))
    return jnp.minimum(psnr, PSNR_CAP)


def _shares(j: Derivative, basis: Float[Array, "n n"], leaked: Bool[Array, " n"]) -> Float[Array, " B"]:
    """Mean over each image's pixels of the projector's diagonal; 1 where it is but for rounding."""
    diagonal = jnp.sum(jnp.where(leaked[:, None], jnp.square(basis), 0.0), axis=0)
    shares = jnp.mean(diagonal.reshape(j.examples, -1), axis=1)
    return jnp.where(shares > 1.0 - _rounding(basis), 1.0, shares)


def _rank(matrix: Float[Array, "a b"]) -> Array:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return _count(singular_values(triangular(tall)), matrix)


def _count(values: Float[Array, " n"], matrix: Float[Array, "a b"]) -> Array:
    """How many singular values of the matrix stand out of rounding; all of them where they are not finite."""
    count = jnp.count_nonzero(values > _rounding(matrix) * values[0])
    return jnp.where(jnp.isfinite(values[0]), count, values.size)


def _rounding(matrix: Float[Array, "a b"]) -> float:
    return 32 * math.sqrt(sum(matrix.shape)) * float(jnp.finfo(matrix.dtype).eps)
