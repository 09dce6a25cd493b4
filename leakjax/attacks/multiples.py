"""Multiples of an image, which no gradient tells apart that may have been multiplied by a factor.

Without biases and with activations that are homogeneous, act(t u) = t^d act(u), the gradient at t x is parallel to that
at x where dL/dz is: where the last layer has one or two outputs, or its softmax is saturated. Then c g(t x) = g(x) for
some c: whoever knows c knows t. Unless c is told, every multiple in range explains what was sent, with its own labels.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.heads import bias_path
from leakjax.losses import labels_of
from leakjax.network import Gradient, example_gradients
from leakjax.reconstruction import Certificate

MULTIPLES = "multiples"
_DOUBT = (
    "the gradient may have been multiplied by a factor, which this last layer does not show: tell it (gradient_scale, "
    "--gradient-scale)"
)
_TRIED = 0.8, 1.25  # far enough from 1 that a gradient that is not parallel shows it
_NEAR = 0.95, 0.99, 1.01, 1.05  # of an image that fills its range, those that may still lie within
_HIDES = 1e-9, 1e-5
"""Relative difference of two parallel gradients: 1e3 units of rounding, between these. What differs by more than the
lower one has its factor to seven digits in float64."""


def with_multiples(problem: Problem, monitor: Monitor, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of all gradients, those marked whose images' multiples have the same gradient times a factor.

    Nothing is sought where the factor is known, where a bias of the last layer shows it, or where a defense says what
    was sent.
    """
    if problem.defense is not None or problem.local_steps > 1 or _biased(problem):
        return outcomes
    found, size = [], problem.examples
    for first in range(0, len(outcomes), size):
        group, victim = outcomes[first : first + size], first // size
        if problem.factor(victim) is None and all(outcome.candidates for outcome in group):
            monitor.tell(f"looking for multiples of image {victim}")
            group = _marked(problem, group)
        found += group
    return found


def with_doubt(problem: Problem, certificates: list[Certificate]) -> list[Certificate]:
    """The certificates, those `failed` with the factor among the reasons where the last layer would not show one."""
    if problem.outputs > 2 or problem.defense is not None or problem.chain is None or _biased(problem):
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
    if any(candidate.target is not None for candidate in first):
        return group
    x = np.stack([candidate.image for candidate in first])
    labels = np.asarray([candidate.label for candidate in first])
    each = example_gradients(problem.network.logits, problem.loss, tuple(problem.gradients))
    away = functools.partial(_turned(each), dict(problem.variables), jnp.asarray(x, problem.dtype), jnp.asarray(labels))
    hides = float(np.clip(1e3 * problem.rounding, *_HIDES))
    hidden = np.max([np.asarray(away(t, jnp.asarray(labels))) for t in _TRIED], axis=0) <= hides
    if not np.any(hidden):
        return group
    counts = range(labels_of(problem.outputs)) if problem.labels is None else ()
    alike = {label: np.asarray(away(1.0, jnp.full(len(group), label))) <= hides for label in counts}
    return [
        _with_rays(problem, outcome, [label for label, same in alike.items() if same[b]], len(group) == 1)
        if hidden[b]
        else outcome
        for b, outcome in enumerate(group)
    ]


def _with_rays(problem: Problem, outcome: Outcome, labels: list[int], alone: bool) -> Outcome:
    first, *rest = outcome.candidates
    first = dataclasses.replace(first, image=first.image * _inwards(problem, first.image))
    if not any(problem.in_range(first.image * t) for t in (*_TRIED, *_NEAR)):
        return outcome
    twins = [dataclasses.replace(first, label=label) for label in labels if label != first.label]
    names = [name for name in (outcome.symmetry, MULTIPLES) if name is not None]
    whole = alone and not rest and outcome.layers[0].rank == outcome.layers[0].unknowns
    return dataclasses.replace(
        outcome,
        candidates=(first, *rest, *twins),
        symmetry=", ".join(names),
        multiples=True,
        curved=outcome.curved or not whole,
    )


def _inwards(problem: Problem, x: np.ndarray) -> float:
    """The largest factor up to 1, in steps of an eighth, that brings an image into the range; 1 where none does."""
    factors = 0.875 ** np.arange(64)
    return next((float(t) for t in factors if problem.in_range(x * t)), 1.0)


@functools.lru_cache(maxsize=16)
def _turned(each: Gradient) -> Any:
    """(variables, x, labels, t, others) -> by example max_p ||g_p' - s g_p|| / ||s g_p||, where g' is the gradient of
    t x with the label `others`, s = <g', g> / <g, g>. A parameter whose gradient is 1e-9 of all is measured by that."""

    def turned(variables: Any, x: Float[Array, "B ..."], labels: Array, t: Any, others: Array) -> Float[Array, " B"]:
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
