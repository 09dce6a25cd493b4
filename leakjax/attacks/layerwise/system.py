"""A segment's layer system, from what the next layer gave."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.problem import Problem
from leakjax.constraints.layer import BLOCKS, LayerSystem, layer_system
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.cores import ALONE
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import materialize

SLOPE_FLOOR = 1e-2


class LayerState(NamedTuple):
    """x_{i+1} and dL/dx_{i+1} of several paths (leading axis), with the absolute noise level of x_{i+1} and the
    relative tolerance that this noise makes sense of."""

    x: Float[np.ndarray, "P ..."]
    dx: Float[np.ndarray, "P ..."]
    noise: Float[np.ndarray, " P"]
    tolerance: Float[np.ndarray, " P"]


def build_system(
    segment: Segment,
    variables: Arrays,
    x: Float[Array, "..."],
    dx: Float[Array, "..."],
    noise: Float[Array, ""],
    gradient: Mapping[str, Float[Array, "..."]],
    floor: float,
    blocks: tuple[str, ...] = BLOCKS,
) -> tuple[Float[Array, "..."], LayerSystem]:
    """(dz, the layer's system) from what the next layer gave."""
    preimage = segment.activation.preimage(variables, x.reshape(segment.output.shape), noise)
    dz = preimage.slope * dx.reshape(segment.output.shape)
    return dz, layer_system(segment, variables, preimage, dz, gradient, floor, blocks)


def slope_floor(problem: Problem) -> float:
    """The slope far above which rounding does not matter; 0 where clients round so coarsely that it always does."""
    return SLOPE_FLOOR if problem.tolerances.rounding < 1e-12 else 0.0


@keep(64)
def _matrix(
    segment: Segment, floor: float, blocks: tuple[str, ...]
) -> Callable[..., tuple[Float[Array, "..."], Float[Array, "m n"], Float[Array, " m"]]]:
    def build(
        variables: Arrays,
        x: Float[Array, "..."],
        dx: Float[Array, "..."],
        noise: Float[Array, ""],
        gradient: Mapping[str, Float[Array, "..."]],
    ) -> tuple[Float[Array, "..."], Float[Array, "m n"], Float[Array, " m"]]:
        dz, system = build_system(segment, variables, x, dx, noise, gradient, floor, blocks)
        return dz, *materialize(system.operator, system.vector)

    return jax.jit(build)


def dense_system(
    problem: Problem, segment: Segment, state: LayerState, path: int, victim: int
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "m n"], Float[np.ndarray, " m"]]:
    """(dz, matrix, vector) of one path's system, as numpy arrays."""
    gradient = {p: to_device(problem.gradients[p][victim], problem.dtype) for p in segment.paths}
    arrays = (to_device(state.x[path]), to_device(state.dx[path]), to_device(state.noise[path]))
    build = _matrix(segment, slope_floor(problem), problem.blocks(segment))
    with ALONE:
        return tuple(map(np.asarray, build(dict(problem.variables), *arrays, gradient)))  # type: ignore[return-value]


def pull_back_cotangent(
    segment: Segment, variables: Arrays, x: Float[np.ndarray, "*input"], dz: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "*input"]:
    """dL/dx = (df/dx)^T dz."""
    return np.asarray(_cotangent(segment)(dict(variables), x, dz))


def pull_back_cotangents(
    segment: Segment,
    variables: Arrays,
    pairs: Sequence[tuple[Float[np.ndarray, "*input"], Float[np.ndarray, "..."]]],
    size: int,
) -> list[Float[np.ndarray, "*input"]]:
    """dL/dx of several (x, dz), `size` of them in one program."""
    found = []
    for first in range(0, len(pairs), size):
        part = [pairs[min(k, len(pairs) - 1)] for k in range(first, first + size)]
        x, dz = (np.stack([np.asarray(pair[side]) for pair in part]) for side in (0, 1))
        found += list(np.asarray(_cotangents(segment)(dict(variables), x, dz)))
    return found[: len(pairs)]


@keep(64)
def _cotangent(segment: Segment) -> Any:
    return jax.jit(_pull(segment))


@keep(64)
def _cotangents(segment: Segment) -> Any:
    return jax.jit(vmap_several(_pull(segment), (None, 0, 0)))


def _pull(segment: Segment) -> Callable[..., Float[Array, "..."]]:
    return lambda variables, x, dz: segment.cotangent(variables, x, dz)
