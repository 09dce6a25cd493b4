"""The pull-back constraint as one compiled step: the input of segment j from what segments j..i must show."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from leakjax.attacks.problem import Problem
from leakjax.constraints.pull_back import Residual, pull_gradients, pulled_back, push_forward
from leakjax.constraints.stages import lifted_rows, look_inside, stages_of
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.solvers.descent import DIVERGED, descend
from leakjax.solvers.full_steps import full_steps
from leakjax.solvers.gauss_newton import NewtonSolution, continuation, levenberg_marquardt
from leakjax.solvers.linear import LsmrSolution, solve_side

OUTER, INNER, FULL_INNER = 60, 1500, 400
DESCENT = 5000
SMOOTHING, SMOOTHING_INSIDE, SHARPEST = 0.5, 2.0, 1e-6

Given = tuple[Arrays, Float[Array, "..."], Float[Array, "..."], Float[Array, ""], Mapping[str, Float[Array, "..."]]]
"""Weights, x and dL/dx at the output of the last segment, the noise level of x, and the gradients."""


class PullBack(NamedTuple):
    """u = x_j, dL/dx_j, ||r|| / size, LSMR steps, and a random right-hand side's solution with the Jacobian at u."""

    x: Float[Array, "..."]
    dx: Float[Array, "..."]
    residual: Float[Array, ""]
    steps: int
    probe: LsmrSolution


class Known(NamedTuple):
    """What is held at the output of the last segment: x, dL/dx, the noise level of x, and whose gradient it is."""

    x: Float[np.ndarray, "..."]
    dx: Float[np.ndarray, "..."]
    noise: float
    victim: int


def pull_back(
    problem: Problem,
    segments: Sequence[Segment],
    known: Known,
    starts: Iterable[Float[np.ndarray, "..."]],
    *,
    quick: bool = False,
) -> PullBack:
    """Solve for the input of `segments[0]` from what is `known` at the output of `segments[-1]`.

    From each start until one matches: Levenberg-Marquardt, and again after continuation from smoothed activations.
    Where a segment is nonlinear full steps come first, and again after continuation. The smallest residual is kept.
    """
    programs = _programs(tuple(segments), problem.tolerances.solve)
    plain, full = programs.plain, programs.full
    given = arrays(problem, segments, known)
    tried: list[NewtonSolution] = []

    def attempt(solve: Callable[..., NewtonSolution], start: Float[Array | np.ndarray, "..."]) -> bool:
        tried.append(solve(*given, to_device(start)))
        return float(tried[-1].residual) <= problem.tolerances.matched

    def attempt_smoothed(solve: Callable[..., NewtonSolution], start: Float[np.ndarray, "..."]) -> bool:
        smoothed = programs.smooth(*given, to_device(start))
        matched = attempt(solve, smoothed.x)
        tried[-1] = tried[-1]._replace(inner_steps=tried[-1].inner_steps + smoothed.inner_steps)
        return matched

    for start in starts:
        if problem.pull_back == "optax":
            matched = attempt(_descent(tuple(segments), problem.optimizer), start)
            if matched:
                break
            continue
        if quick:
            attempt(full, start)
            break
        if all(segment.linear for segment in segments):
            matched = attempt(plain, start) or attempt_smoothed(plain, start)
        else:
            matched = attempt(full, start) or attempt_smoothed(full, start) or attempt(plain, start)
        if matched:
            break
    found = min(tried, key=lambda trial: float(jnp.nan_to_num(trial.residual, nan=jnp.inf)))
    steps = sum(int(trial.inner_steps) for trial in tried)
    probe, dx = programs.look(*given, found.x)
    return PullBack(x=found.x, dx=dx, residual=found.residual, steps=steps, probe=probe)


def meet_top(
    problem: Problem,
    segments: Sequence[Segment],
    known: Known,
    inside: Sequence[Float[np.ndarray, "..."]],
    start: Float[np.ndarray, "*input"],
) -> tuple[Float[np.ndarray, "*input"], float]:
    """(u, ||r|| / size of the whole residual at u): u by the rows of the last segment alone.

    Of the last segment only the stages behind the values `inside` it (`lift`) count: their rows are linear in what they
    read, and so continuous in u where gradient rows before them jump with every kink.
    """
    solve = _top(tuple(segments), problem.tolerances.solve)
    x, misfit = solve(*arrays(problem, segments, known), list(inside), to_device(start))
    return np.asarray(x), float(misfit)


@keep(16)
def _top(
    segments: tuple[Segment, ...], tolerance: float
) -> Callable[..., tuple[Float[Array, "..."], Float[Array, ""]]]:
    *before, top = segments

    def solve(
        variables: Arrays,
        x_next: Float[Array, "..."],
        dx_next: Float[Array, "..."],
        noise: Float[Array, ""],
        gradient: Mapping[str, Float[Array, "..."]],
        inside: Sequence[Float[Array, "..."]],
        start: Float[Array, "*input"],
    ) -> tuple[Float[Array, "*input"], Float[Array, ""]]:
        given = variables, x_next, dx_next, noise, gradient
        dz, residual = read_known(segments, *given)
        preimage = top.activation.preimage(variables, x_next.reshape(top.output.shape), noise)
        rows, size = lifted_rows(top, variables, look_inside(top, variables, preimage, dz, inside), gradient)

        stages = stages_of(top)

        def reach(u: Float[Array, "..."]) -> list[Float[Array, "..."]]:
            for segment in before:
                u = segment.activation.function(variables, segment.function(variables, u)).reshape(segment.output.shape)
            values = [u.reshape(top.input.shape)]
            for stage in stages[: len(stages) - 1 - len(inside)]:
                assert stage.activation is not None
                values.append(stage.activation.function(variables, stage.function(variables, values)))
            return values

        found = levenberg_marquardt(
            lambda u: rows(reach(u)), start, size=size, tolerance=10 * tolerance, max_steps=OUTER, max_inner=INNER
        )
        return found.x, optax.tree.norm(residual.function(found.x, None)) / residual.size

    return jax.jit(solve)


@keep(16)
def _descent(segments: tuple[Segment, ...], optimizer: optax.GradientTransformation) -> Callable[..., NewtonSolution]:
    """The pulled-back residual's squares by first-order descent."""

    def solve(*given: Any) -> NewtonSolution:
        *known, start = given
        _, residual = read_known(segments, *known)

        def squares(u: Float[Array, "..."]) -> Float[Array, ""]:
            return optax.tree.norm(residual.function(u, None), squared=True) / residual.size**2

        found = descend(squares, start, optimizer, steps=DESCENT)
        left = jnp.where(found.state == DIVERGED, jnp.inf, jnp.sqrt(found.value))
        return NewtonSolution(found.x, left, found.steps, found.steps)

    return jax.jit(solve)


def products(
    problem: Problem, segments: Sequence[Segment], known: Known, x: Float[np.ndarray, "..."]
) -> tuple[Callable[[Float[np.ndarray, "k n"]], Float[np.ndarray, "k m"]], ...]:
    """v (k, n) -> J^T J v, and v -> J v, by rows, J of the pulled-back residual at x."""
    programs = _programs(tuple(segments), problem.tolerances.solve)
    given = arrays(problem, segments, known)

    def run(program: Callable[..., Float[Array, "k m"]]) -> Callable[..., Float[np.ndarray, "k m"]]:
        return lambda v: np.asarray(program(*given, to_device(x), to_device(v)))

    return run(programs.products), run(programs.forward)


def arrays(problem: Problem, segments: Sequence[Segment], known: Known) -> Given:
    """What the programs of this module take before u: weights, what is known at the output, the gradients, and what
    statistics of the data were sent."""
    gradient = {p: to_device(problem.gradients[p][known.victim]) for s in segments for p in s.paths}
    statistics = {name: to_device(t) for name, t in problem.told(segments, known.victim).items()}
    variables, sent = {**problem.variables, **statistics}, {**gradient, **statistics}
    return variables, to_device(known.x), to_device(known.dx), to_device(known.noise), sent


def read_known(
    segments: Sequence[Segment],
    variables: Arrays,
    x_next: Float[Array, "..."],
    dx_next: Float[Array, "..."],
    noise: Float[Array, ""],
    gradient: Mapping[str, Float[Array, "..."]],
) -> tuple[Float[Array, "..."], Residual]:
    """(dz at the last segment's output, the residual on the first one's input)."""
    top = segments[-1]
    preimage = top.activation.preimage(variables, x_next.reshape(top.output.shape), noise)
    dz = preimage.slope * dx_next.reshape(top.output.shape)
    return dz, pulled_back(segments, variables, preimage, dz, gradient)


class _Programs(NamedTuple):
    """Compiled, each of (*arrays, u): Levenberg-Marquardt and full Gauss-Newton steps from u, continuation from
    smoothed activations, the probe of the Jacobian at u with dL/du, and of (*arrays, u, v) the rows J^T J v and J v."""

    plain: Callable[..., NewtonSolution]
    full: Callable[..., NewtonSolution]
    smooth: Callable[..., NewtonSolution]
    look: Callable[..., tuple[LsmrSolution, Float[Array, "..."]]]
    products: Callable[..., Float[Array, "k n"]]
    forward: Callable[..., Float[Array, "k m"]]


@keep(32)
def _programs(segments: tuple[Segment, ...], tolerance: float) -> _Programs:
    read = functools.partial(read_known, segments)

    def unsmoothed(solver: Callable[..., NewtonSolution], max_inner: int) -> Callable[..., NewtonSolution]:
        def solve(*given: Any) -> NewtonSolution:
            *known, start = given
            _, residual = read(*known)
            options = {"tolerance": 10 * tolerance, "max_steps": OUTER, "max_inner": max_inner}
            return solver(lambda u: residual.function(u, None), start, size=residual.size, **options)

        return solve

    plain, full = unsmoothed(levenberg_marquardt, INNER), unsmoothed(full_steps, FULL_INNER)

    def smooth(*given: Any) -> NewtonSolution:
        *known, start = given
        _, residual = read(*known)
        return continuation(
            residual.function,
            start,
            smoothing=SMOOTHING if all(segment.linear for segment in segments) else SMOOTHING_INSIDE,
            sharpest=SHARPEST,
            size=residual.size,
            tolerance=1e-8,
            max_steps=2 * OUTER,
            max_inner=INNER,
        )

    def look(*given: Any) -> tuple[LsmrSolution, Float[Array, "..."]]:
        *known, x = given
        variables = known[0]
        dz, residual = read(*known)
        rows, tangent = jax.linearize(lambda u: residual.function(u, None), x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        steps = int(min(4 * x.size, 6000))
        probe = solve_side(operator, rows, jnp.asarray(True), tolerance=tolerance, max_steps=steps)
        xs, _, slopes = push_forward(segments, variables, x)
        return probe, pull_gradients(segments, variables, xs, slopes, dz)[1]

    def products(*given: Any) -> Float[Array, "k n"]:
        *known, x, v = given
        _, residual = read(*known)
        _, tangent = jax.linearize(lambda u: residual.function(u, None), x)
        adjoint = jax.linear_transpose(tangent, x)

        def column(e: Float[Array, " n"]) -> Float[Array, " n"]:
            return jnp.ravel(adjoint(tangent(e.reshape(x.shape)))[0])

        return jax.lax.map(column, v, batch_size=16)

    def forward(*given: Any) -> Float[Array, "k m"]:
        *known, x, v = given
        _, residual = read(*known)
        _, tangent = jax.linearize(lambda u: residual.function(u, None), x)
        return jax.lax.map(lambda e: ravel_pytree(tangent(e.reshape(x.shape)))[0], v, batch_size=16)

    return _Programs(*map(jax.jit, (plain, full, smooth, look, products, forward)))
