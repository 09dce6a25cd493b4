"""What a train-mode normalization behind the first layer hides of every image: constants of an input channel.

Where F(x + p) = F(x) + c, c constant wherever N takes one mean, N(F(x + p)) = N(F(x)), and dL/dF sums to 0 there, so
that no gradient of F depends on p either. p is 1 on one channel, at positions of one residue modulo the stride of F, in
every example. As F is affine and the rest is exact, random x and dL/dz tell whether that holds for all.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.attacks.problem import Problem
from leakjax.constraints.pull_back import pull_gradients, push_forward
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment

_MOST = 64
"""Patterns that are tried."""

_CONSTANT = "a constant added to input {channels} cannot be told"
_PATTERN = "a pattern that repeats every {period} positions, added to input {channels}, cannot be told"


def hidden_constants(problem: Problem) -> str | None:
    """What can be added to the images of any gradient of the problem's model without a trace, in words; None where the
    first layer is another, where it reads zeros around the image, or where the means were sent."""
    segments = problem.chain.segments[:2] if problem.chain is not None else ()
    if len(segments) < 2 or not segments[1].normalizes or problem.told(segments, 0):
        return None
    first = segments[0]
    strides = [axis.kernel.stride for axis in first.geometry.axes]
    plain = first.linear and first.activation.name == "identity" and first.geometry.simple
    shape = first.input.shape
    if not plain or len(strides) != len(shape) - 2 or np.prod(strides, dtype=int) * shape[-1] > _MOST:
        return None
    hides, variables, tiny = _program(segments), dict(problem.variables), float(jnp.finfo(problem.dtype).eps) ** 0.5
    found = {}
    for c, residues in itertools.product(range(shape[-1]), itertools.product(*map(range, strides))):
        pattern = np.zeros(shape, problem.dtype)
        pattern[(slice(None), *(slice(r, None, s) for r, s in zip(residues, strides, strict=True)), c)] = 1.0
        if float(hides(variables, to_device(pattern))) <= tiny:
            found.setdefault(c, []).append(residues)
    if not found:
        return None
    names = ", ".join(map(str, found))
    channels = f"channel{'' if len(found) == 1 else 's'} {names}"
    if all(s == 1 for s in strides):
        return _CONSTANT.format(channels=channels)
    return _PATTERN.format(channels=channels, period="x".join(map(str, dict.fromkeys(strides))))


@keep(32)
def _program(segments: tuple[Segment, ...]) -> Callable[..., Any]:
    """(variables, pattern) -> how much of the outputs and gradients changes with it, relatively."""

    def run(variables: Arrays, pattern: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.random.normal(keys[0], pattern.shape, pattern.dtype)
        dz = jax.random.normal(keys[1], segments[-1].output.shape, pattern.dtype)

        def shown(x: jax.Array) -> list[jax.Array]:
            xs, zs, slopes = push_forward(segments, variables, x)
            gradients, _ = pull_gradients(segments, variables, xs, slopes, dz)
            return [zs[-1], *gradients.values()]

        before, after = shown(x), shown(x + pattern)
        sizes = [jnp.linalg.norm(a) for a in before]
        least = jnp.max(jnp.stack(sizes)) * jnp.sqrt(jnp.finfo(pattern.dtype).eps)
        moved = [jnp.linalg.norm(b - a) / jnp.maximum(s, least) for a, b, s in zip(before, after, sizes, strict=True)]
        return jnp.max(jnp.stack(moved))

    return jax.jit(run)
