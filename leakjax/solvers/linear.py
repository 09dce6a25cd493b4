"""Minimum-norm least-squares solutions of linear operators: matrix-free LSMR, and a dense SVD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import numpy as np
from jaxtyping import Array, Float, Int


class LinearSolution(NamedTuple):
    """x and what the solver learned about the operator.

    - `residual`: ||A x - b|| / ||b||;
    - `condition`: largest over smallest non-zero singular value (an estimate, for LSMR);
    - `lost`: ||r - A^+ A r|| / ||r|| for a random r: 0 exactly where A has no null space, else near sqrt(k / n) for a
      null space of dimension k among n unknowns;
    - `steps`: LSMR steps taken.
    """

    x: Float[Array, "..."]
    residual: Float[Array, ""]
    condition: Float[Array, ""]
    lost: Float[Array, ""]
    steps: Int[Array, ""]


def solve_lsmr(
    operator: lx.AbstractLinearOperator, vector: Any, key: Array, *, tolerance: float | None = None, max_steps: int
) -> LinearSolution:
    """Minimum-norm least squares by LSMR (Fong & Saunders, SIAM J. Sci. Comput. 33, 2011), lineax's.

    A second right-hand side A r, r random, is solved beside the first one and answers whether A has a null space.
    """
    x = operator.in_structure()
    eps = float(jnp.finfo(x.dtype).eps)
    tolerance = eps if tolerance is None else tolerance
    solver = lx.LSMR(rtol=tolerance, atol=0.0, max_steps=max_steps, conlim=1.0 / eps)
    probe = jax.random.normal(key, x.shape, x.dtype)
    sides = jax.tree.map(lambda a, b: jnp.stack([a, b]), vector, operator.mv(probe))

    def solve(side: Any) -> Any:
        solution = lx.linear_solve(operator, side, solver, throw=False)
        return solution.value, solution.stats["num_steps"], solution.stats["cond_A"]

    (answer, recovered), steps, conditions = jax.vmap(solve)(sides)
    lost = jnp.linalg.norm(jnp.ravel(recovered - probe)) / jnp.linalg.norm(jnp.ravel(probe))
    return LinearSolution(answer, _relative_residual(operator, vector, answer), jnp.max(conditions), lost, steps[0])


def _relative_residual(operator: lx.AbstractLinearOperator, vector: Any, x: Any) -> Float[Array, ""]:
    error = jax.tree.map(lambda a, b: a - b, operator.mv(x), vector)
    size = optax.tree.norm(vector)
    return optax.tree.norm(error) / jnp.where(size > 0, size, 1.0)
