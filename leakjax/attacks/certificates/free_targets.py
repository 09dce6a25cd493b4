"""What is left to say of gradients whose target may be any numbers, once their images are known.

With a bias at the head dL/dz is known as it was sent: the image does not depend on the loss, and the target is read
from the outputs and dL/dz. Without one, dz is known up to a factor s: on a positively homogeneous network without
biases s x with dz / s has the very same gradient for every s, and only a target that depends on x itself (an
autoencoder's) says which it was.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar

from leakjax.attacks.certificates.multiples import MULTIPLES
from leakjax.attacks.heads.single import bias_path
from leakjax.attacks.heads.targets import solve_target
from leakjax.attacks.problem import Outcome, Problem
from leakjax.constraints.layer import loss_pull
from leakjax.constraints.pull_back import push_forward
from leakjax.models.losses import UNKNOWN, LossSpec, read_loss
from leakjax.models.reader import Arrays
from leakjax.reconstruction import Candidate
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.lsmr import lsmr

_INNER = 500  # steps that fit dL/do: its columns are alike, each the last layer's input and more
_TRIED = 0.8, 1.25  # multiples at which a network shows that it is not homogeneous
_FACTORS = np.geomspace(1e-6, 1e6, 2401)  # of an image that fits the range: where its scale is looked for
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
    left = float(_misfit(freed.client)(*given, fitted, sent))
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
        return outcomes
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
        good = [found for c in good for found in _at_scale(asked, victim, c)]
        if not good or noisy:
            return _refuted(asked, outcome, _NOISE if noisy else _NOT_ITS_INPUT)
        good.sort(key=lambda c: c.gradient_residual)
    elif noisy:
        return dataclasses.replace(outcome, candidates=_untold(asked, outcome.candidates))
    elif itself:
        residual_at = _residual_at(asked, victim)
        good = [dataclasses.replace(c, gradient_residual=residual_at(c.image), target=None) for c in good]
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
    z = push_forward(freed.segments, variables, to_device(candidate.image[None], freed.dtype))[1][-1]
    dz = loss_pull(head, variables, UNKNOWN, z, to_device(candidate.target[None], freed.dtype))
    return solve_target(head, asked.loss, variables, z, dz, asked.target_shape)


def _is_multiple(freed: Problem, candidate: Candidate, s: float) -> bool:
    """Whether s x with the pull dz / s has the gradient that x with dz has."""
    assert candidate.target is not None
    x, target = (to_device(a[None], freed.dtype) for a in (candidate.image, candidate.target))
    here = freed.client(dict(freed.variables), x, target)
    return float(_misfit(freed.client)(dict(freed.variables), s * x, target / s, here)) <= freed.tolerances.matched


def _as_multiples(freed: Problem, outcome: Outcome, good: list[Candidate]) -> Outcome:
    """The outcome with each candidate as large as the input range allows, one of its multiples."""
    shown = [dataclasses.replace(c, image=c.image * _largest(freed, c.image), target=None) for c in good]
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


def _largest(problem: Problem, x: Float[np.ndarray, "*image"]) -> float:
    """The largest factor above 0 with which x lies in the range; 1 where none does."""
    low, high = (np.broadcast_to(end, x.shape) for end in problem.limits)
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.where(x > 0, high / x, np.where(x < 0, low / x, np.inf))
    largest = float(np.min(most, initial=np.inf))
    return largest if 0 < largest < np.inf else 1.0


def _at_scale(asked: Problem, victim: int, candidate: Candidate) -> list[Candidate]:
    """The multiples s x of an image that have the gradient that was sent with themselves as their target.

    On a homogeneous network the outputs are s o, and x has the gradient with dL/do = t: s dL/do(s o, s x) = t.
    """
    assert candidate.target is not None
    fitted = _largest(asked, candidate.image)
    image, target = candidate.image * fitted, candidate.target / fitted
    variables, x = dict(asked.variables), to_device(image[None], asked.dtype)
    outputs = asked.network.logits(variables, x)
    program = _pull_at(asked.loss, asked.target_shape)

    def off(s: Float[np.ndarray, " S"]) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
        found = program(outputs[0], x[0], to_device(target, asked.dtype), to_device(s, asked.dtype))
        return np.asarray(found[0], float), np.asarray(found[1], float)

    left, _ = off(_FACTORS)
    dips = 1 + np.flatnonzero((left[1:-1] <= left[:-2]) & (left[1:-1] < left[2:]))
    residual_at, found = _residual_at(asked, victim), []
    for k in dips[np.argsort(left[dips])[:4]]:
        for s in _nearest(off, *_FACTORS[[k - 1, k + 1]]):
            residual = residual_at(s * image)
            if residual <= asked.tolerances.matched:
                found.append(dataclasses.replace(candidate, image=s * image, gradient_residual=residual, target=None))
                break
    return found


def _nearest(off: Callable[..., tuple[np.ndarray, np.ndarray]], low: float, high: float) -> list[float]:
    """Factors within (low, high), the nearest first: where s dL/do meets t along t, by halving, and where it comes
    nearest to it, by golden sections, which sees half the digits."""
    ends: Any = minimize_scalar(lambda s: float(off(np.exp([s]))[0][0]), bounds=np.log([low, high]), method="bounded")
    tried = [float(np.exp(ends.x))]
    values = off(np.array([low, high]))[1]
    if values[0] * values[1] < 0:
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if off(np.array([middle]))[1][0] * values[0] > 0 else (low, middle)
        tried.append(0.5 * (low + high))
    return sorted(tried, key=lambda s: float(off(np.array([s]))[0][0]))


@keep(16)
def _pull_at(loss: LossSpec, shape: tuple[int, ...]) -> Callable[..., tuple[Float[Array, " S"], Float[Array, " S"]]]:
    """(o, x, t, s (S,)) -> ||s dL/do(s o, s x) - t|| / ||t||, and the part of the difference along t, relatively."""

    def pull_at(
        outputs: Float[Array, "..."], x: Float[Array, "*x"], t: Float[Array, " K"], factors: Float[Array, " S"]
    ) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
        def one(s: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
            pull = jax.grad(lambda o: read_loss(loss)(o, s * x.reshape(shape)))(s * outputs)
            off, size = s * jnp.ravel(pull) - t, jnp.linalg.norm(t)
            return jnp.linalg.norm(off) / size, off @ t / size**2

        return jax.lax.map(one, factors)

    return jax.jit(pull_at)


def _residual_at(asked: Problem, victim: int) -> Callable[[Float[np.ndarray, "*image"]], float]:
    """x -> ||g(x) - g|| / ||g||, the input being the target."""
    sent = {p: to_device(g[victim], asked.dtype) for p, g in asked.gradients.items()}

    def residual_at(x: Float[np.ndarray, "*image"]) -> float:
        here = to_device(x[None], asked.dtype)
        return float(_misfit(asked.client)(dict(asked.variables), here, here.reshape(1, *asked.target_shape), sent))

    return residual_at


@keep(16)
def _misfit(gradient: Gradient) -> Callable[..., Float[Array, ""]]:
    """(variables, x, targets, sent) -> the relative misfit of the gradient."""

    def misfit(
        variables: Arrays, x: Float[Array, "1 ..."], targets: Float[Array, "1 ..."], sent: Arrays
    ) -> Float[Array, ""]:
        off = jax.tree.map(jnp.subtract, gradient(variables, x, targets), dict(sent))
        return jnp.asarray(optax.tree.norm(off) / optax.tree.norm(dict(sent)))

    return jax.jit(misfit)
