"""A normalization (train-mode batch norm) whose statistics are known, undone entry by entry.

    z = a(t) x + b(t)            x = (z - b) / a
    dL/dx = (df/dx)^T dL/dz      with t = T(x) differentiated, too

What the statistics and the gradients of scale and bias say of x are checks: nothing has to be solved for.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from leakjax.attacks.layerwise.path import Path, layer_info, noise_level
from leakjax.attacks.layerwise.waiting import wait
from leakjax.attacks.problem import Problem
from leakjax.constraints.layer import over_gradients, segment_rows
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.statistics import slope_and_bias


class Undone(NamedTuple):
    """x and dL/dx before a normalization, whether the output and the statistics gave all of both, the relative misfit
    of what they say twice, and the condition of the map."""

    x: Float[Array, "..."]
    dx: Float[Array, "..."]
    whole: Bool[Array, ""]
    residual: Float[Array, ""]
    condition: Float[Array, ""]


def undo(
    problem: Problem, position: int, path: Path, told: Mapping[str, Float[np.ndarray, "..."]] | None = None
) -> Path:
    """`path` before the normalization at `position`, whose statistics are `told`, or were sent.

    Where an activation behind it hides entries the path waits, with a guess of x; a path that waits is given one.
    """
    segment = problem.segments[position]
    told = problem.told([segment], path.victim) if told is None else told
    values = {name: to_device(t) for name, t in told.items()}
    gradient = {p: to_device(problem.gradients[p][path.victim]) for p in segment.paths}
    state = to_device(path.x), to_device(path.dx), to_device(path.noise)
    found = _program(segment)(dict(problem.variables), *state, values, gradient)
    x, dx, residual = np.asarray(found.x), np.asarray(found.dx), float(found.residual)
    if not found.whole or path.anchor is not None:
        return dataclasses.replace(wait(problem, position, path), x=x, dx=dx)
    info = layer_info(problem, segment.name, x.size, x.size, float(found.condition), residual, 0)
    return dataclasses.replace(
        path,
        x=x,
        dx=dx,
        noise=noise_level(problem, x, residual),
        layers=(dataclasses.replace(info, solver="direct"), *path.layers),
        seen=np.ones(x.shape),
    )


@keep(64)
def _program(segment: Segment) -> Callable[..., Undone]:
    statistics = segment.statistics
    assert statistics is not None, "a normalization"

    def run(
        variables: Arrays,
        x_next: Float[Array, "..."],
        dx_next: Float[Array, "..."],
        noise: Float[Array, ""],
        values: Mapping[str, Float[Array, "..."]],
        gradient: Mapping[str, Float[Array, "..."]],
    ) -> Undone:
        preimage = segment.activation.preimage(variables, x_next.reshape(segment.output.shape), noise)
        dz = preimage.slope * dx_next.reshape(segment.output.shape)
        slope, bias = slope_and_bias(statistics, variables, segment.input, values)
        x = (preimage.value - bias) / jnp.where(slope == 0, 1.0, slope)
        dx = segment.cotangent(variables, x, dz)
        told = {**gradient, **values}
        shown = {**segment_rows(segment, variables, dz, x)[1], **statistics.measure(variables, x)}
        over = {**over_gradients(gradient, segment.paths), **over_gradients(values, statistics.names)}
        misfits = jnp.stack([over[k] * jnp.sqrt(jnp.mean((shown[k] - told[k]) ** 2)) for k in shown])
        sizes = jnp.abs(slope)
        return Undone(
            x=x,
            dx=dx,
            whole=jnp.all(preimage.known & preimage.slope_known & (slope != 0)),
            residual=jnp.max(misfits),
            condition=jnp.max(sizes) / jnp.min(sizes),
        )

    return jax.jit(run)
