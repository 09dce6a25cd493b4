"""The factor that a gradient was multiplied by, and the target of a loss that is no label, read from the head.

Sums in place of means, loss scaling, accumulated steps, a learning rate with its sign, a client's weight, clipping of
the norm and the weight of a class all send c dL/dtheta. The head's input x is what the rank-one gradient dz x^T says it
is whatever c was, so z = f(x) and p = dL/dz(z, y) are known for every label y, and

    dz = c p(y)                 c = <dz, p> / <p, p>,  y = the label with which nothing is left over.

With two labels p(0) and p(1) are parallel: c and y are known together only, and a gradient with c = 1 is taken for one
that was not scaled. Where c is known already, it is not read. Where no label fits, dL/dz(z, t) = dz is solved for the
target t: smoothed, mixed or several labels.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import minimize_scalar

from leakjax.attacks.heads.single import bias_path, read_head, read_input, read_ray
from leakjax.attacks.problem import Outcome, Problem
from leakjax.constraints.layer import loss_pull
from leakjax.models.losses import labels_of
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment

FIT = 1e-3
"""||dz - c p|| / ||dz|| up to which a label explains dz with a factor of its own: more is another loss, or noise."""

GAIN = 1e-2
"""What a free factor must leave of the misfit of c = 1: a free number always fits somewhat better, this does not happen
by chance where dz has three entries or more that are noise."""

LEAST = 1e-12
"""||dL/dz|| below which its direction is rounding: a saturated softmax is parallel to nothing."""

_DOUBLED = tuple(2.0**k for k in range(1, 40))
"""Factors of a gradient too large for any multiple of the head's input: ||t p(t x)|| reaches all small sizes."""

_SIZES = np.geomspace(1e-5, 1e16, 4200)


class Scaling(NamedTuple):
    """One gradient's factor c, the (label, factor) pairs that explain it as well, its target where no label does."""

    factor: float = 1.0
    others: tuple[tuple[int, float], ...] = ()
    target: Float[np.ndarray, " K"] | None = None


def read_scales(problem: Problem) -> list[Scaling]:
    """What the head says of every gradient of one example; of batches, updates and defended ones nothing is read."""
    plain = [Scaling(problem.factor(v) or 1.0) for v in range(problem.victims)]
    readable = problem.defense is None and problem.local_steps == 1 and problem.examples == 1
    if problem.chain is None or not readable:
        return plain
    head = problem.segments[-1]
    if not (head.linear and head.paths):
        return plain
    if bias_path(head, problem.variables) is None:
        known = [problem.factor(v) is not None for v in range(problem.victims)]
        return [plain[v] if known[v] else _of_direction(problem, head, v) for v in range(problem.victims)]
    return [_of_pull(problem, head, v) for v in range(problem.victims)]


def unscaled(problem: Problem, scalings: list[Scaling]) -> Problem:
    """The problem with every gradient divided by its factor, and the targets that were read."""
    factors = np.array([s.factor for s in scalings])
    if any(s.target is not None for s in scalings):
        problem = dataclasses.replace(problem, targets=tuple(s.target for s in scalings))
    if np.all(factors == 1.0):
        return problem

    def divide(g: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        return (g / factors.reshape(-1, *[1] * (g.ndim - 1))).astype(g.dtype)

    return dataclasses.replace(problem, gradients={p: divide(g) for p, g in problem.gradients.items()})


def rescaled(outcomes: list[Outcome], scalings: list[Scaling]) -> list[Outcome]:
    """The outcomes with their gradients' factors, and the labels that explain them as well."""
    found, size = [], len(outcomes) // len(scalings)
    for k, outcome in enumerate(outcomes):
        scaling = scalings[k // size]
        twins = [
            dataclasses.replace(c, label=label)
            for c in outcome.candidates
            for label, _ in scaling.others
            if label != c.label
        ]
        known = (*outcome.candidates, *twins)
        scale, target = scaling.factor * outcome.scale, outcome.target if scaling.target is None else scaling.target
        found.append(dataclasses.replace(outcome, candidates=known, scale=scale, target=target))
    return found


def _of_pull(problem: Problem, head: Segment, victim: int) -> Scaling:
    """From dz, which the bias gives, and z."""
    gradient = {p: problem.gradients[p][victim] for p in head.paths}
    dz, x = read_input(head, problem.variables, gradient, problem.tolerances.solve)
    outputs = int(np.prod(head.output.shape))
    labels = np.arange(labels_of(outputs)) if problem.labels is None else problem.labels[victim]
    z = head.function(dict(problem.variables), to_device(x))
    pulls = np.asarray(_pulls(head, problem.loss)(dict(problem.variables), z, to_device(labels)))
    known = problem.factor(victim)
    dz = dz / (known or 1.0)
    flat = np.asarray(dz, float).ravel()
    size = float(np.linalg.norm(flat))
    if not size > 0:
        return Scaling(known or 1.0)
    factors = pulls @ flat / np.maximum(np.sum(pulls**2, axis=1), np.finfo(float).tiny)
    free = np.linalg.norm(flat - factors[:, None] * pulls, axis=1) / size
    plain = np.linalg.norm(flat - pulls, axis=1) / size
    unscaled_fits = float(np.min(plain)) <= problem.tolerances.summed
    if unscaled_fits or known is not None or not float(np.min(free)) <= min(FIT, GAIN * float(np.min(plain))):
        if unscaled_fits or problem.labels is not None or float(np.min(plain)) <= FIT:
            return Scaling(known or 1.0)
        return Scaling(known or 1.0, target=_target(problem, head, z, dz))
    fitting = np.flatnonzero(free <= max(1e-9, 3 * float(np.min(free))))
    fitting = sorted(fitting, key=lambda k: (factors[k] < 0, abs(np.log(abs(factors[k])))))
    others = tuple((int(labels[k]), float(factors[k])) for k in fitting[1:])
    return Scaling(float(factors[fitting[0]]), others)


def _target(
    problem: Problem, head: Segment, z: Float[Array, "..."], dz: Float[Array, "..."]
) -> Float[np.ndarray, " K"] | None:
    """t with dL/dz(z, t) = dz, affine in t; None where the loss takes no such target: probabilities, or numbers."""
    outputs = int(np.prod(head.output.shape))
    if outputs == 1 and problem.loss == "softmax_cross_entropy":
        return None
    pull = functools.partial(_soft_pull, head, problem.loss, dict(problem.variables), z)
    zero = jnp.zeros(outputs, z.dtype)
    slope, at_zero = np.asarray(jax.jacobian(pull)(zero), float), np.asarray(pull(zero), float)
    t = np.linalg.lstsq(slope, np.ravel(dz).astype(float) - at_zero, rcond=None)[0]
    if problem.loss == "softmax_cross_entropy":  # its slope at t = 0 does not hold that t sums to 1
        probabilities = jax.nn.softmax(head.activation.function(dict(problem.variables), z).ravel())
        t = np.asarray(probabilities - jnp.ravel(dz), float) if head.activation.name == "identity" else t
    off = float(np.linalg.norm(np.asarray(pull(to_device(t, z.dtype))) - np.ravel(dz)))
    if not off <= FIT * float(np.linalg.norm(dz)):
        return None
    if problem.loss == "squared_error":
        return t
    slack = max(1e-6, 1e3 * problem.tolerances.rounding)
    share = problem.loss == "sigmoid_binary_cross_entropy" or abs(float(np.sum(t)) - 1.0) <= slack
    return t if share and t.min() >= -slack and t.max() <= 1.0 + slack else None


def _soft_pull(
    head: Segment, loss: str, variables: Arrays, z: Float[Array, "..."], t: Float[Array, " K"]
) -> Float[Array, " K"]:
    return jnp.ravel(loss_pull(head, variables, loss, z, t[None]))


@keep(32)
def _pulls(head: Segment, loss: str) -> Callable[..., Float[Array, "L K"]]:
    def pulls(variables: Arrays, z: Float[Array, "..."], labels: Int[Array, " L"]) -> Float[Array, "L K"]:
        return jax.vmap(lambda y: jnp.ravel(loss_pull(head, variables, loss, z, y)))(labels)

    return jax.jit(pulls)


def _fits_unscaled(
    problem: Problem, head: Segment, gradient: Mapping[str, Float[np.ndarray, "..."]], victim: int
) -> bool:
    """Whether some label explains a head without bias with c = 1."""
    arrays = {p: np.asarray(g, problem.dtype)[None] for p, g in gradient.items()}
    labels = None if problem.labels is None else problem.labels[victim]
    options = {"labels": labels, "tolerance": problem.tolerances.solve, "accept": problem.tolerances.matched}
    found = read_head(head, problem.variables, arrays, problem.loss, **options).candidates
    return any(candidate.residual <= problem.tolerances.matched for candidate in found)


def _of_direction(problem: Problem, head: Segment, victim: int) -> Scaling:
    """From the direction of dz alone: without a bias x is known up to a factor t, and p(t x) must be parallel to it.

    Of two labels and of one output every p is; there the factor is any with which the head has an answer.
    """
    outputs = int(np.prod(head.output.shape))
    gradient = {p: problem.gradients[p][victim] for p in head.paths}
    if _fits_unscaled(problem, head, gradient, victim):
        return Scaling()
    if outputs < 3:
        divided = ({p: g / factor for p, g in gradient.items()} for factor in _DOUBLED)
        fits = (_fits_unscaled(problem, head, smaller, victim) for smaller in divided)
        return Scaling(next((factor for factor, fit in zip(_DOUBLED, fits, strict=True) if fit), 1.0))
    direction, ray = read_ray(head, problem.variables, gradient, problem.loss, problem.tolerances.solve)
    flat = np.asarray(direction, float).ravel()
    labels = np.arange(labels_of(outputs)) if problem.labels is None else problem.labels[victim]
    best: tuple[float, float] | None = None
    for sign in (1.0, -1.0):
        for label in labels:

            def pull(t: Float[np.ndarray, " T"], label: int = int(label)) -> Float[np.ndarray, "T K"]:
                return np.asarray(ray(to_device(t, problem.dtype), to_device(label)), float)

            def away(
                t: Float[np.ndarray, " T"], pull: Callable[..., Float[np.ndarray, "T K"]] = pull
            ) -> Float[np.ndarray, " T"]:
                """Sine of the angle between p and dz."""
                p = pull(t)
                size = np.linalg.norm(p, axis=1)
                away = np.linalg.norm(p - (p @ flat)[:, None] * flat, axis=1)
                return np.where(size > LEAST, away / np.maximum(size, LEAST), 1.0)

            sines = away(sign * _SIZES)
            dips = 1 + np.flatnonzero((sines[1:-1] < sines[:-2]) & (sines[1:-1] <= sines[2:]) & (sines[1:-1] < 0.1))
            for k in dips[np.argsort(sines[dips])[:4]]:
                bounds = np.log(_SIZES[[k - 1, k + 1]])
                found = minimize_scalar(
                    lambda s, away=away, sign=sign: float(away(np.full(8, sign * np.exp(s)))[0]),
                    bounds=bounds,
                    method="bounded",
                    options={"xatol": 1e-15},
                )
                t = sign * float(np.exp(found.x))
                p = pull(np.full(8, t))[0]
                if found.fun <= FIT and (best is None or found.fun < best[0]):
                    best = (float(found.fun), float((flat @ p) / (p @ p)))
    if best is None or abs(best[1] - 1.0) <= max(1e-6, 1e3 * problem.tolerances.rounding):
        return Scaling()
    return Scaling(best[1])
