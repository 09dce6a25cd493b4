"""Where Gauss-Newton begins on the input of a nonlinear map: by scale, range and shape, never by the truth."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from leakjax.attacks.problem import Problem
from leakjax.segments.chain import Segment

SEEDS = 3


def starts(
    problem: Problem, position: int, near: Float[np.ndarray, "..."], seeds: int = SEEDS
) -> Iterator[Float[np.ndarray, "..."]]:
    """Inputs of the segment at `position` to try in turn, from `near`: a guess of its input, or else its output.

    `near` itself where the shapes agree (a residual block is near the identity), nearly nothing, then noise of its
    size, from as many `seeds`; all inside the range of the activation before, or around the middle of the image's
    range.
    """
    segment = problem.segments[position]
    shape, size = segment.input.shape, float(np.sqrt(np.mean(near**2))) or 1.0
    low, high = input_limits(problem, position)
    center = 0.5 * (low + high) if np.isfinite(low) and np.isfinite(high) else 0.0
    if near.shape == shape:
        yield np.clip(near, low, high)
    for seed in range(seeds):
        noise = np.random.default_rng(seed).normal(size=shape)
        yield np.clip(center + (0.1 if seed == 0 else 1.0) * size * noise, low, high)


def input_limits(problem: Problem, position: int) -> tuple[float, float]:
    """What the input of the segment at `position` lies between: the image's range, or the activation's before it."""
    if position == 0:
        return problem.input_range
    before: Segment = problem.segments[position - 1]
    return before.activation.reach(problem.variables, problem.dtype)
