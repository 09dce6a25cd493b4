"""What an unknown factor of the gradient leaves open: multiples of an image, or other images of other factors.

Without biases and with activations that are homogeneous, act(t u) = t^d act(u), the gradient at t x is parallel to that
at x where dL/dz is: where the last layer has one or two outputs, or its softmax is saturated. Then c g(t x) = g(x) for
some c: whoever knows c knows t. Unless c is told, every multiple explains what was sent, with its own labels. In other
networks some other change of x may do the same: where J v = g has a solution, x moves along v as c changes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float

from leakjax.attacks.adaptive import predicted, sends_signs
from leakjax.attacks.heads.single import bias_path
from leakjax.attacks.problem import DeviceLabels, Monitor, Outcome, Problem
from leakjax.models.losses import UNKNOWN, LossSpec, read_loss
from leakjax.models.reader import Arrays
from leakjax.reconstruction import Certificate
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient, example_gradients
from leakjax.solvers.jacobian import inverse_norms
from leakjax.solvers.lsmr import lsmr

MULTIPLES = "multiples"
_DOUBT = (
    "the gradient may have been multiplied by a factor, which this last layer does not show: tell it (gradient_scale, "
    "--gradient-scale)"
)
_NOISE = (
    "the gradient is matched but for noise, or for a factor that this last layer does not show: no error can be "
    "estimated before the factor is told (gradient_scale, --gradient-scale)"
)
_TRIED = 0.8, 1.25  # far enough from 1 that a gradient that is not parallel shows it
_NEARBY = 0.97, 1.03  # where a hinge sees no size until a margin is met
_LEAST, _MARGIN = 1e-9, 2e3
"""Relative difference of two gradients, a fifth of the image apart, up to which one may be the other times a factor: so
many times what is left of the gradient that was sent, or its rounding. Above it t is known to 0.2 / 2e3 = 1e-4."""
_INNER = 6000
_SIZES = np.geomspace(1e-3, 1e3, 601)  # of the answer: multiples at which another label is tried
_GONE = 1e-12  # of dL/dz: below it its direction is rounding


def with_multiples(problem: Problem, monitor: Monitor, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of all gradients, those marked that another factor would explain with another image.

    Nothing is sought where the factor is known, or where a bias of the last layer shows it.
    """
    if sends_signs(problem) or _biased(problem):
        return outcomes
    found, size = [], problem.examples
    for first in range(0, len(outcomes), size):
        group, victim = outcomes[first : first + size], first // size
        if problem.factor(victim) is None and all(outcome.candidates for outcome in group):
            monitor.tell(f"looking for other factors of gradient {victim}")
            group = _marked(problem, group)
        found += group
    return found


def with_doubt(problem: Problem, certificates: list[Certificate]) -> list[Certificate]:
    """The certificates, those `failed` with the factor among the reasons where the last layer would not show one."""
    hidden = problem.outputs <= 2 or problem.examples > 1
    if not hidden or problem.chain is None or _biased(problem):
        return certificates
    known = [problem.factor(k // problem.examples) is not None for k in range(len(certificates))]
    return [
        c if c.status != "failed" or told else dataclasses.replace(c, reason=f"{c.reason}; {_DOUBT}")
        for c, told in zip(certificates, known, strict=True)
    ]


def _biased(problem: Problem) -> bool:
    if problem.chain is None:
        return False
    head = problem.segments[-1]
    return bool(head.linear and head.paths and bias_path(head, problem.variables) is not None)


def _marked(problem: Problem, group: list[Outcome]) -> list[Outcome]:
    """The outcomes of one gradient. An answer out of range is exchanged for its multiple that lies within."""
    first = [outcome.candidates[0] for outcome in group]
    if problem.loss == UNKNOWN or not all(np.all(np.isfinite(candidate.image)) for candidate in first):
        return group  # of targets that may be any numbers `free_targets` says what is open
    x = to_device(np.stack([candidate.image for candidate in first]), problem.dtype)
    labels = to_device(np.stack([np.asarray(c.label if c.target is None else c.target) for c in first]))
    residual = max(candidate.gradient_residual for candidate in first)
    noisy = any(outcome.psnr_estimate is not None for outcome in group)
    left = problem.tolerances.rounding if noisy else max(residual, problem.tolerances.rounding)
    hides = max(_LEAST, _MARGIN * left)
    away = functools.partial(_turned(_each(problem)), dict(problem.variables), x, labels)
    far, near = (np.stack([np.asarray(away(t, labels)) for t in tried]) for tried in (_TRIED, _NEARBY))
    hidden = (far.max(axis=0) <= hides) | (near.min(axis=0) <= hides)
    if np.any(hidden):
        counts = problem.classes if problem.labels is None else ()
        z, sizes = problem.network.logits(dict(problem.variables), x), to_device(_SIZES, problem.dtype)
        turned = functools.partial(_pushed(problem.loss), z, labels, sizes)
        alike = {label: np.asarray(turned(label)) <= hides for label in counts}
        return [
            _with_rays(problem, outcome, [label for label, same in alike.items() if same[b]], len(group) == 1)
            if hidden[b]
            else outcome
            for b, outcome in enumerate(group)
        ]
    if noisy:
        return [dataclasses.replace(o, psnr_estimate=None, refuted=True, reason=_NOISE) for o in group]
    if residual > problem.tolerances.matched:
        return group
    open_factor = _open_factor(predicted(problem), problem.tolerances.solve)
    if float(open_factor(dict(problem.variables), x, labels)) > hides:
        return group
    return [dataclasses.replace(o, multiples=True, curved=True) for o in group]


def _each(problem: Problem) -> Gradient:
    """(variables, x, labels) -> {path: (B, *parameter)}: the gradient of each example, or what is sent for all."""
    if problem.defense is None and problem.local_steps == 1:
        return example_gradients(problem.network.logits, problem.loss, tuple(problem.gradients))
    return _repeated(predicted(problem))


@keep(16)
def _repeated(gradient: Gradient) -> Gradient:
    def repeated(variables: Arrays, x: Float[Array, "B ..."], labels: DeviceLabels) -> dict[str, Float[Array, "B ..."]]:
        return {p: jnp.repeat(g[None], len(x), axis=0) for p, g in gradient(variables, x, labels).items()}

    return repeated


@keep(16)
def _open_factor(gradient: Gradient, tolerance: float) -> Callable[..., Float[Array, ""]]:
    """(variables, x, labels) -> min_v ||W (J v - g)|| / ||W g||: 0 where x can move as the factor of g changes."""

    def left(variables: Arrays, x: Float[Array, "B *image"], labels: DeviceLabels) -> Float[Array, ""]:
        here, plain = jax.linearize(lambda x: gradient(variables, x, labels), x)
        over = inverse_norms(here)

        def tangent(d: Float[Array, "B *image"]) -> dict[str, Float[Array, "..."]]:
            return jax.tree.map(jnp.multiply, over, plain(d))

        rows = jax.tree.map(jnp.multiply, over, here)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        v = lsmr(operator, rows, tolerance=10 * tolerance, max_steps=_INNER).x
        return optax.tree.norm(optax.tree.sub(rows, tangent(v))) / optax.tree.norm(rows)

    return jax.jit(left)


def _with_rays(problem: Problem, outcome: Outcome, labels: list[int], alone: bool) -> Outcome:
    first, *rest = outcome.candidates
    first = dataclasses.replace(first, image=first.image * _inwards(problem, first.image))
    twins = [dataclasses.replace(first, label=label) for label in labels if label != first.label]
    names = [name for name in (outcome.symmetry, MULTIPLES) if name is not None]
    whole = alone and not rest and outcome.layers[0].rank == outcome.layers[0].unknowns
    return dataclasses.replace(
        outcome,
        candidates=(first, *rest, *twins),
        symmetry=", ".join(names),
        multiples=True,
        scale=float("nan"),
        curved=outcome.curved or not whole,
    )


def _inwards(problem: Problem, x: Float[np.ndarray, "*image"]) -> float:
    """The largest factor up to 1, in steps of an eighth, that brings an image into the range; 1 where none does."""
    largest = float(np.max(np.abs(x), initial=0.0))
    ends = float(np.max(np.abs(problem.input_range)))
    factors = min(1.0, ends / largest if largest > 0 else 1.0) * 0.875 ** np.arange(64)
    return next((float(t) for t in factors if problem.in_range(x * t)), 1.0)


@keep(16)
def _pushed(loss: LossSpec) -> Callable[..., Float[Array, " B"]]:
    """(z (B, ...), labels, sizes (T,), other) -> by example the least sine of the angle between dL/dz(z, label) and
    +-dL/dz(s z, other), over the sizes s: 0 where the other label explains a multiple of the image with a factor."""

    def pushed(
        z: Float[Array, "B ..."], labels: DeviceLabels, sizes: Float[Array, " T"], other: int
    ) -> Float[Array, " B"]:
        def sine(z: Float[Array, "..."], label: Any) -> Float[Array, ""]:
            here = jnp.ravel(jax.grad(read_loss(loss))(z, label))
            here = here / jnp.linalg.norm(here)

            def of_size(s: Float[Array, ""]) -> Float[Array, ""]:
                there = jnp.ravel(jax.grad(read_loss(loss))(s * z, jnp.full_like(label, other)))
                size = jnp.linalg.norm(there)
                off = jnp.linalg.norm(there - (there @ here) * here)
                return jnp.where(size > _GONE, off / jnp.maximum(size, _GONE), 1.0)

            return jnp.min(jax.vmap(of_size)(sizes))

        return jax.vmap(sine)(z, labels)

    return jax.jit(pushed)


@keep(16)
def _turned(each: Gradient) -> Callable[..., Float[Array, " B"]]:
    """(variables, x, labels, t, others) -> by example max_p ||g_p' - s g_p|| / ||s g_p||, where g' is the gradient of
    t x with the label `others`, s = <g', g> / <g, g>. A parameter whose gradient is 1e-9 of all is measured by that."""

    def turned(
        variables: Arrays,
        x: Float[Array, "B ..."],
        labels: DeviceLabels,
        t: float | Float[Array, ""],
        others: DeviceLabels,
    ) -> Float[Array, " B"]:
        here, there = each(variables, x, labels), each(variables, t * x, others)
        flat = [(g.reshape(len(x), -1), there[p].reshape(len(x), -1)) for p, g in here.items()]
        total = sum(jnp.sum(g**2, axis=1) for g, _ in flat)
        tiny = jnp.finfo(x.dtype).tiny
        s = sum(jnp.sum(g * h, axis=1) for g, h in flat) / jnp.maximum(total, tiny)
        off = [
            jnp.linalg.norm(h - s[:, None] * g, axis=1)
            / jnp.maximum(jnp.abs(s) * jnp.maximum(jnp.linalg.norm(g, axis=1), 1e-9 * jnp.sqrt(total)), tiny)
            for g, h in flat
        ]
        return jnp.max(jnp.stack(off), axis=0)

    return jax.jit(turned)
