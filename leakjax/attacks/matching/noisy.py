"""Answers to noisy gradients: the best fit, and how far from the image the noise leaves it.

Where a gradient is matched but for noise, s = g(x*) + n, the answer is polished to the least-squares fit
min_x ||W (g(x) - s)|| (W = 1 / sigma where the noise is told, else 1 / ||g_p||), and its error follows from the noise,

    x - x* = (W J)^+ W n,   J = dg/dx at the answer,

and a second step: draws of n like the noise that was told, or that the residual shows, give its median square. No truth
is used. It is that of this image and this kind of noise, not a bound.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from leakjax.attacks.adaptive import Told, certifiable, noise_of, sends_signs, tell
from leakjax.attacks.certificates.certificate import relative_error
from leakjax.attacks.certificates.other_images import at_kink, other_images, tags_of
from leakjax.attacks.certificates.residual_noise import Noise, draw_noise, read_noise, read_rounding
from leakjax.attacks.matching.outcome import misfit
from leakjax.attacks.matching.own_rounding import Draw, rounding_of
from leakjax.attacks.matching.polishing import SMALL, Polished, errors, polish, sent_by, told_of
from leakjax.attacks.problem import Labels, Monitor, Outcome, Problem
from leakjax.reconstruction import Candidate, LayerInfo
from leakjax.runtime.arrays import to_device

NEAR, NEAR_SMALL, NEAR_TOLD = 0.05, 0.5, 0.6
"""||g(x) - s|| / ||s|| up to which what is left may be noise that nobody told of (for no more than `SMALL` unknowns the
polish costs little, and may begin farther away), and noise that was told."""

FAINT = 0.01
"""||g(x) - s|| / ||s|| above which the rank of a head's gradient, where it says that there are more examples than were
told of, is believed before noise is."""

LEAST_DECIBEL = 35.0
"""Below it an error is some 2 % of the range and more, and what it does to the gradient is no longer of first order:
estimates of 20 to 30 dB were off by 6 to 20 dB."""

ROUNDED = 3.0
"""How much more than a draw of rounding may be left of a gradient that rounding explains: another order of sums."""

_HIDDEN = (
    "the noise is too large for a first-order estimate of the error, which would be {decibel:.0f} dB: what is seen may "
    "be the prior's, or a local minimum's"
)

APART, ALSO = 1e-2, 2.0
"""Of the range, by which two answers to noise are two images, and how much worse than the other one may fit."""

SPREADS = (0.0, 0.1, 0.2, 0.2)
"""Of the noise about mid-range from which fits begin, in units of the range."""

SPREAD = 0.25
"""Deviation of log10 of the error over draws of the noise, above which no estimate is given: 2.5 dB. It is 0.1 for a
hundred equal directions and larger where a few hold most of the error: then one image may be off by 3 dB by chance."""

_SPREAD = (
    "the noise leaves about {decibel:.0f} dB, give or take {spread:.0f}: a few directions hold most of the error, and "
    "no closer estimate can be given"
)


_ANOTHER = "two images explain the gradient but for noise: its digits do not tell which of the two it is"
_KINKS = "kinks lie nearer to the answer than the noise reaches, and what it does to the image could not be estimated"


class Explained(NamedTuple):
    """A fit whose residual is explained: by noise that `draw` draws, of which the problem was made aware, or, where it
    counts as matched, by rounding (None)."""

    aware: Problem
    told: Told
    fit: Polished
    draw: Draw | None


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
        return not sends_signs(problem)
    layers = group[0].layers
    clean = residual <= problem.tolerances.matched and all(info.status != "failed" for info in layers)
    good = all(relative_error(info) <= problem.tolerances.error for info in layers)
    sure = clean and good and not problem.tolerances.coarse
    near = NEAR_SMALL if layers[0].unknowns <= SMALL else NEAR
    return not sure and residual <= near and problem.local_steps == 1 and problem.defense is None


def _is_lossy(problem: Problem) -> bool:
    return not certifiable(problem)


def _estimated(
    problem: Problem, victim: int, group: list[Outcome], sigma: float | None, *, several: bool
) -> list[Outcome]:
    """The group with the polished answer where it is as good as the noise allows; as it is where that is not known."""
    x = np.stack([o.candidates[0].image for o in group]).astype(problem.dtype)
    labels = np.asarray(tags_of(group))
    scales = [o.scale for o in group]
    if len(set(scales)) > 1 or (problem.examples > 1 and scales[0] != 1.0):
        return group
    starts = _starts(problem, x)
    tried = (_explained(problem, victim, labels, start, sigma, smoothed=k > 0) for k, start in enumerate(starts))
    found = next((one for one in tried if one is not None), None)
    if found is None:
        return group
    aware, told, fit, draw = found
    if draw is None:
        return _matched(problem, group, fit)
    if several and fit.residual > FAINT and sigma is None:
        return group  # more examples than were told of are no noise
    if not fit.determined or other_images(problem, fit.x, to_device(fit.labels)):
        return group
    if len(group) == 1 and _another_fits(problem, victim, group[0], sigma, found):
        return [dataclasses.replace(group[0], reason=_ANOTHER)]
    logs, spreads = errors(aware, told, fit, draw)
    decibel, spread = -10 * logs, 20 * float(np.max(spreads))
    words = None
    if not np.all(np.isfinite(decibel)):
        words = _KINKS
    elif float(np.max(spreads)) > SPREAD:
        words = _SPREAD.format(decibel=float(decibel.min()), spread=spread)
    elif decibel.min() < LEAST_DECIBEL:
        words = _HIDDEN.format(decibel=float(decibel.min()))
    found = []
    for b, o in enumerate(group):
        target = None if o.candidates[0].target is None else fit.labels[b]
        image = Candidate(fit.x[b], o.candidates[0].label, fit.residual, target)
        if words is not None:
            found.append(dataclasses.replace(o, candidates=(image, *o.candidates[1:]), reason=words))
            continue
        estimate = {"psnr_estimate": float(decibel[b]), "psnr_spread": 10 * float(spreads[b])}
        clear = {"seen": np.ones(fit.x.shape[1:]), "curved": False, "symmetry": None, "moved": None}
        found.append(dataclasses.replace(o, candidates=(image,), **clear, **estimate))
    return found


def _another_fits(problem: Problem, victim: int, outcome: Outcome, sigma: float | None, found: Explained) -> bool:
    """Whether another of the candidates leads to another image that noise of the same size explains."""
    width = problem.input_range[1] - problem.input_range[0]
    for other in outcome.candidates[1:]:
        x = np.asarray(other.image, problem.dtype)[None]
        labels = np.asarray([other.label]) if other.target is None else np.asarray(other.target)[None]
        also = _explained(problem, victim, labels, x, sigma, smoothed=False)
        apart = also is not None and float(np.max(np.abs(also.fit.x - found.fit.x))) > APART * width
        if also is not None and apart and also.fit.residual <= ALSO * found.fit.residual:
            return True
    return False


def _starts(problem: Problem, x: Float[np.ndarray, "B *image"]) -> list[Float[np.ndarray, "B *image"]]:
    """Where fits begin: at x, and behind kinks, whose pattern noise has spoiled, by smoothing from x, and for few
    unknowns from mid-range and from noise about it."""
    if not problem.network.has_kinks:
        return [x]
    if x.size > SMALL:
        return [x, x]
    low, high = problem.input_range
    rng = np.random.default_rng(problem.seed)
    noise = [SPREADS[k] * (high - low) * rng.normal(size=x.shape) for k in range(len(SPREADS))]
    return [x, x, *(np.asarray(0.5 * (low + high) + one, x.dtype) for one in noise)]


def _explained(
    problem: Problem, victim: int, labels: Labels, x: Float[np.ndarray, "B ..."], sigma: float | None, *, smoothed: bool
) -> Explained | None:
    """The fit from x with the noise that its residual shows, or that was told; None where that does not explain it."""
    aware = told_of(problem, sigma) if sigma is not None and problem.defense is None else problem
    told = tell(aware, victim)
    fit = polish(aware, told, victim, labels, x, smoothed=smoothed)
    if told.noisy:
        level = noise_of(aware, victim)
        near = fit.residual <= NEAR_TOLD and misfit(aware, told, fit.labels, fit.x) <= told.matched
        noise = Noise(_filled(level, fit.left), "white", 0.0) if near and level else None
        return None if noise is None else Explained(aware, told, fit, _draws(noise))
    if problem.tolerances.coarse:
        noise = read_rounding(fit.left, sent_by(problem, victim), fit.x.size, problem.tolerances.rounding)
        return None if noise is None else Explained(aware, told, fit, _draws(noise))
    if fit.residual <= 1e3 * problem.tolerances.rounding:
        if fit.condition * fit.residual <= problem.tolerances.error:
            return Explained(aware, told, fit, None)
        rounded = _of_rounding(problem, told, victim, fit)
        if rounded is not None or problem.statistics:
            return rounded
    return _of_white_noise(problem, victim, fit) or _of_its_spread(problem, told, victim, fit)


def _draws(noise: Noise) -> Draw:
    return functools.partial(draw_noise, noise)


def _of_white_noise(problem: Problem, victim: int, fit: Polished) -> Explained | None:
    """The fit that is best for white noise: another one puts the noise where its own weights are small."""
    entries = sum(r.size for r in fit.left.values())
    level = float(np.sqrt(sum(float(np.sum(r**2)) for r in fit.left.values()) / max(entries - fit.x.size, 1)))
    noise = None
    for _ in range(2):  # the level says when the fit is good enough
        aware = told_of(problem, level)
        told = tell(aware, victim)
        fit = polish(aware, told, victim, fit.labels, fit.x, smoothed=False)
        noise = read_noise(fit.left, sent_by(problem, victim), fit.x.size)
        if noise is None or noise.spread != "white":
            return None
        if noise.level > 0.9 * level:
            return Explained(aware, told, fit, _draws(noise))
        level = noise.level
    aware = told_of(problem, level)
    return None if noise is None else Explained(aware, tell(aware, victim), fit, _draws(noise))


def _of_its_spread(problem: Problem, told: Told, victim: int, fit: Polished) -> Explained | None:
    noise = read_noise(fit.left, sent_by(problem, victim), fit.x.size)
    return None if noise is None else Explained(problem, told, fit, _draws(noise))


def _of_rounding(problem: Problem, told: Told, victim: int, fit: Polished) -> Explained | None:
    """The fit with what the client's own precision does at it; None where that is not at hand, or leaves less."""
    draw = rounding_of(problem, told, fit.labels, fit.x)
    if draw is None:
        return None
    drawn = draw(np.random.default_rng(1))
    sizes = [np.sqrt(sum(float(np.sum(a[p] ** 2)) for p in fit.left)) for a in (fit.left, drawn)]
    return Explained(problem, told, fit, draw) if sizes[0] <= ROUNDED * sizes[1] else None


def _matched(problem: Problem, group: list[Outcome], fit: Polished) -> list[Outcome]:
    """The group where the polish matched the gradient to rounding: there was no noise, the layers lost digits."""
    tags = to_device(fit.labels)
    if not fit.determined or other_images(problem, fit.x, tags) or at_kink(problem, fit.x, tags):
        return group
    info = LayerInfo(
        name="network",
        unknowns=fit.x.size,
        rank=fit.x.size,
        rank_deficiency=0,
        condition=fit.condition,
        residual=fit.residual,
        pull_back_depth=0,
        steps=0,
        status="determined",
        solver="match",
    )
    return [
        dataclasses.replace(
            o,
            candidates=(
                dataclasses.replace(
                    o.candidates[0],
                    image=fit.x[b],
                    gradient_residual=fit.residual,
                    target=None if o.candidates[0].target is None else fit.labels[b],
                ),
            ),
            layers=(info,),
            seen=np.ones(fit.x.shape[1:]),
            proof=None,
            curved=False,
            symmetry=None,
            moved=None,
        )
        for b, o in enumerate(group)
    ]


def _filled(
    level: Mapping[str, float], like: Mapping[str, Float[np.ndarray, "..."]]
) -> dict[str, Float[np.ndarray, "..."]]:
    return {p: np.full(a.shape, level[p]) for p, a in like.items()}
