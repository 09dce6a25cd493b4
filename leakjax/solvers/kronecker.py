"""Systems of two blocks, F x = a and K x_c = b_c for every column x_c of x (positions, channels): one small K for all.

With K^T K = V diag(lambda) V^T, the directions of V that K sees well are solved by K alone, for all channels at once. F
closes the others: in coordinates c along them, x = x_K + V_w c,

    min |F x_K + F V_w c - a|^2 + |K V_w c - (b - K x_K)|^2

a system that is small and well conditioned where K sees nothing of V_w and F does; LSMR solves it in few steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int

from leakjax.solvers.lapack import cholesky, cholesky_solve, eigh
from leakjax.solvers.linear import inverse_power
from leakjax.solvers.lsmr import Lsmr, lsmr

WEAK = 1e-3
"""Singular values of K below this share of the largest are left to F: what K alone then loses, 1e3 roundings, a second
round gives back; a larger share would leave directions to LSMR that K sees well, and steps with them (cnn6's second
layer: 59 at 1e-3, 111 at 0.05)."""

MOST_STEPS = 300
"""LSMR steps for the weak directions: 32 suffice at condition 3, 300 at 30; a system that needs more is not closed."""


class Spectrum(NamedTuple):
    """Eigenvectors and eigenvalues of K^T K, and which of them K sees well."""

    vectors: Float[Array, "p p"]
    values: Float[Array, " p"]
    strong: Bool[Array, " p"]


class BlockSolution(NamedTuple):
    """x; the least singular value of K that was solved by K alone; LSMR's steps on what K leaves, and the first round's
    own with their alphas and betas."""

    x: Float[Array, "p c"]
    least: Float[Array, ""]
    steps: Int[Array, ""]
    recorded: Int[Array, ""]
    alphas: Float[Array, " max_steps"]
    betas: Float[Array, " max_steps"]


def spectrum(k: Float[Array, "m p"]) -> Spectrum:
    """The spectrum of K^T K."""
    values, vectors = eigh(k.T @ k)
    largest = jnp.maximum(values[-1], 0.0)
    return Spectrum(vectors, values, (values > WEAK**2 * largest) & (values > 0))


def solve_blocks(
    forward: Callable[[Float[Array, "p c"]], Float[Array, "..."]],
    k: Float[Array, "m p"],
    seen: Spectrum,
    a: Float[Array, "..."],
    b: Float[Array, "m c"],
    tolerances: Float[Array, " rounds"],
    *,
    most_weak: int,
) -> BlockSolution:
    """x with F x = a and K x = b, exact where both hold and no more than `most_weak` directions are weak.

    `tolerances`: of the rounds; each begins with a residual that is computed anew.
    """
    inverses = jnp.where(seen.strong, 1.0 / jnp.where(seen.strong, seen.values, 1.0), 0.0)
    onto = jnp.where(seen.strong[None, :most_weak], 0.0, seen.vectors[:, :most_weak])
    image = k @ onto

    def by_k(right: Float[Array, "m c"]) -> Float[Array, "p c"]:
        return seen.vectors @ (inverses[:, None] * (seen.vectors.T @ (k.T @ right)))

    def rest(c: Float[Array, "q c"]) -> tuple[Float[Array, "..."], Float[Array, "m c"]]:
        return forward(onto @ c), image @ c

    struct = jax.eval_shape(lambda: image.T @ b)  # with the mesh that it is on, where there is one
    operator = lx.FunctionLinearOperator(rest, struct)

    def round(x: Float[Array, "p c"], tolerance: Float[Array, ""]) -> tuple[Float[Array, "p c"], Lsmr]:
        x = x + by_k(b - k @ x)
        found = lsmr(operator, (a - forward(x), b - k @ x), tolerance=tolerance, max_steps=MOST_STEPS)
        return x + onto @ found.x, found

    x, found = jax.lax.scan(round, jnp.zeros((k.shape[1], b.shape[1]), k.dtype), tolerances)
    x = x + by_k(b - k @ x)
    least = jnp.sqrt(1.0 / jnp.maximum(jnp.max(inverses), jnp.finfo(k.dtype).tiny))
    return BlockSolution(
        x=x,
        least=least,
        steps=jnp.sum(found.steps),
        recorded=found.steps[0],
        alphas=found.alphas[0],
        betas=found.betas[0],
    )


def solve_full(
    k: Float[Array, "m p"], b: Float[Array, "m c"], start: Float[Array, "p 1"]
) -> tuple[Float[Array, "p c"], Float[Array, ""]]:
    """(x with K x = b, the least singular value of K) for K of full column rank: by Cholesky of K^T K, then corrected.

    Squared, K's condition costs digits that two corrections by its own residual give back up to conditions of 1e7
    (Björck 1987, corrected seminormal equations). `start` begins an inverse power iteration.
    """
    gram = k.T @ k
    lower = cholesky(gram)

    x = jnp.zeros((k.shape[1], b.shape[1]), k.dtype)
    for _ in range(3):
        x = x + cholesky_solve(lower, k.T @ (b - k @ x))

    return x, inverse_power(lambda v: cholesky_solve(lower, v), start)
