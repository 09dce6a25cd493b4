"""The Jacobian of a gradient at the images behind it, by dense matrices: rank, spectrum, leakage map, noise bound.

All follow from G = J^T J, J = dg/dx. Its rank bounds every attack near x; the projector P onto its row space has the
leakage map as diagonal. With Gaussian noise of variance s^2 in every gradient entry no unbiased attack has a covariance
below s^2 G^-1 (Cramer-Rao); with a Gaussian prior of covariance S an estimate is (G / s^2 + S^-1)^-1 (exact for linear
g; van Trees' inequality bounds the mean over images).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.constraints.priors import from_natural
from leakjax.leakage.factored import factored
from leakjax.runtime.programs import keep
from leakjax.solvers.jacobian import row_space

PRIOR_DEVIATION = 0.25  # of pixels in [0, 1]


class Leakage(NamedTuple):
    """`gram` (n, n) of J in units of pixels in [0, 1], its eigenvalues, ascending, and vectors; `rank`; the leakage
    `map` (B, *shape)."""

    gram: Float[np.ndarray, "n n"]
    values: Float[np.ndarray, " n"]
    vectors: Float[np.ndarray, "n n"]
    rank: int
    map: Float[np.ndarray, "B ..."]


def dense_leakage(gradient: Any, variables: Any, x: Any, labels: Any, scale: float) -> Leakage:
    """J^T J at images x (B, *shape) of a `network.batch_gradient`, and what follows from it.

    Arguments: `scale`, the width of the input range: one pixel's unit.
    """
    program = _gram_product(gradient)
    rows = sum(int(a.size) for a in jax.tree.leaves(jax.eval_shape(gradient, variables, x, labels)))
    found = row_space(lambda v: program(variables, x, labels, v), rows, x.size, x.dtype)
    values, vectors = scale**2 * found.values, found.vectors
    return Leakage(
        gram=(vectors * values) @ vectors.T,
        values=values,
        vectors=vectors,
        rank=found.rank,
        map=found.share.reshape(x.shape),
    )


def variances(leakage: Leakage, sigma: float) -> Float[np.ndarray, " n"]:
    """sigma^2 (J^T J)^-1, its diagonal: what noise leaves an unbiased attack; infinite where the rank is not full."""
    if leakage.rank < len(leakage.values):
        return np.full(len(leakage.values), np.inf)
    return sigma**2 * (leakage.vectors**2 @ (1.0 / leakage.values))


class WithPrior(NamedTuple):
    """Eigenvalues l, ascending, of R^T G R = W diag(l) W^T, S = R R^T, and their `basis` R W of images."""

    values: Float[np.ndarray, " n"]
    basis: Float[np.ndarray, "n n"]


def with_natural_prior(leakage: Leakage, shape: tuple[int, ...]) -> WithPrior:
    """G seen by images whose amplitudes fall as 1 / frequency, with deviation `PRIOR_DEVIATION` a pixel."""

    def natural(u: Array) -> Array:
        return PRIOR_DEVIATION * from_natural(u.reshape(shape)).ravel()

    root = np.asarray(jax.jit(jax.vmap(natural))(jnp.eye(len(leakage.values)))).T
    values, vectors = np.linalg.eigh(root.T @ leakage.gram @ root)
    return WithPrior(np.maximum(values, 0.0), root @ vectors)


def variance_with_prior(prior: WithPrior, sigma: float) -> float:
    """The mean over pixels of diag((G / sigma^2 + S^-1)^-1)."""
    return float(np.sum(np.mean(prior.basis**2, axis=0) / (prior.values / sigma**2 + 1.0)))


@keep(16)
def _gram_product(gradient: Any) -> Any:
    """(variables, x, labels, v (k, n)) -> rows J^T (J v), (k, n)."""

    def build(variables: Any, x: Any, labels: Any, v: Any) -> Any:
        _, tangent = jax.linearize(factored(gradient, variables, x, labels), x)
        adjoint = jax.linear_transpose(tangent, x)

        def column(e: Array) -> Array:
            return jnp.ravel(adjoint(tangent(e.reshape(x.shape)))[0])

        return jax.lax.map(column, v.astype(x.dtype), batch_size=16)

    return jax.jit(build)
