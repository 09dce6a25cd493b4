"""The brightness of an image that is its own target, where the last layer has no bias to show dL/dz."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar

from leakjax.attacks.problem import Problem
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.reader import Arrays
from leakjax.reconstruction import Candidate
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient

_FACTORS = np.geomspace(1e-6, 1e6, 2401)  # of an image that fits the range: where its scale is looked for


def is_its_own_multiple(asked: Problem, victim: int, candidate: Candidate, s: float) -> bool:
    """Whether s times an image that fits the range has the gradient that was sent with itself as its target: then the
    loss sees no size."""
    image = candidate.image * largest_factor(asked, candidate.image)
    return residual_at(asked, victim)(s * image) <= 10 * asked.tolerances.matched


def largest_factor(problem: Problem, x: Float[np.ndarray, "*image"]) -> float:
    """The largest factor above 0 with which x lies in the range; 1 where none does."""
    low, high = (np.broadcast_to(end, x.shape) for end in problem.limits)
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.where(x > 0, high / x, np.where(x < 0, low / x, np.inf))
    largest = float(np.min(most, initial=np.inf))
    return largest if 0 < largest < np.inf else 1.0


def at_scale(asked: Problem, victim: int, candidate: Candidate) -> list[Candidate]:
    """The multiples s x of an image that have the gradient that was sent with themselves as their target.

    On a homogeneous network the outputs are s o, and x has the gradient with dL/do = t: s dL/do(s o, s x) = t.
    """
    assert candidate.target is not None
    fitted = largest_factor(asked, candidate.image)
    image, target = candidate.image * fitted, candidate.target / fitted
    variables, x = dict(asked.variables), to_device(image[None], asked.dtype)
    outputs = asked.network.logits(variables, x)
    program = _pull_at(asked.loss, asked.target_shape)

    def off(s: Float[np.ndarray, " S"]) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
        found = program(outputs[0], x[0], to_device(target, asked.dtype), to_device(s, asked.dtype))
        return np.asarray(found[0], float), np.asarray(found[1], float)

    left, _ = off(_FACTORS)
    dips = 1 + np.flatnonzero((left[1:-1] <= left[:-2]) & (left[1:-1] < left[2:]))
    away, found = residual_at(asked, victim), []
    for k in dips[np.argsort(left[dips])[:4]]:
        for s in _nearest(off, *_FACTORS[[k - 1, k + 1]]):
            residual = away(s * image)
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


def residual_at(asked: Problem, victim: int) -> Callable[[Float[np.ndarray, "*image"]], float]:
    """x -> ||g(x) - g|| / ||g||, the input being the target."""
    sent = {p: to_device(g[victim], asked.dtype) for p, g in asked.gradients.items()}

    def away(x: Float[np.ndarray, "*image"]) -> float:
        here = to_device(x[None], asked.dtype)
        return float(misfit(asked.client)(dict(asked.variables), here, here.reshape(1, *asked.target_shape), sent))

    return away


@keep(16)
def misfit(gradient: Gradient) -> Callable[..., Float[Array, ""]]:
    """(variables, x, targets, sent) -> the relative misfit of the gradient."""

    def relative(
        variables: Arrays, x: Float[Array, "1 ..."], targets: Float[Array, "1 ..."], sent: Arrays
    ) -> Float[Array, ""]:
        off = jax.tree.map(jnp.subtract, gradient(variables, x, targets), dict(sent))
        return jnp.asarray(optax.tree.norm(off) / optax.tree.norm(dict(sent)))

    return jax.jit(relative)
