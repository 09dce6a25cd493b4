"""Dense factorizations inside compiled programs, for several clients at once.

On CPUs a batched LAPACK call hands its members to the thread pool that it runs on, and two such calls at once may wait
for each other forever (seen with jaxlib 0.10: a Cholesky solve beside an `eigh`, batches of 8). There the members of a
batch go one after another, which costs nothing: each is as large as a core can use.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float


def _alone_on_cpus(function: Callable[..., Any]) -> Callable[..., Any]:
    one_by_one = sequential_vmap(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return jax.lax.platform_dependent(*arguments, cpu=one_by_one, default=function)

    return call


@_alone_on_cpus
def eigh(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """(eigenvalues, ascending; eigenvectors) of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@_alone_on_cpus
def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """L, lower, with L L^T = matrix; NaN where it is not positive definite."""
    return jnp.linalg.cholesky(matrix)


@_alone_on_cpus
def cholesky_solve(lower: Float[Array, "n n"], b: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """(L L^T)^-1 b."""
    return jax.scipy.linalg.cho_solve((lower, True), b)


@_alone_on_cpus
def triangular(matrix: Float[Array, "m n"]) -> Float[Array, "k n"]:
    """R of matrix = Q R, k = min(m, n)."""
    return jnp.linalg.qr(matrix, mode="r")


@_alone_on_cpus
def singular_values(matrix: Float[Array, "m n"]) -> Float[Array, " k"]:
    """The singular values, descending, k = min(m, n)."""
    return jnp.linalg.svd(matrix, compute_uv=False)


@_alone_on_cpus
def right_singular(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """(the singular values, descending; the right singular vectors as rows)."""
    _, values, rows = jnp.linalg.svd(matrix)
    return values, rows
