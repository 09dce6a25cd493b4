"""What one outgoing update gives away about the batch behind it: a score cheap enough for a training loop."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from leakjax.jacobian import inverse_norms
from leakjax.metrics import PSNR_CAP

CHUNK = 16  # directions that go through the network together
OVERSAMPLING = 16


class Score(NamedTuple):
    """What an update u(x) gives away about the n pixels of its batch x, J = du/dx its Jacobian (parameters, n).

    - `leaked_dimensions`: the rank of J, or an upper bound of it; `leaked_fraction`: of the n pixels;
    - `predicted_psnr`: 10 log10(1 / mean squared error) in dB, pixels in [0, 1], that is left to an attacker who knows
      the prior, at most 350;
    - `allowed`: whether both are within the limits.

    All are of the whole batch: an image may leak more than the mean of its batch does.
    """

    leaked_dimensions: Float[Array, ""]
    leaked_fraction: Float[Array, ""]
    predicted_psnr: Float[Array, ""]
    allowed: Bool[Array, ""]


class Derivative(NamedTuple):
    """J = du/dx of an update at one batch: `forward(d)` = J d (P,), `adjoint(c)` = J^T c (n,), `weights` (P,)."""

    forward: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]
    weights: Float[Array, " P"]
    start: Float[Array, " n"]


def linearize_update(update: Callable[[Any], Any], images: Float[Array, "B ..."]) -> Derivative:
    """The derivative of `update(images)`, a pytree of P numbers; its weights are 1 / ||u_p|| of every array u_p.

    The rank of J is that of diag(weights) J, whose rows are of one size: early and late layers' gradients differ by
    orders of magnitude, and rounding in the larger would hide the smaller.
    """

    def flat(x: Array) -> Array:
        return _ravel(update(x.reshape(images.shape)), x.dtype)

    start = jnp.ravel(images)
    _, forward = jax.linearize(flat, start)
    transposed = jax.linear_transpose(forward, start)
    at_x = [a.astype(start.dtype) for a in jax.tree.leaves(update(images)) if _floating(a)]
    sizes = [jnp.broadcast_to(w, a.shape) for w, a in zip(inverse_norms(at_x), at_x, strict=True)]
    weights = _ravel(sizes, start.dtype)
    return Derivative(forward, lambda c: transposed(c)[0], jnp.where(jnp.isfinite(weights), weights, 1.0), start)


def exact(j: Derivative, key: Array, ridge: float) -> tuple[Array, Array]:
    """rank(J), and `error_exactly`; `ridge` = (noise / prior)^2, 0 without noise: then the error is 1 - rank / n."""
    rank = leaked_exactly(j, key)
    return rank, error_exactly(j, rank, ridge) if ridge else 1.0 - rank / j.start.size


def sketch(j: Derivative, key: Array, ridge: float, probes: int, steps: int) -> tuple[Array, Array]:
    """An upper bound of rank(J), and a lower one of the error (but for sampling); `ridge` as for `exact`."""
    starts = jax.random.rademacher(key, (probes, j.start.size), j.start.dtype)
    dimensions = leaked_at_most(j, _each(j.forward, starts))
    floor = 1.0 - dimensions / j.start.size
    if not ridge:
        return dimensions, floor
    return dimensions, jnp.maximum(floor, error_at_least(j, starts, ridge, steps).astype(floor.dtype))


def leaked_exactly(j: Derivative, key: Array) -> Array:
    """rank(J) as the number of singular values of S diag(weights) J, S (5n/4 + 16, P) of random signs, above rounding.

    The sketch keeps the rank (but for a probability that is rounding) and the singular values within a factor of about
    twenty, and squares nothing, hence it is good in float32 too: there the directions below 32 eps sqrt(9n/4) times
    the largest, which the update's own rounding hides, are not counted. 5n/4 + 16 reverse passes, memory 5n^2/4.
    Reference: Halko, Martinsson & Tropp 2011, arXiv 0909.4061, section 4.
    """
    n, parameters, dtype = j.start.size, j.weights.size, j.start.dtype

    def row(key: Array) -> Array:
        return j.adjoint(j.weights * jax.random.rademacher(key, (parameters,), dtype))

    return _rank(jax.lax.map(row, jax.random.split(key, n + n // 4 + OVERSAMPLING), batch_size=CHUNK))


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


def error_exactly(j: Derivative, rank: Array, ridge: float) -> Array:
    """(1/n) sum_k t / (s_k^2 + t), s_k the singular values of J, t = `ridge`: mean squared error / prior variance.

    From the eigenvalues of the Gram matrix J^T J; all but the `rank` largest are 0, and these are at least rounding of
    the largest, so that this is never above the truth by more than rounding. n forward and reverse passes, memory n^2.
    """
    n, dtype = j.start.size, j.start.dtype
    gram = jax.lax.map(lambda d: j.adjoint(j.forward(d)), jnp.eye(n, dtype=dtype), batch_size=CHUNK)
    values = jnp.linalg.eigvalsh(gram)[::-1]
    rounding = 4 * jnp.finfo(dtype).eps * values[0]
    values = jnp.where(jnp.arange(n) < rank, jnp.maximum(values, rounding), 0.0)
    return jnp.mean(ridge / (values + ridge))


def error_at_least(j: Derivative, starts: Float[Array, "k n"], ridge: float, steps: int) -> Array:
    """Stochastic Lanczos quadrature of (1/n) tr t (J^T J + t)^-1, t = `ridge`: mean over random signs v of a m-point
    Gauss rule for v^T t (J^T J + t)^-1 v / ||v||^2.

    A Gauss rule never exceeds its integral here, whatever the number m of `steps`, so but for the sampling the error is
    a lower bound and the PSNR an upper one; relative standard deviation of the sampling at most sqrt(2 / (k n e)), e
    the result. k m forward and reverse passes.
    Reference: Golub & Meurant, Matrices, Moments and Quadrature, 2010, theorem 6.2 and chapter 11.
    """

    def rule(v: Array) -> Array:
        values, vectors = jnp.linalg.eigh(_lanczos(lambda d: j.adjoint(j.forward(d)), v, steps))
        return jnp.sum(vectors[0] ** 2 * ridge / (jnp.maximum(values, 0.0) + ridge))

    return jnp.mean(_each(rule, starts, steps))


def score_of(dimensions: Array, error: Array, pixels: int, prior: float, fraction_limit: float, limit: float) -> Score:
    """The score of an update that leaks so many `dimensions` and leaves `error` of the prior's variance."""
    fraction = (dimensions / pixels).astype(jnp.float32)
    psnr = -10.0 * jnp.log10(jnp.maximum(error.astype(jnp.float32) * prior**2, 10.0 ** (-PSNR_CAP / 10.0)))
    psnr = jnp.minimum(psnr, PSNR_CAP)
    allowed = (fraction <= fraction_limit) & (psnr <= limit)
    return Score(dimensions.astype(jnp.float32), fraction, psnr, allowed)


def _each(function: Callable[[Array], Array], rows: Float[Array, "k n"], passes: int = 1) -> Array:
    """The function, of so many `passes`, of every row. Few are written out: convolutions are slow in loops on CPUs."""
    if rows.shape[0] * passes <= CHUNK:
        return jnp.stack([function(row) for row in rows])
    return jax.lax.map(function, rows, batch_size=CHUNK)


def _lanczos(apply: Callable[[Array], Array], v: Array, steps: int) -> Float[Array, "m m"]:
    """The tridiagonal matrix of m = `steps` Lanczos steps from v, each orthogonalized twice; 0 after a breakdown."""
    eps = jnp.finfo(v.dtype).eps
    basis, diagonal, beside = [v / jnp.linalg.norm(v)], [], []
    for _ in range(steps):
        image, before = apply(basis[-1]), jnp.stack(basis)
        diagonal.append(basis[-1] @ image)
        rest = image - (before @ image) @ before
        rest = rest - (before @ rest) @ before
        size = jnp.linalg.norm(rest)
        size = jnp.where(size > 10 * eps * jnp.linalg.norm(image), size, 0.0)
        basis.append(jnp.where(size > 0, rest / jnp.where(size > 0, size, 1.0), 0.0))
        beside.append(size)
    off = jnp.diag(jnp.stack(beside)[:-1], 1) if steps > 1 else jnp.zeros((1, 1), v.dtype)
    return jnp.diag(jnp.stack(diagonal)) + off + off.T


def _rank(matrix: Float[Array, "a b"]) -> Array:
    """How many singular values stand out of rounding; all of them where they are not finite."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    values = jnp.linalg.svd(jnp.linalg.qr(tall, mode="r"), compute_uv=False)
    rounding = 32 * math.sqrt(sum(matrix.shape)) * float(jnp.finfo(matrix.dtype).eps)
    count = jnp.count_nonzero(values > rounding * values[0])
    return jnp.where(jnp.isfinite(values[0]), count, values.size)


def _floating(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def _ravel(tree: Any, dtype: Any) -> Array:
    return jnp.concatenate([jnp.ravel(a).astype(dtype) for a in jax.tree.leaves(tree) if _floating(a)])
