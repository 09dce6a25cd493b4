"""The joint rows of a train-mode normalization N without its statistics, and of the affine layer F before it.

With z and dL/dz at the output of N known, and u the input of F:

    x = (z - b(t)) / a(t)              the fiber N^-1(z): affine in coefficients o of dx/dt_k, t the statistics
    F(u) = x,  N(x) = z                forward rows
    d/dtheta <dL/dx, F(u)> = g_F       gradient rows, dL/dx = (dN/dx)^T dL/dz
    d/dtheta <dL/dz, N(x)> = g_N

But for N(x) = z these rows are homogeneous in (u, x), and N hardly changes with the size of x: for batch norm by
1 - var((x - mean) / sigma) = eps / sigma^2. One direction is weak, the common size: rounding reaches it sigma^2 / eps
times as far as any other. It is handed on with u, and solved for again (c) at the normalization before, whose own rows
depend on it like on anything else: errors of size do not add up over layers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from leakjax.constraints.layer import over_gradients, segment_rows
from leakjax.models.reader import Arrays
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.smoothing import rms
from leakjax.segments.tracing.statistics import Statistics, slope_and_bias
from leakjax.solvers.linear import LsmrSolution, solve_side
from leakjax.solvers.lsmr import Lsmr, lsmr

_HELD = 1e4
"""How much more N(x) = z counts in the first step, which keeps to the sizes that eps gave: about sigma^2 / eps."""

_STEPS = 4
"""Gauss-Newton steps after it: from sizes good to 1e-5 the second is exact, and the third finds nothing to gain."""

_INNER = 6000
"""LSMR steps inside each; a layer of condition 100 takes some 3000."""

_LEAST = 1e-13
"""Relative tolerance of an inner solve, beyond which LSMR gains nothing."""

_SLANT = 1e-4
"""Relative accuracy of the weak direction: it is off by some 1e-4 before, and 1e-10 of x lies along it."""


class State(NamedTuple):
    """What is known behind N: x and dL/dx, the noise level of x, and k weak directions of both."""

    x: Float[Array, "..."]
    dx: Float[Array, "..."]
    noise: Float[Array, ""]
    weak_x: Float[Array, "k ..."]
    weak_dx: Float[Array, "k ..."]


class Joint(NamedTuple):
    """What the joint rows gave.

    `x`, `dx`, behind N, corrected along their weak directions; `values`, the statistics; the relative `residual`; a
    random `probe` of the rows with the weak direction stretched, which are `weakness` in it as they are; LSMR `steps`;
    `weak_x`, `weak_dx`, the weak direction of u and of dL/du.
    """

    x: Float[Array, "..."]
    dx: Float[Array, "..."]
    values: Mapping[str, Float[Array, "..."]]
    residual: Float[Array, ""]
    probe: LsmrSolution
    weakness: Float[Array, ""]
    steps: Int[Array, ""]
    weak_x: Float[Array, "..."]
    weak_dx: Float[Array, "..."]


class Fiber(NamedTuple):
    """Compiled, each of (variables, state, ...): whether all of z and dL/dz is known; what (t, c) miss of being the
    statistics of their own x, with the Jacobian of that; and the joint solution from (t, c), given the gradients."""

    known: Callable[..., Bool[Array, ""]]
    missed: Callable[..., tuple[Float[Array, " t"], Float[Array, "t n"]]]
    solve: Callable[..., Joint]


@keep(64)
def fiber_of(before: Segment, segment: Segment) -> Fiber:
    """The programs of a normalization `segment` behind the affine segment `before`."""
    statistics = segment.statistics
    assert statistics is not None, "a normalization"

    def known(variables: Arrays, state: State) -> Bool[Array, ""]:
        preimage = segment.activation.preimage(variables, state.x.reshape(segment.output.shape), state.noise)
        return jnp.all(preimage.known & preimage.slope_known)

    def missed(variables: Arrays, state: State, tc: Float[Array, " n"]) -> Any:
        t_of = unravel_statistics(statistics, variables, segment)

        def left(tc: Float[Array, " n"]) -> Float[Array, " t"]:
            t, c = jnp.split(tc, [len(tc) - len(state.weak_x)])
            x = _undone(segment, variables, t_of(t), _output(segment, variables, state, c)[0])
            return ravel_pytree(statistics.measure(variables, x))[0] - t

        return left(tc), jax.jacfwd(left)(tc)

    return Fiber(jax.jit(known), jax.jit(missed), jax.jit(_solver(before, segment, statistics)))


def unravel_statistics(
    statistics: Statistics, variables: Arrays, segment: Segment
) -> Callable[[Float[Array, " t"]], dict[str, Float[Array, "..."]]]:
    """A vector as the values of the statistics, by name."""
    structs = jax.eval_shape(statistics.measure, variables, segment.input)
    return ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), structs))[1]


def _output(
    segment: Segment, variables: Arrays, state: State, c: Float[Array, " k"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """z and dL/dz of N, c along the weak directions of what is behind it."""
    x, dx = _along(state, c)
    preimage = segment.activation.preimage(variables, x.reshape(segment.output.shape), state.noise)
    return preimage.value, preimage.slope * dx.reshape(segment.output.shape)


def _along(state: State, c: Float[Array, " k"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    return state.x + jnp.tensordot(c, state.weak_x, 1), state.dx + jnp.tensordot(c, state.weak_dx, 1)


def _undone(
    segment: Segment, variables: Arrays, values: Mapping[str, Float[Array, "..."]], z: Float[Array, "..."]
) -> Float[Array, "..."]:
    assert segment.statistics is not None, "a normalization"
    slope, bias = slope_and_bias(segment.statistics, variables, segment.input, values)
    return (z - bias) / slope


def _solver(before: Segment, segment: Segment, statistics: Statistics) -> Callable[..., Joint]:
    def solve(
        variables: Arrays, state: State, gradient: Mapping[str, Float[Array, "..."]], begin: Float[Array, " n"]
    ) -> Joint:
        t_of = unravel_statistics(statistics, variables, segment)
        t, c0 = jnp.split(begin, [len(begin) - len(state.weak_x)])
        z0, _ = _output(segment, variables, state, c0)

        def x_of(t: Float[Array, " t"], z: Float[Array, "..."]) -> Float[Array, "..."]:
            return _undone(segment, variables, t_of(t), z)

        x0 = x_of(t, z0)
        columns = jax.jacfwd(lambda t: jnp.ravel(x_of(t, z0)))(t)
        columns = columns * (rms(x0) / jax.vmap(rms, 1)(columns))[None]  # of the size of x0, each
        start, split = ravel_pytree((jnp.zeros(before.input.shape, x0.dtype), jnp.zeros_like(t), jnp.zeros_like(c0)))
        over = over_gradients(gradient, [*before.paths, *segment.paths])

        def parts(w: Float[Array, " n"]) -> Any:
            """u, c, z, x and dL/dx."""
            u, o, c = split(w)
            z, dz = _output(segment, variables, state, c0 + c)
            x = x0 + (columns @ o).reshape(x0.shape) + jax.jvp(lambda z: x_of(t, z), (z0,), (z - z0,))[1]
            return u, c0 + c, z, dz, x, segment.cotangent(variables, x, dz)

        def rows(w: Float[Array, " n"]) -> Any:
            u, _, z, dz, x, dx = parts(w)
            forward, of_before = segment_rows(before, variables, dx, u)
            again, own = segment_rows(segment, variables, dz, x)
            shown = {p: over[p] * (g - gradient[p]) for p, g in {**of_before, **own}.items()}
            return (forward - x) / rms(x0), shown, (again - z) / rms(z0)

        size = jnp.sqrt(2.0 * x0.size + sum(g.size for g in gradient.values()))

        def norm(w: Float[Array, " n"]) -> Float[Array, ""]:
            left = optax.tree.norm(rows(w)) / size
            return jnp.where(jnp.isnan(left), jnp.inf, left)

        def hold(w: Float[Array, " n"]) -> tuple[Float[Array, " n"], Int[Array, ""]]:
            """The step that leaves c, and the sizes, where they are."""
            r, tangent = jax.linearize(rows, w)
            free = jnp.arange(w.size) < w.size - len(c0)

            def weigh(rows: Any) -> Any:
                return rows[0], rows[1], _HELD * rows[2]

            found = _lsmr(lambda v: weigh(tangent(jnp.where(free, v, 0.0))), weigh(r), w, 1e-12)
            return w + jnp.where(free, found.x, 0.0), found.steps

        def stretch(w: Float[Array, " n"], tangent: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
            """v -> v, the weak direction stretched until its rows are as large as the others'; and its rows' norm."""
            u, _, _, _, x, dx = parts(w)
            constant = segment_rows(before, variables, dx, jnp.zeros_like(u))[0]
            o = jnp.linalg.lstsq(columns, jnp.ravel(x - constant))[0]
            weak = ravel_pytree((u, o, jnp.zeros_like(c0)))[0]
            weak = weak / jnp.linalg.norm(weak)
            least = optax.tree.norm(tangent(weak))
            return lambda v: v + (1.0 / least - 1.0) * weak * (weak @ v), least

        def improve(w: Float[Array, " n"], left: Float[Array, ""]) -> tuple[Float[Array, " n"], Int[Array, ""]]:
            r, tangent = jax.linearize(rows, w)
            wide, _ = stretch(w, tangent)
            tolerance = jnp.clip(1e-4 * jnp.finfo(w.dtype).eps / left, _LEAST, 1e-8)
            found = _lsmr(lambda v: tangent(wide(v)), r, w, tolerance)
            return w + wide(found.x), found.steps

        def step(carried: Any) -> Any:
            w, left, _, k, steps = carried
            new, inner = improve(w, left)
            now = norm(new)
            better = now < left
            return jnp.where(better, new, w), jnp.where(better, now, left), now < left / 2, k + 1, steps + inner

        w, steps = hold(start)

        def going(carried: Any) -> Bool[Array, ""]:
            _, left, gained, k, _ = carried
            return gained & (k < _STEPS) & jnp.isfinite(left)

        w, left, _, _, steps = jax.lax.while_loop(going, step, (w, norm(w), jnp.asarray(True), 0, steps))
        r, tangent = jax.linearize(rows, w)
        wide, least = stretch(w, tangent)
        operator = _operator(lambda v: tangent(wide(v)), w)
        probe = solve_side(operator, r, jnp.asarray(True), tolerance=_LEAST, max_steps=_INNER, rounds=2)
        _, c, _, _, x, _ = parts(w)
        again = jax.jvp(lambda x: segment.whole(variables, x), (x,), (x,))[1]  # what N sees of a change of size
        nothing = jax.tree.map(jnp.zeros_like, r)
        slanted = _lsmr(operator.mv, (nothing[0], nothing[1], -again), w, _SLANT)
        weak = wide(slanted.x)
        u = split(w)[0]
        weak = weak * jnp.linalg.norm(u) / jnp.linalg.norm(split(weak)[0])

        def before_it(w: Float[Array, " n"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
            u, _, _, _, _, dx = parts(w)
            return u, before.cotangent(variables, u, dx)

        weak_x, weak_dx = jax.jvp(before_it, (w,), (weak,))[1]
        behind = _along(state, c)
        return Joint(
            x=behind[0],
            dx=behind[1],
            values=statistics.measure(variables, x),
            residual=left,
            probe=probe,
            weakness=least,
            steps=steps + probe.steps + slanted.steps,
            weak_x=weak_x,
            weak_dx=weak_dx,
        )

    return solve


def _lsmr(tangent: Callable[..., Any], r: Any, like: Float[Array, " n"], tolerance: Any) -> Lsmr:
    """The least-squares v of tangent(v) = -r."""
    against = jax.tree.map(jnp.negative, r)
    return lsmr(_operator(tangent, like), against, tolerance=tolerance, max_steps=_INNER)


def _operator(tangent: Callable[..., Any], like: Float[Array, " n"]) -> lx.FunctionLinearOperator:
    return lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(like.shape, like.dtype))
