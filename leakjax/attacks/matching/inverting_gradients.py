"""Inverting Gradients (Geiping et al., arXiv 2003.14053): cosine distance and total variation, by signed Adam.

    min_x  1 - <g(x), g> / (||g(x)|| ||g||) + alpha TV(x),    low <= x <= high

from x ~ N(0, 1): the sign of the gradient is what Adam sees, its rate falls to a tenth at 3/8, 5/8 and 7/8 of all
steps, and every step ends with a projection into the box. `STEPS` and `ALPHA` are the defaults of the authors' program
for CIFAR-10 (rec_mult.py); elsewhere they take alpha from 1e-6 to 1e-1, and 24,000 steps for ImageNet.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from leakjax.attacks.heads.labelings import likeliest_labels
from leakjax.attacks.matching.descent import Limits, Recipe, cosine_distance, match_by_descent
from leakjax.attacks.problem import Monitor, Outcome, Problem

STEPS, ALPHA = 4800, 1e-4
RATE, DECAY, MILESTONES = 0.1, 0.1, (3 / 8, 5 / 8, 7 / 8)


def inverting_gradients(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """Match the direction of every victim's gradient; labels as for `idlg`."""
    return match_by_descent(problem, monitor, INVERTING_GRADIENTS, likeliest_labels(problem))


def mean_variation(x: Float[Array, "B *space C"]) -> Float[Array, ""]:
    """sum_axes mean |d x / d axis|, over the axes of space."""
    return sum((jnp.mean(jnp.abs(jnp.diff(x, axis=k))) for k in range(1, x.ndim - 1)), jnp.zeros((), x.dtype))


def learning_rate(count: Int[Any, ""], steps: int | Int[Array, ""]) -> float | Float[Array, ""]:
    """The rate of step `count` of `steps`, the first one being 0."""
    return RATE * DECAY ** sum(jnp.where(count >= jnp.floor(share * steps), 1.0, 0.0) for share in MILESTONES)


def into_box(limits: Limits) -> optax.GradientTransformation:
    """Updates that lead no further than to the border of the box."""
    return optax.stateless(lambda updates, x: jax.tree.map(lambda u, x: jnp.clip(x + u, *limits) - x, updates, x))


def signed_adam(steps: int | Int[Array, ""], limits: Limits) -> optax.GradientTransformation:
    """Adam on the sign of the gradient, with the schedule and the box."""
    adam = optax.adam(lambda count: learning_rate(count, steps))
    return optax.chain(optax.scale_by_sign(), adam, into_box(limits))


INVERTING_GRADIENTS = Recipe(cosine_distance, signed_adam, STEPS, prior=lambda x: ALPHA * mean_variation(x), boxed=True)
