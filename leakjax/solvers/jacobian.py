"""The Jacobian of a gradient with respect to the images behind it, as a dense Gram matrix where small; its rank.

ONE rule of rank: a singular value counts where it is above t = `rank_tolerance` times the largest, s_1. A matrix (m, n)
whose entries were rounded by relative errors e of random signs differs from the exact one by a matrix of norm about
e (sqrt(m) + sqrt(n)) s_1 at most (Bai & Yin), hence its singular values move by no more than that (Weyl): those above
are of the exact matrix, those below may be nothing but rounding. A derivative accumulates some tens of roundings an
entry; the factor is 32.

The eigenvalues of a Gram matrix J^T J are squares, rounded in units of eps s_1^2: of singular values below
sqrt(eps) s_1 they say nothing. `row_space` refines what they leave unclear.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from leakjax.runtime.programs import keep

ROUNDINGS = 32
LANES = 16


def inverse_norms(gradients: PyTree[Float[Array, "..."]], least: float = 0.0) -> PyTree[Float[Array, ""]]:
    """1 / ||g_p|| of every parameter; one whose gradient is rounding beside the others', below a share `least` of all
    of them together and in any case 1e4 roundings, counts as rounding."""
    share = max(1e4 * float(jnp.finfo(jax.tree.leaves(gradients)[0].dtype).eps), least)
    floor = share * optax.tree.norm(gradients)
    return jax.tree.map(lambda g: 1.0 / jnp.maximum(jnp.linalg.norm(g), floor), gradients)


@keep(16)
def jacobian_product(gradient: Callable[..., PyTree[Float[Array, "..."]]]) -> Callable[..., Float[Array, "k n"]]:
    """(variables, x, labels, v (k, n), j) -> J^T J v by rows, the first j of them, J the Jacobian of the gradient's
    parameters, each divided by its norm; see `in_one_shape`."""

    def build(
        variables: PyTree[Shaped[Array, "..."]],
        x: Float[Array, "*shape"],
        labels: PyTree[Shaped[Array, "..."]],
        v: Float[Array, "k n"],
        count: Any,
    ) -> Float[Array, "k n"]:
        at_x, tangent = jax.linearize(lambda x: gradient(variables, x, labels), x)
        over = inverse_norms(at_x)

        def weighted(d: Float[Array, "*shape"]) -> PyTree[Float[Array, "..."]]:
            return jax.tree.map(jnp.multiply, over, tangent(d))

        adjoint = jax.linear_transpose(weighted, x)
        return in_lanes(lambda d: jnp.ravel(adjoint(weighted(d.reshape(x.shape)))[0]), v, count)

    return jax.jit(build)


def in_lanes(
    function: Callable[[Float[Array, " n"]], PyTree[Float[Array, " m"]]], v: Float[Array, "k n"], count: Any
) -> PyTree[Float[Array, "k m"]]:
    """`function` of the first `count` rows of `v`, `LANES` at a time, k a multiple of it; beyond them mostly zeros.

    `count` may be an argument of the program that this stands in, which then serves every number of rows.
    """

    def some(i: Any, found: PyTree[Float[Array, "k m"]]) -> PyTree[Float[Array, "k m"]]:
        rows = jax.vmap(function)(jax.lax.dynamic_slice_in_dim(v, LANES * i, LANES))
        return jax.tree.map(lambda f, r: jax.lax.dynamic_update_slice_in_dim(f, r, LANES * i, 0), found, rows)

    shapes = jax.eval_shape(function, jax.ShapeDtypeStruct(v.shape[1:], v.dtype))
    start = jax.tree.map(lambda s: jnp.zeros((len(v), *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, -(-count // LANES), some, start)


def in_one_shape(
    program: Callable[[Float[np.ndarray, "k n"], int], Float[Array, "k m"]], v: Float[np.ndarray, "j n"]
) -> Float[np.ndarray, "j m"]:
    """program(v, j), whose v has zeros below up to k >= n rows, k a multiple of `LANES`: for every j the same k.

    A program is compiled for one shape, which takes longer than to run it; see `in_lanes`.
    """
    rows = LANES * -(-max(v.shape) // LANES)
    padded = np.concatenate([v, np.zeros((rows - len(v), v.shape[1]), v.dtype)])
    return np.asarray(program(padded, len(v)))[: len(v)]


def rank_tolerance(rows: int, columns: int, dtype: Any = np.float64) -> float:
    """t = 32 (sqrt(m) + sqrt(n)) eps: singular values at or below t times the largest are rounding."""
    return ROUNDINGS * (math.sqrt(rows) + math.sqrt(columns)) * float(jnp.finfo(dtype).eps)


class RowSpace(NamedTuple):
    """Eigenvalues of J^T J (n,), ascending, their vectors (n, n) as columns, and how many are above the rule of rank.

    The last `rank` vectors span the row space; `share` (n,) is the diagonal of the projector onto it.
    """

    values: Float[np.ndarray, " n"]
    vectors: Float[np.ndarray, "n n"]
    rank: int

    @property
    def share(self) -> Float[np.ndarray, " n"]:
        """How much of each unknown the row space holds: 1 where J determines it, 0 where J does not see it."""
        kept = self.vectors[:, len(self.values) - self.rank :]
        return np.clip(np.sum(kept**2, axis=1), 0.0, 1.0)


def row_space(
    product: Callable[[Float[np.ndarray, "k n"]], Float[Array | np.ndarray, "k n"]],
    rows: int,
    columns: int,
    dtype: Any = np.float64,
    forward: Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k m"]] | None = None,
    gram: Float[np.ndarray, "n n"] | None = None,
) -> RowSpace:
    """The rank and row space of J (m, n) from products v -> J^T (J v) of rows v, by the rule of this module.

    G = J^T J = V diag(l) V^T is formed and diagonalized. Its eigenvalues are good to some n eps l_1; what lies above
    counts. What lies below is a subspace V_0 that the larger directions still contaminate, to first order by
    L^-1 V_1^T G V_0. That is subtracted, with the product J^T (J V_0) formed anew, in which J V_0 is small before it is
    squared; then V_0^T J^T J V_0, diagonalized, has its larger singular values, and again a subspace below them, until
    the small ones are known down to rounding of s_1 itself.

    Arguments: `rows`, `columns`, the shape of J; `dtype`, in which `product` computes; `forward`, v -> J v of rows v,
    for what is small to be squared after it was summed: through a normalization J^T (J v) is rounded in units far above
    those of J v, as its parts cancel; `gram`, J^T J where it is known already.
    """

    def gram_of(basis: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        image = np.asarray(product(np.ascontiguousarray(basis.T)), np.float64).reshape(basis.shape[1], columns)
        return image.T

    gram = gram_of(np.eye(columns)) if gram is None else gram
    seen = np.diagonal(gram) != 0  # J e_i = 0 elsewhere: behind a max-pool three of four entries
    tolerance = rank_tolerance(rows, columns, dtype)
    values, vectors = np.zeros(columns), np.zeros((columns, columns))
    hidden = columns - int(np.count_nonzero(seen))
    vectors[np.flatnonzero(~seen), np.arange(hidden)] = 1.0
    if hidden < columns:
        found = _diagonalized(gram[np.ix_(seen, seen)], seen, gram_of, forward, tolerance, dtype)
        values[hidden:], vectors[seen, hidden:] = found
    rank = int(np.sum(values > tolerance**2 * values[-1]))
    return RowSpace(values, vectors, rank)


def _diagonalized(
    gram: Float[np.ndarray, "s s"],
    seen: Bool[np.ndarray, " n"],
    gram_of: Callable[[Float[np.ndarray, "n k"]], Float[np.ndarray, "n k"]],
    forward: Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k m"]] | None,
    tolerance: float,
    dtype: Any,
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, "s s"]]:
    """Eigenvalues, ascending up to those that were refined, and vectors of the columns of J that are `seen`."""

    def among_all(basis: Float[np.ndarray, "s k"]) -> Float[np.ndarray, "n k"]:
        whole = np.zeros((len(seen), basis.shape[1]))
        whole[seen] = basis
        return whole

    values, vectors = np.linalg.eigh(0.5 * (gram + gram.T))
    resolved = max(64 * len(seen) * float(jnp.finfo(dtype).eps), tolerance**2)
    open_ = int(np.sum(values <= resolved * values[-1]))
    while open_:
        kept, rest = vectors[:, open_:], vectors[:, :open_]
        rest = rest - kept @ ((kept.T @ gram_of(among_all(rest))[seen]) / values[open_:, None])
        factor = np.linalg.cholesky(rest.T @ rest)  # I + C^T C, C what was subtracted: well-conditioned
        rest = scipy.linalg.solve_triangular(factor, rest.T, lower=True).T
        if forward is None:
            inner = rest.T @ gram_of(among_all(rest))[seen]
        else:
            images = np.asarray(forward(np.ascontiguousarray(among_all(rest).T)), np.float64)
            inner = images @ images.T
        found, rotation = np.linalg.eigh(0.5 * (inner + inner.T))
        values[:open_], vectors[:, :open_] = found, rest @ rotation
        drowned = resolved * np.sqrt(max(found[-1], 0.0) * values[-1])  # J v has an error of eps s_1, whatever v
        left = int(np.sum(found <= max(drowned, tolerance**2 * values[-1])))
        open_ = left if forward is None and left < open_ else 0
    return np.maximum(values, 0.0), vectors
