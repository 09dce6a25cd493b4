"""A normalization (train-mode batch norm) whose statistics are known, undone entry by entry.

    z = a(t) x + b(t)            x = (z - b) / a
    dL/dx = (df/dx)^T dL/dz      with t = T(x) differentiated, too

What the statistics and the gradients of scale and bias say of x are checks: nothing has to be solved for.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from leakjax.attacks.layerwise.path import Path, layer_info, noise_level
from leakjax.attacks.problem import Problem
from leakjax.constraints.layer import segment_rows
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.smoothing import rms
from leakjax.segments.tracing.statistics import slope_and_bias


class Undone(NamedTuple):
    """x and dL/dx before a normalization, whether the output and the statistics gave all of both, the relative misfit
    of what they say twice, and the condition of the map."""

    x: Float[Array, "..."]
    dx: Float[Array, "..."]
    whole: Bool[Array, ""]
    residual: Float[Array, ""]
    condition: Float[Array, ""]


def undo(problem: Problem, position: int, path: Path) -> Path | None:
    """`path` before the normalization at `position`, whose statistics are known; None where an activation behind it
    hides entries, and the path waits with no layer yet."""
    segment = problem.segments[position]
    values = known_statistics(problem, segment, path.victim)
    gradient = {p: to_device(problem.gradients[p][path.victim]) for p in segment.paths}
    state = to_device(path.x), to_device(path.dx), to_device(path.noise)
    found = _program(segment)(dict(problem.variables), *state, values, gradient)
    if not found.whole and path.anchor is None:
        return None
    x, whole = np.asarray(found.x), bool(found.whole) and path.anchor is None
    residual = float(found.residual) if whole else 0.0  # of a guess, which another layer's constraints will mend
    info = layer_info(problem, segment.name, x.size, x.size, float(found.condition), residual, 0)
    return dataclasses.replace(
        path,
        x=x,
        dx=np.asarray(found.dx),
        noise=noise_level(problem, x, residual),
        layers=(dataclasses.replace(info, solver="direct"), *path.layers),
        seen=np.ones(x.shape) if whole else None,
    )


def undoes(problem: Problem, segment: Segment) -> bool:
    """Whether a segment is a normalization whose statistics all clients sent."""
    return segment.statistics is not None and segment.normalizes and problem.statistics.keys() >= {*names_of(segment)}


def names_of(segment: Segment) -> tuple[str, ...]:
    """Names of the statistics of a segment."""
    return () if segment.statistics is None else segment.statistics.names


def known_statistics(problem: Problem, segment: Segment, victim: int) -> dict[str, Any]:
    """A segment's statistics as a client sent them."""
    names = names_of(segment)
    return {name: to_device(problem.statistics[name][victim]) for name in names}


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
        misfits = jnp.stack([jnp.linalg.norm(shown[k] - told[k]) / jnp.linalg.norm(_or_one(told[k])) for k in shown])
        sizes = jnp.abs(slope)
        return Undone(
            x=x,
            dx=dx,
            whole=jnp.all(preimage.known & preimage.slope_known & (slope != 0)),
            residual=jnp.max(misfits),
            condition=jnp.max(sizes) / jnp.min(sizes),
        )

    return jax.jit(run)


def _or_one(a: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(rms(a) > 0, a, 1.0)
