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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped
from scipy.optimize import minimize_scalar

from leakjax.attacks.heads.single import bias_path, read_head, read_input, read_ray
from leakjax.attacks.heads.targets import solve_target
from leakjax.attacks.heads.wanted import Wanted, bits, told
from leakjax.attacks.problem import Outcome, Problem
from leakjax.constraints.layer import loss_pull
from leakjax.models.losses import LossSpec
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

_LEVEL = 1e-9
"""Sine of the angle to dz at two sizes in a row: no root of a curve, the angle does not depend on the size."""

_DOUBLED = tuple(2.0**k for k in range(1, 40))
"""Factors of a gradient too large for any multiple of the head's input: ||t p(t x)|| reaches all small sizes."""

_SIZES = np.geomspace(1e-5, 1e16, 4200)


class Scaling(NamedTuple):
    """One gradient's factor c, the (label, factor) pairs that explain it as well, its target where no label does, and
    whether another target with another factor explains it as well (`unsure`)."""

    factor: float = 1.0
    others: tuple[tuple[int, float], ...] = ()
    target: Shaped[np.ndarray, " K"] | None = None
    unsure: bool = False


def read_scales(problem: Problem) -> list[Scaling]:
    """What the head says of every gradient of one example; of batches, updates and defended ones nothing is read."""
    plain = [Scaling(problem.factor(v) or 1.0) for v in range(problem.victims)]
    readable = problem.defense is None and problem.local_steps == 1 and problem.examples == 1
    if problem.chain is None or not readable:
        return plain
    head = problem.segments[-1]
    if not (head.linear and head.paths) or problem.free:
        return plain
    if bias_path(head, problem.variables) is None:
        known = [problem.factor(v) is not None for v in range(problem.victims)]
        return [plain[v] if known[v] else _of_direction(problem, head, v) for v in range(problem.victims)]
    return plain if problem.several else [_of_pull(problem, head, v) for v in range(problem.victims)]


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


def withheld(outcomes: list[Outcome], scalings: list[Scaling]) -> list[Outcome]:
    """The outcomes without the targets and factors that are known together only."""
    found, size = [], len(outcomes) // len(scalings)
    for k, outcome in enumerate(outcomes):
        if scalings[k // size].unsure:
            candidates = tuple(dataclasses.replace(c, target=None) for c in outcome.candidates)
            outcome = dataclasses.replace(outcome, candidates=candidates, target=None, scale=float("nan"))
        found.append(outcome)
    return found


def _of_pull(problem: Problem, head: Segment, victim: int) -> Scaling:
    """From dz, which the bias gives, and z."""
    gradient = {p: problem.gradients[p][victim] for p in head.paths}
    dz, x = read_input(head, problem.variables, gradient, problem.tolerances.solve)
    labels = np.asarray(problem.classes) if problem.labels is None else problem.labels[victim]
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
        return Scaling(known or 1.0, target=_target(problem, head, z, dz), unsure=known is None)
    fitting = np.flatnonzero(free <= max(1e-9, 3 * float(np.min(free))))
    fitting = sorted(fitting, key=lambda k: (factors[k] < 0, abs(np.log(abs(factors[k])))))
    others = tuple((told(labels[k])[0], float(factors[k])) for k in fitting[1:])
    return Scaling(float(factors[fitting[0]]), others)


def _target(
    problem: Problem, head: Segment, z: Float[Array, "..."], dz: Float[Array, "..."]
) -> Float[np.ndarray, " K"] | None:
    """t with dL/dz(z, t) = dz where no class explains dz; None where the loss takes no such target: probabilities, or
    numbers."""
    outputs, name = int(np.prod(head.output.shape)), str(problem.loss).partition(":")[0]
    if name not in _SOFT or (outputs == 1 and name == "softmax_cross_entropy"):
        return None
    shares = name == "softmax_cross_entropy"
    t = solve_target(head, problem.loss, problem.variables, z, dz, (outputs,), fit=FIT, shares=shares)
    if t is None or name in ("squared_error", "l2_loss"):
        return t
    slack = max(1e-6, 1e3 * problem.tolerances.rounding)
    return t if t.min() >= -slack and t.max() <= 1.0 + slack else None


_SOFT = ("softmax_cross_entropy", "sigmoid_binary_cross_entropy", "squared_error", "l2_loss")
"""Losses of classes whose clients may have sent soft labels instead, which dL/dz shows."""


@keep(32)
def _pulls(head: Segment, loss: LossSpec) -> Callable[..., Float[Array, "L K"]]:
    def pulls(variables: Arrays, z: Float[Array, "..."], labels: Shaped[Array, "L ..."]) -> Float[Array, "L K"]:
        return jax.vmap(lambda y: jnp.ravel(loss_pull(head, variables, loss, z, y[None])))(labels)

    return jax.jit(pulls)


def _tried(
    problem: Problem, victim: int, direction: Float[np.ndarray, " K"], z: Float[np.ndarray, " K"]
) -> Shaped[np.ndarray, "L ..."]:
    """The targets that may push the outputs along +-`direction`: those given, every class, or two sets of labels."""
    if problem.labels is not None:
        return problem.labels[victim]
    if problem.target_kind == "several":
        return np.stack([bits(d, z, problem.target_shape) for d in (direction, -direction)])
    return np.asarray(problem.classes)


def _fits_unscaled(
    problem: Problem, head: Segment, gradient: Mapping[str, Float[np.ndarray, "..."]], victim: int
) -> bool:
    """Whether some label explains a head without bias with c = 1."""
    arrays = {p: np.asarray(g, problem.dtype)[None] for p, g in gradient.items()}
    options = {
        "wanted": Wanted.of(problem, [victim]),
        "tolerance": problem.tolerances.solve,
        "accept": problem.tolerances.matched,
    }
    found = read_head(head, problem.variables, arrays, problem.loss, **options).candidates
    return any(candidate.residual <= problem.tolerances.matched for candidate in found)


def _of_direction(problem: Problem, head: Segment, victim: int) -> Scaling:
    """From the direction of dz alone: without a bias x is known up to a factor t, and p(t x) must be parallel to it.

    Where it is parallel for a range of t (a hinge, before a margin is met) the factor of one of them is taken.

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
    direction, along, ray = read_ray(head, problem.variables, gradient, problem.loss, problem.tolerances.solve)
    flat = np.asarray(direction, float).ravel()
    best: tuple[float, float] | None = None
    for sign in (1.0, -1.0):
        for label in _tried(problem, victim, flat, sign * np.ravel(along)):

            def pull(t: Float[np.ndarray, " T"], label: Shaped[np.ndarray, "..."] = label) -> Float[np.ndarray, "T K"]:
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
            level = np.flatnonzero(sines <= _LEVEL)
            if len(level) > 1:  # the loss sees no size here: with any factor there is an answer
                p = pull(np.full(8, sign * _SIZES[level[len(level) // 2]]))[0]
                return Scaling(float((flat @ p) / (p @ p)), unsure=True)
            dips = 1 + np.flatnonzero((sines[1:-1] < sines[:-2]) & (sines[1:-1] <= sines[2:]) & (sines[1:-1] < 0.1))
            for k in dips[np.argsort(sines[dips])[:4]]:
                bounds = np.log(_SIZES[[k - 1, k + 1]])
                found: Any = minimize_scalar(
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
