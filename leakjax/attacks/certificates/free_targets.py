"""What is left to say of gradients whose target may be any numbers, once their images are known.

With a bias at the head dL/dz is known as it was sent: the image does not depend on the loss, and the target is read
from the outputs and dL/dz. Without one, dz is known up to a factor s: on a positively homogeneous network without
biases s x with dz / s has the very same gradient for every s, and only a target that depends on x itself (an
autoencoder's) says which it was.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.certificates.multiples import MULTIPLES
from leakjax.attacks.certificates.own_scale import at_scale, is_its_own_multiple, largest_factor, misfit, residual_at
from leakjax.attacks.certificates.several_labels import of_several, with_bits, with_sure_bits
from leakjax.attacks.heads.single import bias_path
from leakjax.attacks.heads.targets import pull_at, solve_target
from leakjax.attacks.problem import Outcome, Problem
from leakjax.models.losses import UNKNOWN
from leakjax.models.reader import Arrays
from leakjax.reconstruction import Candidate
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.lsmr import lsmr

_INNER = 500  # steps that fit dL/do: its columns are alike, each the last layer's input and more
_TRIED = 0.8, 1.25  # multiples at which a network shows that it is not homogeneous
_TARGETS = (
    "the last layer has no bias, and the target may be any numbers: the scale of its input is open, and the layers "
    "before it depend on it; give the targets (labels=...)"
)


def with_fitted_pulls(asked: Problem, freed: Problem, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of noisy gradients with dL/do at the head fitted to all of what was sent, not read from one bias.

    The gradient is linear in it: min_t ||g(x, t) - g|| at the answer x.
    """
    if freed is asked or not freed.targets:
        return outcomes
    return [_fitted(freed, victim, outcome) for victim, outcome in enumerate(outcomes)]


def _fitted(freed: Problem, victim: int, outcome: Outcome) -> Outcome:
    if not outcome.candidates or outcome.candidates[0].gradient_residual <= freed.tolerances.matched:
        return outcome
    first, *rest = outcome.candidates
    if first.target is None or not np.all(np.isfinite(first.image)):
        return outcome
    sent = {p: to_device(g[victim], freed.dtype) for p, g in freed.gradients.items()}
    given = dict(freed.variables), to_device(first.image[None], freed.dtype)
    fitted = _fit(freed.client, freed.tolerances.solve)(*given, to_device(first.target[None], freed.dtype), sent)
    left = float(misfit(freed.client)(*given, fitted, sent))
    one = dataclasses.replace(first, target=np.asarray(fitted, float)[0], gradient_residual=left)
    return dataclasses.replace(outcome, candidates=(one, *rest))


@keep(16)
def _fit(gradient: Gradient, tolerance: float) -> Callable[..., Float[Array, "1 K"]]:
    """(variables, x, t, sent) -> the t that fits what was sent best."""

    def fit(variables: Arrays, x: Float[Array, "1 ..."], t: Float[Array, "1 K"], sent: Arrays) -> Float[Array, "1 K"]:
        here, tangent = jax.linearize(lambda t: gradient(variables, x, t), t)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(t.shape, t.dtype))
        left = jax.tree.map(jnp.subtract, dict(sent), here)
        return t + lsmr(operator, left, tolerance=10 * tolerance, max_steps=_INNER).x

    return jax.jit(fit)


def with_targets(asked: Problem, freed: Problem, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of a problem that was solved as `freed`, with the targets of the loss that was `asked` for."""
    if freed is asked:
        return [with_sure_bits(asked, o) for o in outcomes] if of_several(asked) else outcomes
    biased = bias_path(freed.segments[-1], freed.variables) is not None
    return [_one(asked, freed, victim, outcome, biased) for victim, outcome in enumerate(outcomes)]


def _one(asked: Problem, freed: Problem, victim: int, outcome: Outcome, biased: bool) -> Outcome:
    noisy = outcome.psnr_estimate is not None
    good = [c for c in outcome.candidates if noisy or c.gradient_residual <= freed.tolerances.matched]
    outcome = dataclasses.replace(outcome, scale=outcome.scale if asked.factor(victim) is not None else float("nan"))
    if not good or (not noisy and any(info.status == "failed" for info in outcome.layers)):
        reason = outcome.reason if biased else outcome.reason or _TARGETS
        return dataclasses.replace(outcome, candidates=_untold(asked, outcome.candidates), reason=reason)
    itself = asked.target_kind == "input" and asked.loss != UNKNOWN
    if not biased:
        if not all(_is_multiple(freed, good[0], s) for s in _TRIED):
            return _refuted(asked, outcome, _TARGETS)
        if not itself or asked.factor(victim) is None:
            return _as_multiples(freed, outcome, good)
        if all(is_its_own_multiple(asked, victim, good[0], s) for s in _TRIED):
            return _as_multiples(freed, outcome, good)
        good = [found for c in good for found in at_scale(asked, victim, c)]
        if not good or noisy:
            return _refuted(asked, outcome, _NOISE if noisy else _NOT_ITS_INPUT)
        good.sort(key=lambda c: c.gradient_residual)
    elif asked.several:
        return with_bits(asked, freed, victim, outcome, good, noisy=noisy)
    elif noisy:
        return dataclasses.replace(outcome, candidates=_untold(asked, outcome.candidates))
    elif itself:
        away = residual_at(asked, victim)
        good = [dataclasses.replace(c, gradient_residual=away(c.image), target=None) for c in good]
    target = _target_of(asked, freed, victim, good[0])
    good = [dataclasses.replace(c, target=target) for c in good]
    return dataclasses.replace(outcome, candidates=tuple(good), target=target)


def _refuted(asked: Problem, outcome: Outcome, reason: str) -> Outcome:
    """The outcome without a claim, and without an estimate of its error."""
    shown = _untold(asked, outcome.candidates)
    return dataclasses.replace(outcome, candidates=shown, refuted=True, psnr_estimate=None, reason=reason)


def _untold(asked: Problem, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates without a target, but for dL/d(outputs) where the loss is not known: that was sent."""
    if asked.loss == UNKNOWN:
        return tuple(candidates)
    return tuple(dataclasses.replace(c, target=None) for c in candidates)


_NOISE = (
    "the last layer has no bias, and noise hides how bright the image is that is its own target: no error can be "
    "estimated"
)
_NOT_ITS_INPUT = "no multiple of the image has this gradient with itself as its target"


def _target_of(asked: Problem, freed: Problem, victim: int, candidate: Candidate) -> Float[np.ndarray, "..."] | None:
    """What the loss compared the outputs with; dL/d(outputs) as it was sent where the loss is not known; None where
    that is open, as it is where a factor may have multiplied what was sent: another one makes another target of it."""
    if asked.loss == UNKNOWN or candidate.target is None:
        return candidate.target
    if asked.target_kind == "input" or asked.factor(victim) is None:
        return None
    head, variables = freed.segments[-1], dict(freed.variables)
    z, dz = pull_at(freed, candidate.image, candidate.target)
    shares = asked.target_kind == "probabilities"
    return solve_target(head, asked.loss, variables, z, dz, asked.target_shape, shares=shares)


def _is_multiple(freed: Problem, candidate: Candidate, s: float) -> bool:
    """Whether s x with the pull dz / s has the gradient that x with dz has."""
    assert candidate.target is not None
    x, target = (to_device(a[None], freed.dtype) for a in (candidate.image, candidate.target))
    here = freed.client(dict(freed.variables), x, target)
    return float(misfit(freed.client)(dict(freed.variables), s * x, target / s, here)) <= freed.tolerances.matched


def _as_multiples(freed: Problem, outcome: Outcome, good: list[Candidate]) -> Outcome:
    """The outcome with each candidate as large as the input range allows, one of its multiples."""
    shown = [dataclasses.replace(c, image=c.image * largest_factor(freed, c.image), target=None) for c in good]
    names = [name for name in (outcome.symmetry, MULTIPLES) if name is not None]
    whole = len(shown) == 1 and outcome.layers[0].rank == outcome.layers[0].unknowns
    return dataclasses.replace(
        outcome,
        candidates=tuple(shown),
        symmetry=", ".join(names),
        multiples=True,
        scale=float("nan"),
        curved=outcome.curved or not whole,
        target=None,
    )
