"""The solution of a normalization's joint rows (`fiber`) by a few Gauss-Newton steps, the weak direction stretched."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, Bool, Float, Int

from leakjax.attacks.layerwise.fiber import Fiber, State, is_known
from leakjax.models.reader import Arrays
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
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


class Programs(NamedTuple):
    """Compiled, each of (variables, state, ...): whether all of z and dL/dz is known; what (t, c) miss of being the
    statistics of their own x, with the Jacobian of that; and the joint solution, of the gradients and (t, c)."""

    known: Callable[..., Bool[Array, ""]]
    missed: Callable[..., tuple[Float[Array, " t"], Float[Array, "t n"]]]
    solve: Callable[..., Joint]


@keep(64)
def programs_of(before: Segment, segment: Segment) -> Programs:
    """The programs of a normalization `segment` behind the affine segment `before`."""

    def known(variables: Arrays, state: State) -> Bool[Array, ""]:
        return is_known(segment, variables, state)

    def missed(variables: Arrays, state: State, begin: Float[Array, " n"]) -> Any:
        def left(begin: Float[Array, " n"]) -> Float[Array, " t"]:
            fiber = Fiber(before=before, segment=segment, variables=variables, state=state, gradient={}, begin=begin)
            return fiber.missed()

        return left(begin), jax.jacfwd(left)(begin)

    def solve(
        variables: Arrays, state: State, gradient: Mapping[str, Float[Array, "..."]], begin: Float[Array, " n"]
    ) -> Joint:
        fiber = Fiber(before=before, segment=segment, variables=variables, state=state, gradient=gradient, begin=begin)
        return _solution(fiber)

    return Programs(jax.jit(known), jax.jit(missed), jax.jit(solve))


def _solution(fiber: Fiber) -> Joint:
    zero, split = fiber.packed
    _ = fiber.origin, fiber.columns, fiber.over  # computed here, not inside a loop
    w, steps = _hold(fiber, zero)

    def step(carried: Any) -> Any:
        w, left, _, k, steps = carried
        new, inner = _improve(fiber, w, left)
        now = fiber.misfit(new)
        better = now < left
        return jnp.where(better, new, w), jnp.where(better, now, left), now < left / 2, k + 1, steps + inner

    def going(carried: Any) -> Bool[Array, ""]:
        _, left, gained, k, _ = carried
        return gained & (k < _STEPS) & jnp.isfinite(left)

    w, left, _, _, steps = jax.lax.while_loop(going, step, (w, fiber.misfit(w), jnp.asarray(True), 0, steps))
    rows, tangent = jax.linearize(fiber.rows, w)
    wide, weakness = _stretch(fiber, w, tangent)
    operator = _operator(lambda v: tangent(wide(v)), w)
    probe = solve_side(operator, rows, jnp.asarray(True), tolerance=_LEAST, max_steps=_INNER, rounds=2)
    p = fiber.at(w)
    nothing = jax.tree.map(jnp.zeros_like, rows[0])
    seen = jax.jvp(lambda x: fiber.segment.whole(fiber.variables, x), (p.x,), (p.x,))[1]  # by N, of a change of size
    slanted = _lsmr(operator.mv, (nothing, -seen), w, _SLANT)
    weak = wide(slanted.x)
    weak = weak * jnp.linalg.norm(p.u) / jnp.linalg.norm(split(weak)[0])

    def before_it(w: Float[Array, " n"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        p = fiber.at(w)
        return p.u, fiber.before.cotangent(fiber.variables, p.u, p.dx)

    weak_x, weak_dx = jax.jvp(before_it, (w,), (weak,))[1]
    x, dx = fiber.state.along(p.c)
    return Joint(
        x=x,
        dx=dx,
        values=fiber.statistics.measure(fiber.variables, p.x),
        residual=left,
        probe=probe,
        weakness=weakness,
        steps=steps + probe.steps + slanted.steps,
        weak_x=weak_x,
        weak_dx=weak_dx,
    )


def _hold(fiber: Fiber, w: Float[Array, " n"]) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """The step that leaves c, and the sizes, where they are."""
    r, tangent = jax.linearize(fiber.rows, w)
    free = jnp.arange(w.size) < w.size - len(fiber.parts[1])

    def weigh(rows: Any) -> Any:
        return rows[0], _HELD * rows[1]

    found = _lsmr(lambda v: weigh(tangent(jnp.where(free, v, 0.0))), weigh(r), w, 1e-12)
    return w + jnp.where(free, found.x, 0.0), found.steps


def _improve(fiber: Fiber, w: Float[Array, " n"], left: Float[Array, ""]) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """A step of all unknowns, from the misfit that is left."""
    r, tangent = jax.linearize(fiber.rows, w)
    wide, _ = _stretch(fiber, w, tangent)
    tolerance = jnp.clip(1e-4 * jnp.finfo(w.dtype).eps / left, _LEAST, 1e-8)
    found = _lsmr(lambda v: tangent(wide(v)), r, w, tolerance)
    return w + wide(found.x), found.steps


def _stretch(
    fiber: Fiber, w: Float[Array, " n"], tangent: Callable[..., Any]
) -> tuple[Callable[[Float[Array, " n"]], Float[Array, " n"]], Float[Array, ""]]:
    """v -> v, the weak direction stretched until its rows are of norm 1; and their norm without that."""
    weak = fiber.size_direction(w)
    weakness = optax.tree.norm(tangent(weak))
    return lambda v: v + (1.0 / weakness - 1.0) * weak * (weak @ v), weakness


def _lsmr(tangent: Callable[..., Any], r: Any, like: Float[Array, " n"], tolerance: Any) -> Lsmr:
    """The least-squares v of tangent(v) = -r."""
    against = jax.tree.map(jnp.negative, r)
    return lsmr(_operator(tangent, like), against, tolerance=tolerance, max_steps=_INNER)


def _operator(tangent: Callable[..., Any], like: Float[Array, " n"]) -> lx.FunctionLinearOperator:
    return lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(like.shape, like.dtype))
