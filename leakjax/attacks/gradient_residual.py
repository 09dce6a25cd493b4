"""The gradient's own residual, and the compiled programs that solve it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.flatten_util import ravel_pytree

from leakjax.jacobian import inverse_norms
from leakjax.priors import from_natural
from leakjax.solvers.gauss_newton import continuation, levenberg_marquardt
from leakjax.solvers.linear import solve_side

OUTER, INNER = 80, 3000
SMOOTHING, SHARPEST = 0.5, 1e-6


@functools.lru_cache(maxsize=16)
def match_programs(gradient: Any, tolerance: float) -> Any:
    """Compiled: the solve from several starts, the same with kinks smoothed and sharpened again, the probe of the
    Jacobian at x, and ||r|| / size there."""

    def residual(variables: Any, sent: Any, labels: Any) -> Any:
        return _residual(gradient, variables, sent, labels), jnp.sqrt(float(len(sent)))

    def solve(variables: Any, sent: Any, labels: Any, starts: Any) -> Any:
        function, size = residual(variables, sent, labels)

        def one(start: Any) -> Any:
            return levenberg_marquardt(
                function, start, size=size, tolerance=10 * tolerance, max_steps=OUTER, max_inner=INNER
            )

        return _over(one, starts)

    def smooth(variables: Any, sent: Any, labels: Any, starts: Any) -> Any:
        function, size = residual(variables, sent, labels)

        def one(start: Any) -> Any:
            options = {"smoothing": SMOOTHING, "sharpest": SHARPEST, "tolerance": 1e-8, "size": size}
            return continuation(function, start, max_steps=2 * OUTER, max_inner=INNER, **options)

        return _over(one, starts)

    def look(variables: Any, sent: Any, labels: Any, x: Any) -> Any:
        rows, tangent = jax.linearize(residual(variables, sent, labels)[0], x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return solve_side(operator, rows, jnp.asarray(True), tolerance=tolerance, max_steps=2 * INNER)

    def misfit(variables: Any, sent: Any, labels: Any, x: Any) -> Any:
        function, size = residual(variables, sent, labels)
        return optax.tree.norm(function(x)) / size

    return jax.jit(solve), jax.jit(smooth), jax.jit(look), jax.jit(misfit)


def _residual(gradient: Any, variables: Any, sent: Any, labels: Any) -> Any:
    """r(x, smoothing), by parameter."""
    over = inverse_norms(sent)

    def function(x: Any, smoothing: Any = None) -> Any:
        return jax.tree.map(lambda w, g, s: w * (g - s), over, gradient(variables, x, labels, smoothing), sent)

    return function


def _over(one: Any, starts: Any) -> Any:
    """`one` of every start, by `vmap` where there are several."""
    if len(starts) == 1:
        return jax.tree.map(lambda a: a[None], one(starts[0]))
    return jax.vmap(one)(starts)


@functools.lru_cache(maxsize=16)
def dense_rows(gradient: Any) -> Any:
    """Compiled, of (variables, sent, labels, start, u (n,)): r, (r, J^T), and with a direction d r''(d, d), all in the
    coordinates u of x = start + from_natural(u): a damped step in them is a smooth one."""

    def row(variables: Any, sent: Any, labels: Any, start: Any, u: Any) -> Any:
        x = start + from_natural(u.reshape(start.shape))
        return ravel_pytree(_residual(gradient, variables, sent, labels)(x))[0]

    def jacobian(variables: Any, sent: Any, labels: Any, start: Any, u: Any) -> Any:
        r, tangent = jax.linearize(functools.partial(row, variables, sent, labels, start), u)
        return r, jax.lax.map(tangent, jnp.eye(u.size, dtype=u.dtype), batch_size=32)

    def curvature(variables: Any, sent: Any, labels: Any, start: Any, u: Any, d: Any) -> Any:
        function = functools.partial(row, variables, sent, labels, start)
        return jax.jvp(lambda u: jax.jvp(function, (u,), (d,))[1], (u,), (d,))[1]

    return tuple(map(jax.jit, (row, jacobian, curvature)))
