"""The Jacobian of a gradient at the images behind it, by dense matrices: rank, spectrum, leakage map, noise bound.

All follow from G = J^T J, J = dg/dx. Its rank bounds every attack near x; the projector P onto its row space has the
leakage map as diagonal. With Gaussian noise of variance s^2 in every gradient entry no unbiased attack has a covariance
below s^2 G^-1 (Cramer-Rao); with a Gaussian prior of covariance S an estimate is (G / s^2 + S^-1)^-1 (exact for linear
g; van Trees' inequality bounds the mean over images).
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.constraints.priors import from_natural
from leakjax.leakage.factored import factored_by_parameter
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.programs import keep
from leakjax.solvers.jacobian import LANES, in_lanes, in_one_shape, row_space

PRIOR_DEVIATION = 0.25  # of pixels in [0, 1]


WRITTEN = 8
"""Up to so many rows for every column J is written down: J^T J and all products with it are then those of a matrix."""


class Leakage(NamedTuple):
    """`gram` (n, n) of J in units of pixels in [0, 1], its eigenvalues, ascending, and vectors; `rank`; the leakage
    `map` (B, *shape)."""

    gram: Float[np.ndarray, "n n"]
    values: Float[np.ndarray, " n"]
    vectors: Float[np.ndarray, "n n"]
    rank: int
    map: Float[np.ndarray, "B ..."]


class Jacobian(NamedTuple):
    """J of a gradient at images x (B, *shape), parameter by parameter.

    - `product`: (v (k, n), the paths of some parameters) -> J^T J v by rows, of these parameters' J alone;
    - `gram`: the paths of some parameters -> J^T J (n, n) of these, where J is written down; else None;
    - `rows`: how many numbers each parameter's gradient has.
    """

    product: Callable[[Float[np.ndarray, "k n"], Collection[str]], Float[np.ndarray, "k n"]]
    gram: Callable[[Collection[str]], Float[np.ndarray, "n n"]] | None
    rows: Mapping[str, int]
    shape: tuple[int, ...]
    dtype: Any

    def leakage(self, scale: float, paths: Collection[str]) -> Leakage:
        """What the gradients of the parameters `paths` say; `scale`: the width of the input range, one pixel's unit."""
        rows = sum(self.rows[path] for path in paths)
        gram = None if self.gram is None else self.gram(paths)
        found = row_space(lambda v: self.product(v, paths), rows, math.prod(self.shape), self.dtype, gram=gram)
        values, vectors = scale**2 * found.values, found.vectors
        return Leakage(
            gram=(vectors * values) @ vectors.T,
            values=values,
            vectors=vectors,
            rank=found.rank,
            map=found.share.reshape(self.shape),
        )


def jacobian(gradient: Any, variables: Any, x: Any, labels: Any) -> Jacobian:
    """J of a `network.batch_gradient` at images x (B, *shape)."""
    point, n = (variables, x, labels), x.size
    sizes = {path: int(a.size) for path, a in jax.eval_shape(gradient, *point).items()}
    columns = _columns(gradient)
    unit = np.eye(LANES * -(-n // LANES), n)
    numbers = sum(int(a.shape[1]) for a in jax.tree.leaves(columns.trace(*point, unit, n).out_info))
    if numbers <= WRITTEN * n and fits_in_memory(3 * 8 * numbers * n):
        written = {path: np.asarray(a, np.float64)[:n] for path, a in columns(*point, unit, n).items()}
        return Jacobian(
            product=lambda v, paths: _with_matrices(written, v, paths),
            gram=lambda paths: _squared(written, n, paths),
            rows=sizes,
            shape=x.shape,
            dtype=x.dtype,
        )
    program = _gram_product(gradient)

    def product(v: Float[np.ndarray, "k n"], paths: Collection[str]) -> Float[np.ndarray, "k n"]:
        kept = {path: np.asarray(path in paths, x.dtype) for path in sizes}
        return in_one_shape(lambda v, count: program(*point, kept, v, count), v)

    return Jacobian(product=product, gram=None, rows=sizes, shape=x.shape, dtype=x.dtype)


def dense_leakage(gradient: Any, variables: Any, x: Any, labels: Any, scale: float) -> Leakage:
    """J^T J at images x (B, *shape) of a `network.batch_gradient`, and what follows from it.

    Arguments: `scale`, the width of the input range: one pixel's unit.
    """
    found = jacobian(gradient, variables, x, labels)
    return found.leakage(scale, found.rows)


def _with_matrices(
    written: Mapping[str, Float[np.ndarray, "n m"]], v: Float[np.ndarray, "k n"], paths: Collection[str]
) -> Float[np.ndarray, "k n"]:
    """J^T J v by rows, from the transposed J of each parameter."""
    found = np.zeros(v.shape)
    for path in paths:
        found += (v @ written[path]) @ written[path].T
    return found


def _squared(
    written: Mapping[str, Float[np.ndarray, "n m"]], n: int, paths: Collection[str]
) -> Float[np.ndarray, "n n"]:
    """J^T J from the transposed J of each parameter: a symmetric product takes half the work of any other."""
    found = np.zeros((n, n))
    for path in paths:
        found += written[path] @ written[path].T
    return found


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
def _columns(gradient: Any) -> Any:
    """(variables, x, labels, v (k, n), j) -> rows J v, (k, m) for each parameter, of the first j of v."""

    def build(variables: Any, x: Any, labels: Any, v: Any, count: Any) -> Any:
        tangent = jax.linearize(factored_by_parameter(gradient, variables, x, labels), x)[1]

        def column(e: Array) -> dict[str, Array]:
            parts = tangent(e.reshape(x.shape))
            return {path: jnp.concatenate([jnp.zeros(0, x.dtype), *map(jnp.ravel, p)]) for path, p in parts.items()}

        return in_lanes(column, v.astype(x.dtype), count)

    return jax.jit(build)


@keep(16)
def _gram_product(gradient: Any) -> Any:
    """(variables, x, labels, weights by parameter, v (k, n), j) -> rows J^T W J v, (k, n), of the first j of v."""

    def build(variables: Any, x: Any, labels: Any, weights: Any, v: Any, count: Any) -> Any:
        tangent = jax.linearize(factored_by_parameter(gradient, variables, x, labels), x)[1]
        adjoint = jax.linear_transpose(tangent, x)

        def column(e: Array) -> Array:
            parts = tangent(e.reshape(x.shape))
            return jnp.ravel(adjoint({path: [weights[path] * a for a in p] for path, p in parts.items()})[0])

        return in_lanes(column, v.astype(x.dtype), count)

    return jax.jit(build)
