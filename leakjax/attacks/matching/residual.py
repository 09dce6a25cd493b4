"""The gradient's own residual, and the compiled programs that solve it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from leakjax.attacks.adaptive import Sent
from leakjax.attacks.problem import DeviceLabels
from leakjax.constraints.priors import from_natural, to_natural
from leakjax.models.reader import Arrays
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.gauss_newton import NewtonSolution, continuation, levenberg_marquardt
from leakjax.solvers.linear import LsmrSolution, solve_side

Residual = Callable[..., PyTree[Float[Array, "..."]]]
"""(x (B, ...), smoothing=None) -> weighted rows by parameter, and those of a prior."""

OUTER, INNER = 80, 3000
SMOOTHING, SHARPEST = 0.5, 1e-6


class Compare(NamedTuple):
    """How a prediction is compared, fixed when programs are compiled: the map (variables, x, labels, smoothing) to it,
    the input range, whether signs alone count, and whether the target was fitted with x (it may be any numbers)."""

    gradient: Gradient
    limits: tuple[float, float]
    signs: bool = False
    free: bool = False


class MatchPrograms(NamedTuple):
    """Compiled, of (variables, sent, labels, starts): `solve` from several starts, `smooth` the same with kinks
    smoothed and sharpened again; of (variables, sent, labels, x): `look`, the probe of the Jacobian at x, `misfit`,
    ||r|| / size there; with rows v besides: `products`, J^T J v."""

    solve: Callable[..., NewtonSolution]
    smooth: Callable[..., NewtonSolution]
    look: Callable[..., LsmrSolution]
    misfit: Callable[..., Float[Array, ""]]
    products: Callable[..., Float[Array, "k n"]]


@keep(16)
def match_programs(compare: Compare, tolerance: float, forcing: float = 1e-2) -> MatchPrograms:
    """The programs that match a gradient, compiled once for an architecture.

    `tolerance`: relative, of the rows; `forcing`: of the steps, relative to the rows that are left.
    """

    def residual(variables: Arrays, sent: Sent, labels: DeviceLabels) -> tuple[Residual, Float[Array, ""]]:
        return residual_of(compare, variables, sent, labels), jnp.sqrt(float(len(sent.gradient)))

    def solve(variables: Arrays, sent: Sent, labels: DeviceLabels, starts: Float[Array, "S B ..."]) -> NewtonSolution:
        function, size = residual(variables, sent, labels)

        def one(start: Float[Array, "B ..."]) -> NewtonSolution:
            options = {"size": size, "tolerance": 10 * tolerance, "forcing": forcing}
            return levenberg_marquardt(function, start, max_steps=OUTER, max_inner=INNER, **options)

        return vmap_several(one, (0,))(starts)

    def smooth(variables: Arrays, sent: Sent, labels: DeviceLabels, starts: Float[Array, "S B ..."]) -> NewtonSolution:
        function, size = residual(variables, sent, labels)

        def one(start: Float[Array, "B ..."]) -> NewtonSolution:
            options = {"smoothing": SMOOTHING, "sharpest": SHARPEST, "tolerance": 1e-8, "size": size}
            return continuation(function, start, max_steps=2 * OUTER, max_inner=INNER, **options)

        return vmap_several(one, (0,))(starts)

    def look(variables: Arrays, sent: Sent, labels: DeviceLabels, x: Float[Array, "B ..."]) -> LsmrSolution:
        rows, tangent = jax.linearize(residual(variables, sent, labels)[0], x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return solve_side(operator, rows, jnp.asarray(True), tolerance=tolerance, max_steps=2 * INNER)

    def misfit(variables: Arrays, sent: Sent, labels: DeviceLabels, x: Float[Array, "B ..."]) -> Float[Array, ""]:
        function, size = residual(variables, sent, labels)
        return optax.tree.norm(function(x)) / size

    def products(
        variables: Arrays, sent: Sent, labels: DeviceLabels, x: Float[Array, "B ..."], v: Float[Array, "k n"]
    ) -> Float[Array, "k n"]:
        tangent = jax.linearize(residual(variables, sent, labels)[0], x)[1]
        adjoint = jax.linear_transpose(tangent, x)
        return jax.lax.map(lambda d: jnp.ravel(adjoint(tangent(d.reshape(x.shape)))[0]), v, batch_size=16)

    return MatchPrograms(*map(jax.jit, (solve, smooth, look, misfit, products)))


def residual_of(compare: Compare, variables: Arrays, sent: Sent, labels: DeviceLabels) -> Residual:
    """r(x, smoothing), by parameter, and the amplitudes of x where the prior has a weight."""
    rows = _sign_rows if compare.signs else _weighted_rows
    middle = 0.5 * (compare.limits[0] + compare.limits[1])

    def function(
        x: Float[Array, "B ..."], smoothing: float | Float[Array, ""] | None = None
    ) -> PyTree[Float[Array, "..."]]:
        found = jax.tree.map(rows, sent.weights, compare.gradient(variables, x, labels, smoothing), sent.gradient)
        return found if sent.prior is None else (found, sent.prior * to_natural(x - middle))

    return function


def _weighted_rows(
    w: Float[Array, ""] | Float[Array, "*shape"], g: Float[Array, "*shape"], s: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    return w * (g - s)


def _sign_rows(
    w: Float[Array, ""] | Float[Array, "*shape"], g: Float[Array, "*shape"], s: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """g / ||g|| where its sign is not s."""
    del w
    size = jnp.linalg.norm(g)
    return jnp.where(jnp.sign(g) == s, 0.0, g) / jnp.where(size > 0, size, 1.0)


class DenseRows(NamedTuple):
    """r, (r, J^T), and r''(d, d)."""

    row: Callable[..., Float[Array, " m"]]
    jacobian: Callable[..., tuple[Float[Array, " m"], Float[Array, "n m"]]]
    curvature: Callable[..., Float[Array, " m"]]


def with_derivatives(row: Callable[..., Float[Array, " m"]]) -> DenseRows:
    """A residual `row(*given, u (n,))`, compiled with its derivatives by u; d follows u."""

    def jacobian(*given: Any) -> tuple[Float[Array, " m"], Float[Array, "n m"]]:
        *known, u = given
        r, tangent = jax.linearize(functools.partial(row, *known), u)
        return r, jax.lax.map(tangent, jnp.eye(u.size, dtype=u.dtype), batch_size=32)

    def curvature(*given: Any) -> Float[Array, " m"]:
        *known, u, d = given
        function = functools.partial(row, *known)
        return jax.jvp(lambda u: jax.jvp(function, (u,), (d,))[1], (u,), (d,))[1]

    return DenseRows(*map(jax.jit, (row, jacobian, curvature)))


@keep(16)
def dense_rows(compare: Compare) -> DenseRows:
    """Compiled, of (variables, sent, labels, start, u (n,)): r, (r, J^T), and with a direction d r''(d, d), all in the
    coordinates u of x = start + from_natural(u): a damped step in them is a smooth one."""

    def row(
        variables: Arrays, sent: Sent, labels: DeviceLabels, start: Float[Array, "B ..."], u: Float[Array, " n"]
    ) -> Float[Array, " m"]:
        x = start + from_natural(u.reshape(start.shape))
        return ravel_pytree(residual_of(compare, variables, sent, labels)(x))[0]

    return with_derivatives(row)
