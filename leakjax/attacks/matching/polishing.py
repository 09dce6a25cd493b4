"""The least-squares fit of a whole gradient from a first answer, and what noise does to it.

min_x ||W (g(x) - s)||,    x - x* = (W J)^+ W n,    J = dg/dx at the answer
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from leakjax.attacks.adaptive import Sent, Told, predicted
from leakjax.attacks.matching.coordinates import Coordinates, coordinates_at
from leakjax.attacks.matching.outcome import compare, given
from leakjax.attacks.matching.own_rounding import Draw, with_mixing
from leakjax.attacks.matching.residual import OUTER, Compare, match_programs, residual_of
from leakjax.attacks.problem import DeviceLabels, Labels, Problem
from leakjax.client.defenses import build_defense
from leakjax.constraints.priors import DEVIATION
from leakjax.models.losses import UNKNOWN
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.gauss_newton import levenberg_marquardt
from leakjax.solvers.linear import lsmr_condition, solve_side
from leakjax.solvers.lsmr import lsmr

DRAWS = 16

SMALL = 1000
"""Unknowns up to which a fit costs little."""

BENT = 0.1
"""What a second step adds, as a share of the first, above which noise is followed by fits of its own."""

FAR = 1e-2
"""Of the range: a fit that ended farther from where it began has its condition from coordinates of its own."""

_INNER, _CLOSE = 3000, 1e-8

_STEPS = 4
"""Of a fit of x and its target together, from the fit of each for the other: one is enough but for curvature."""


class Polished(NamedTuple):
    """The fit x (B, ...), its labels or fitted targets, ||r|| / ||s||, what is left by parameter, and whether J
    determines x; `near`, the coordinates in which it was found, where it was in any."""

    x: Float[np.ndarray, "B ..."]
    labels: Labels
    residual: float
    left: dict[str, Float[np.ndarray, "..."]]
    determined: bool
    condition: float
    near: Coordinates | None = None


def told_of(problem: Problem, sigma: float) -> Problem:
    """The problem as if white noise had been told of, without a prior: what is determined needs none. It is in the
    gradient; statistics are left out."""
    return dataclasses.replace(problem, defense=build_defense(f"gaussian:{sigma!r}"), prior="none", statistics={})


def sent_by(problem: Problem, victim: int) -> dict[str, Float[np.ndarray, "..."]]:
    """What a victim sent, in float64."""
    return {p: np.asarray(g[victim], float) for p, g in problem.gradients.items()}


def polish(
    problem: Problem, told: Told, victim: int, labels: Labels, x: Float[np.ndarray, "B ..."], *, smoothed: bool
) -> Polished:
    """The fit from x; `smoothed` by way of the network with its kinks rounded off and sharpened again, where the
    pattern of signs at x may be another one than the fit's. A target that may be any numbers is fitted with x."""
    form = compare(problem, told)
    programs = match_programs(form, problem.tolerances.solve, 1e-4)
    known = given(problem, told, labels, prior=told.sent.prior is not None)
    start = np.asarray(programs.smooth(*known, to_device(x)[None]).x[0]) if smoothed else x
    near = coordinates_at(problem, form, start, *known) if np.all(np.isfinite(start)) else None
    if near is None:
        best = np.asarray(programs.solve(*known, to_device(start)[None]).x[0])
    else:
        best = np.asarray(_nearby(form, problem.tolerances.solve)(*known, near))
    best = best if np.all(np.isfinite(best)) else x
    if form.free:
        best, labels = map(np.asarray, _with_target(form)(*known, to_device(best)))
    if near is not None and np.max(np.abs(best - start)) > FAR * (problem.input_range[1] - problem.input_range[0]):
        near = coordinates_at(problem, form, best, *known)
    lost, condition = _seen(problem, told, labels, best, near)
    sent = sent_by(problem, victim)
    there = _prediction(predicted(problem))(dict(problem.variables), to_device(best), to_device(labels))
    left = {p: np.asarray(there[p], float) - sent[p] for p in sent}
    size = np.sqrt(sum(float(np.sum(g**2)) for g in sent.values()))
    residual = float(np.sqrt(sum(float(np.sum(r**2)) for r in left.values())) / size)
    determined = lost <= max(problem.tolerances.probe, 1e-3 * residual)
    return Polished(
        x=best, labels=labels, residual=residual, left=left, determined=determined, condition=condition, near=near
    )


@keep(16)
def _nearby(form: Compare, tolerance: float) -> Callable[..., Float[Array, "B *image"]]:
    """(variables, sent, labels, coordinates) -> the x nearby that fits best, by Levenberg and Marquardt's method."""

    def fit(variables: Arrays, sent: Sent, labels: DeviceLabels, near: Coordinates) -> Float[Array, "B *image"]:
        residual, size = residual_of(form, variables, sent, labels), jnp.sqrt(float(len(sent.gradient)))
        options = {"size": size, "tolerance": 10 * tolerance, "forcing": 1e-4}
        start = jnp.zeros(near.factor.shape[:1], near.factor.dtype)
        found = levenberg_marquardt(
            lambda y: residual(near.images(y)), start, max_steps=OUTER, max_inner=_INNER, **options
        )
        return near.images(found.x)

    return jax.jit(fit)


def _seen(
    problem: Problem, told: Told, labels: Labels, x: Float[np.ndarray, "B *image"], near: Coordinates | None
) -> tuple[float, float]:
    """What a probe at x loses of itself, and the condition there."""
    known = *given(problem, told, labels), to_device(x)
    if near is None:
        probe = match_programs(compare(problem, told), problem.tolerances.solve, 1e-4).look(*known)
        return float(probe.lost), lsmr_condition(probe)
    if not near.whole:
        return 1.0, near.condition
    return float(_look(compare(problem, told))(*known, near)), near.condition


@keep(16)
def _look(form: Compare) -> Callable[..., Float[Array, ""]]:
    """(variables, sent, labels, x, coordinates) -> the share of a random probe in y that J R^-1 at x loses."""

    def look(
        variables: Arrays, sent: Sent, labels: DeviceLabels, x: Float[Array, "B *image"], near: Coordinates
    ) -> Float[Array, ""]:
        rows, tangent = jax.linearize(residual_of(form, variables, sent, labels), x)
        struct = jax.ShapeDtypeStruct(near.factor.shape[:1], x.dtype)
        operator = lx.FunctionLinearOperator(lambda y: tangent(near.moves(y)), struct)
        return solve_side(operator, rows, jnp.asarray(True), tolerance=1e-10, max_steps=_INNER).lost

    return jax.jit(look)


@keep(16)
def _with_target(form: Compare) -> Callable[..., tuple[Float[Array, "B ..."], Float[Array, "B ..."]]]:
    """(variables, sent, targets, x) -> the (x, targets) nearby that fit best together, by Gauss-Newton steps."""

    def fit(
        variables: Arrays, sent: Sent, targets: DeviceLabels, x: Float[Array, "B ..."]
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
        residual, start = _jointly(form, variables, sent, targets, x)

        def step(_: int, both: Float[Array, " n"]) -> Float[Array, " n"]:
            here, tangent = jax.linearize(residual, both)
            operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(both.shape, both.dtype))
            trial = both - lsmr(operator, here, tolerance=_CLOSE, max_steps=_INNER).x
            return jnp.where(optax.tree.norm(residual(trial)) < optax.tree.norm(here), trial, both)

        found = jax.lax.fori_loop(0, _STEPS, step, start)
        return found[: x.size].reshape(x.shape), found[x.size :].reshape(targets.shape)

    return jax.jit(fit)


def _jointly(
    form: Compare, variables: Arrays, sent: Sent, labels: DeviceLabels, x: Float[Array, "B ..."]
) -> tuple[Callable[[Float[Array, " n"]], PyTree[Float[Array, "..."]]], Float[Array, " n"]]:
    """r of everything that is unknown in one vector, x and after it the target where that is `free`, and the vector."""

    def residual(both: Float[Array, " n"]) -> PyTree[Float[Array, "..."]]:
        tags = both[x.size :].reshape(labels.shape) if form.free else labels
        return residual_of(form, variables, sent, tags)(both[: x.size].reshape(x.shape))

    start = jnp.concatenate([jnp.ravel(x), jnp.ravel(labels).astype(x.dtype)]) if form.free else jnp.ravel(x)
    return residual, start


@keep(16)
def _prediction(gradient: Gradient) -> Gradient:
    return jax.jit(lambda variables, x, labels: gradient(variables, x, labels))


def errors(
    problem: Problem, told: Told, fit: Polished, draw: Draw
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """Median and deviation over draws of the noise of log10 (mean square of x - x*, as a share of the range), (B,).

    The estimate is of this image's own PSNR: where a few directions hold most of the error, the logarithm's median is
    nearer to what one draw gives than the logarithm of the mean, which rare large draws decide. Draws whose fit leaves
    more than the draw itself would, at another pattern of kinks, are left out: no such fit is taken for an answer.
    """
    x, labels = fit.x, fit.labels
    propagate, draw = _propagation(compare(problem, told)), with_mixing(problem, told, draw)
    held = told.sent.prior is not None
    known = given(problem, told, labels, prior=held)
    rng = np.random.default_rng(0)
    low, high = problem.limits
    squares = []
    for _ in range(DRAWS):
        n = {p: to_device(a, problem.dtype) for p, a in draw(rng).items()}
        unit = to_device(rng.normal(size=x.shape), problem.dtype)
        d, second = (np.asarray(a) for a in propagate(*known, to_device(x), n, unit, fit.near))
        bent = not np.linalg.norm(second) <= BENT * np.linalg.norm(d)
        if bent and problem.loss == UNKNOWN:
            continue  # a fit of x alone would hold the target still
        if bent and not held and x.size <= SMALL:
            d, explained = _refit(problem, told, labels, x, x + d, n)
            if not explained:
                continue
        else:
            d = d + second
        shares = np.mean((d / (high - low)).reshape(len(x), -1) ** 2, axis=1)
        squares.append(np.log10(np.maximum(shares, 1e-35)))
    if len(squares) < DRAWS / 2:
        return np.full(len(x), np.nan), np.full(len(x), np.inf)
    return np.median(squares, axis=0), np.std(squares, axis=0, ddof=1)


def _refit(
    problem: Problem,
    told: Told,
    labels: Labels,
    x: Float[np.ndarray, "B *image"],
    start: Float[np.ndarray, "B *image"],
    noise: Mapping[str, Float[Array, "..."]],
) -> tuple[Float[np.ndarray, "B *image"], bool]:
    """x' - x of the fit x' to g(x) + n: what noise does beyond the first order; whether it takes at least half as much
    from ||W n|| as the unknowns are expected to."""
    solve = match_programs(compare(problem, told), problem.tolerances.solve, 1e-4).solve
    variables, sent, tags = given(problem, told, labels)
    there = _prediction(predicted(problem))(variables, to_device(x), tags)
    again = sent._replace(gradient={p: g + noise[p] for p, g in there.items()})
    solution = solve(variables, again, tags, to_device(start)[None])
    weighted = [float(np.sum(np.square(np.asarray(sent.weights[p] * n)))) for p, n in noise.items()]
    entries = sum(n.size for n in noise.values())
    left = max(1.0 - 0.5 * x.size / entries, 0.0) * sum(weighted) / len(noise)
    explained = bool(float(solution.residual[0]) <= np.sqrt(left))
    return np.asarray(solution.x[0]) - x, explained


@keep(16)
def _propagation(form: Compare) -> Callable[..., tuple[Float[Array, "B *image"], Float[Array, "B *image"]]]:
    """(variables, sent, labels, x, noise, unit, coordinates or None) -> d with least ||W (J d - n)||^2, with what a
    prior adds to it, and what the next Gauss-Newton step would add: as much as d where kinks lie nearer than the noise
    reaches.

    Where the target is `free` it moves with x: J has its columns as well, and d is the part of x."""

    def propagate(
        variables: Arrays,
        sent: Sent,
        labels: DeviceLabels,
        x: Float[Array, "B *image"],
        noise: Mapping[str, Float[Array, "..."]],
        unit: Float[Array, "B *image"],
        near: Coordinates | None,
    ) -> tuple[Float[Array, "B *image"], Float[Array, "B *image"]]:
        residual, start = _jointly(form, variables, sent, labels, x)

        def move(u: Float[Array, " n"]) -> Float[Array, " n"]:
            return u if near is None else jnp.ravel(near.moves(u))

        here, tangent = jax.linearize(lambda u: residual(start + move(u)), jnp.zeros_like(start))
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(start.shape, x.dtype))
        side = jax.tree.map(jnp.multiply, sent.weights, noise)
        if sent.prior is not None:  # an image as likely as any has amplitudes of `DEVIATION` of the range
            side = (side, sent.prior * DEVIATION * (form.limits[1] - form.limits[0]) * unit)
        first = lsmr(operator, side, tolerance=_CLOSE, max_steps=_INNER).x
        curved = jax.tree.map(lambda a, b, c: a + c - b, here, residual(start + move(first)), tangent(first))
        second = lsmr(operator, curved, tolerance=_CLOSE, max_steps=_INNER).x
        first, second = move(first), move(second)
        return first[: x.size].reshape(x.shape), second[: x.size].reshape(x.shape)

    return jax.jit(propagate)
