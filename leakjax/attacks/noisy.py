"""Answers to noisy gradients: the best fit, and how far from the image the noise leaves it.

Where a gradient is matched but for noise, s = g(x*) + n, the answer is polished to the least-squares fit
min_x ||W (g(x) - s)|| (W = 1 / sigma where the noise is told, else 1 / ||g_p||), and its error follows from the noise,

    x - x* = (W J)^+ W n,   J = dg/dx at the answer,

to first order: draws of n like the noise that was told, or that the residual shows, give its mean square. No truth is
used. The mean square is that of this image and this kind of noise, not a bound.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from leakjax.attacks.certificate import relative_error
from leakjax.attacks.gradient_residual import Compare, match_programs, residual_of
from leakjax.attacks.matched import compare, given
from leakjax.attacks.others import at_kink, other_images, tags_of
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.attacks.ranks import NULL_SPACE
from leakjax.attacks.residual_noise import HALF, Noise, draw_noise, read_noise, read_rounding
from leakjax.attacks.told import LOSSY, Told, noise_of, predicted, tell
from leakjax.defenses import build_defense
from leakjax.priors import DEVIATION
from leakjax.reconstruction import Candidate, LayerInfo
from leakjax.solvers.linear import lsmr_condition
from leakjax.solvers.lsmr import lsmr

NEAR, NEAR_SMALL, NEAR_TOLD = 0.05, 0.5, 0.6
"""||g(x) - s|| / ||s|| up to which what is left may be noise that nobody told of (for no more than `SMALL` unknowns the
polish costs little, and may begin farther away), and noise that was told."""

SMALL = 1000

FAINT = 0.01
"""||g(x) - s|| / ||s|| above which the rank of a head's gradient, where it says that there are more examples than were
told of, is believed before noise is."""

LEAST_DECIBEL = 35.0
"""Below it an error is some 2 % of the range and more, and what it does to the gradient is no longer of first order:
estimates of 20 to 30 dB were off by 6 to 20 dB."""

_HIDDEN = (
    "the noise is too large for a first-order estimate of the error, which would be {decibel:.0f} dB: what is seen may "
    "be the prior's, or a local minimum's"
)

SPREAD = 0.25
"""Deviation of log10 of the error over draws of the noise, above which no estimate is given: 2.5 dB. It is 0.1 for a
hundred equal directions and larger where a few hold most of the error: then one image may be off by 3 dB by chance."""

_SPREAD = (
    "the noise leaves about {decibel:.0f} dB, give or take {spread:.0f}: a few directions hold most of the error, and "
    "no closer estimate can be given"
)

DRAWS = 16
_INNER = 3000


class Polished(NamedTuple):
    """The fit x (B, ...), ||r|| / ||s||, what is left by parameter, and whether J determines x."""

    x: np.ndarray
    residual: float
    left: dict[str, np.ndarray]
    determined: bool
    condition: float


def with_noise(
    problem: Problem, monitor: Monitor, outcomes: list[Outcome], sigmas: list[float | None]
) -> list[Outcome]:
    """The outcomes, those of noisy gradients polished and with `psnr_estimate`.

    Arguments: `sigmas`, by gradient, the standard deviation of the noise in every entry, where it is told (None where
    the problem's own defense says it, or nobody does).
    """
    found, size = list(outcomes), problem.examples
    for victim, sigma in enumerate(sigmas):
        group = outcomes[victim * size : (victim + 1) * size]
        if _concerned(problem, group, sigma):
            monitor.tell(f"looking at the noise of gradient {victim}")
            found[victim * size : (victim + 1) * size] = _estimated(
                problem, victim, group, sigma, several=victim in monitor.several
            )
    return found


def _concerned(problem: Problem, group: list[Outcome], sigma: float | None) -> bool:
    if not all(o.candidates and np.all(np.isfinite(o.candidates[0].image)) for o in group):
        return False
    told = sigma is not None or _is_lossy(problem)
    residual = group[0].candidates[0].gradient_residual
    if told:
        return problem.defense is None or problem.defense.name != "sign"
    layers = group[0].layers
    clean = residual <= problem.matched and all(info.status != "failed" for info in layers)
    sure = clean and all(relative_error(info) <= 1e-3 for info in layers) and problem.rounding <= HALF
    near = NEAR_SMALL if layers[0].unknowns <= SMALL else NEAR
    return not sure and residual <= near and problem.local_steps == 1 and problem.defense is None


def _is_lossy(problem: Problem) -> bool:
    return problem.defense is not None and problem.defense.name in LOSSY


def _estimated(
    problem: Problem, victim: int, group: list[Outcome], sigma: float | None, *, several: bool
) -> list[Outcome]:
    """The group with the polished answer where it is as good as the noise allows; as it is where that is not known."""
    x = np.stack([o.candidates[0].image for o in group]).astype(problem.dtype)
    labels = np.asarray(tags_of(group))
    scales = [o.scale for o in group]
    if len(set(scales)) > 1 or (problem.examples > 1 and scales[0] != 1.0):
        return group
    aware = problem
    if sigma is not None and problem.defense is None:
        aware = _told_of(problem, sigma)
    told = tell(aware, victim)
    fit = _polish(aware, told, victim, labels, x)
    noise: Noise | None
    if told.noisy:
        level = noise_of(aware, victim)
        noise = None if level is None else Noise(_filled(level, fit.left), "white", 0.0)
        if not fit.residual <= NEAR_TOLD or not _misfit(aware, told, labels, fit.x) <= told.matched:
            return group
    elif problem.rounding > HALF:
        noise = read_rounding(fit.left, _sent(problem, victim), fit.x.size, problem.rounding)
    elif fit.residual <= 1e3 * problem.rounding and fit.condition * fit.residual <= 1e-3:
        return _matched(problem, labels, group, fit)
    else:
        noise = read_noise(fit.left, _sent(problem, victim), fit.x.size)
        if noise is not None and noise.spread == "white":
            aware = _told_of(problem, noise.level)
            told = tell(aware, victim)
            fit = _polish(aware, told, victim, labels, fit.x)
            noise = read_noise(fit.left, _sent(problem, victim), fit.x.size)
    if several and fit.residual > FAINT and sigma is None:
        return group  # more examples than were told of are no noise
    if noise is None or not fit.determined or other_images(problem, fit.x, jnp.asarray(labels)):
        return group
    errors, spreads = _errors(aware, told, labels, fit.x, noise)
    decibel = -10 * errors
    if float(np.max(spreads)) > SPREAD:
        words = _SPREAD.format(decibel=float(decibel.min()), spread=20 * float(np.max(spreads)))
        return [dataclasses.replace(o, reason=words) for o in group]
    if not np.all(np.isfinite(decibel)) or decibel.min() < LEAST_DECIBEL:
        words = _HIDDEN.format(decibel=float(np.nan_to_num(decibel.min(), nan=0.0)))
        return [dataclasses.replace(o, reason=words) for o in group]
    return [
        dataclasses.replace(
            o,
            candidates=(Candidate(fit.x[b], o.candidates[0].label, fit.residual, o.candidates[0].target),),
            seen=np.ones(fit.x.shape[1:]),
            curved=False,
            symmetry=None,
            moved=None,
            psnr_estimate=float(decibel[b]),
        )
        for b, o in enumerate(group)
    ]


def _matched(problem: Problem, labels: np.ndarray, group: list[Outcome], fit: Polished) -> list[Outcome]:
    """The group where the polish matched the gradient to rounding: there was no noise, the layers lost digits."""
    tags = jnp.asarray(labels)
    if not fit.determined or other_images(problem, fit.x, tags) or at_kink(problem, fit.x, tags):
        return group
    info = LayerInfo("network", fit.x.size, fit.x.size, 0, fit.condition, fit.residual, 0, 0, "determined")
    return [
        dataclasses.replace(
            o,
            candidates=(dataclasses.replace(o.candidates[0], image=fit.x[b], gradient_residual=fit.residual),),
            layers=(info,),
            seen=np.ones(fit.x.shape[1:]),
            proof=None,
            curved=False,
            symmetry=None,
            moved=None,
        )
        for b, o in enumerate(group)
    ]


def _told_of(problem: Problem, sigma: float) -> Problem:
    """The problem as if white noise had been told of, without a prior: what is determined needs none."""
    return dataclasses.replace(problem, defense=build_defense(f"gaussian:{sigma!r}"), prior="none")


def _sent(problem: Problem, victim: int) -> dict[str, np.ndarray]:
    return {p: np.asarray(g[victim], float) for p, g in problem.gradients.items()}


def _filled(level: Mapping[str, float], like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {p: np.full(a.shape, level[p]) for p, a in like.items()}


def _misfit(problem: Problem, told: Told, labels: np.ndarray, x: np.ndarray) -> float:
    program = match_programs(compare(problem, told), float(problem.tolerance))[3]
    return float(program(*given(problem, told, labels), jnp.asarray(x)))


def _polish(problem: Problem, told: Told, victim: int, labels: np.ndarray, x: np.ndarray) -> Polished:
    solve, _, look, *_ = match_programs(compare(problem, told), float(problem.tolerance), 1e-4)
    known = given(problem, told, labels, prior=told.sent.prior is not None)
    solution = solve(*known, jnp.asarray(x)[None])
    best = np.asarray(solution.x[0])
    best = best if np.all(np.isfinite(best)) else x
    probe = look(*given(problem, told, labels), jnp.asarray(best))
    sent = _sent(problem, victim)
    there = _prediction(predicted(problem))(dict(problem.variables), jnp.asarray(best), jnp.asarray(labels))
    left = {p: np.asarray(there[p], float) - sent[p] for p in sent}
    size = np.sqrt(sum(float(np.sum(g**2)) for g in sent.values()))
    residual = float(np.sqrt(sum(float(np.sum(r**2)) for r in left.values())) / size)
    determined = float(probe.lost) <= max(NULL_SPACE, 1e-3 * residual)
    return Polished(best, residual, left, determined, lsmr_condition(probe))


@functools.lru_cache(maxsize=16)
def _prediction(gradient: Any) -> Any:
    return jax.jit(lambda variables, x, labels: gradient(variables, x, labels))


def _errors(problem: Problem, told: Told, labels: np.ndarray, x: np.ndarray, noise: Noise) -> tuple[Any, Any]:
    """Mean and deviation over draws of the noise of log10 (mean square of x - x*, as a share of a pixel's range), (B,).

    The estimate is of this image's own PSNR: where a few directions hold most of the error, the logarithm's mean is
    nearer to what one draw gives than the logarithm of the mean, which rare large draws decide.
    """
    solve = _propagation(compare(problem, told), float(problem.tolerance))
    held = told.sent.prior is not None
    known = given(problem, told, labels, prior=held)
    rng = np.random.default_rng(0)
    low, high = problem.limits
    squares = []
    for _ in range(DRAWS):
        n = {p: jnp.asarray(a, problem.dtype) for p, a in draw_noise(noise, rng).items()}
        unit = jnp.asarray(rng.normal(size=x.shape), problem.dtype)
        d = np.asarray(solve(*known, jnp.asarray(x), n, unit))
        shares = np.mean((d / (high - low)).reshape(len(x), -1) ** 2, axis=1)
        squares.append(np.log10(np.maximum(shares, 1e-35)))
    return np.mean(squares, axis=0), np.std(squares, axis=0, ddof=1)


@functools.lru_cache(maxsize=16)
def _propagation(form: Compare, tolerance: float) -> Any:
    """(variables, sent, labels, x, noise, unit) -> d with least ||W (J d - n)||^2, and what a prior adds to it."""

    def propagate(variables: Any, sent: Any, labels: Any, x: Array, noise: Any, unit: Array) -> Array:
        _, tangent = jax.linearize(residual_of(form, variables, sent, labels), x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        side = jax.tree.map(jnp.multiply, sent.weights, noise)
        if sent.prior is not None:  # an image as likely as any has amplitudes of `DEVIATION` of the range
            side = (side, sent.prior * DEVIATION * (form.limits[1] - form.limits[0]) * unit)
        return lsmr(operator, side, tolerance=1e-8, max_steps=_INNER).x

    return jax.jit(propagate)
