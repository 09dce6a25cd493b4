"""A walk that starts in the middle of a network: where a parameter is added to a layer's output, its gradient is dL/dz.

    g_p -> dL/dz (`heads.additive`);   d/dtheta <dL/dz, f(theta, x)> = g_theta, linear in x, gives the layer's input

Whatever lies behind that layer is needed for the label alone. A patch embedding with learned positions is the case at
hand: dW = sum_p dz_p x_p^T has one solution wherever there are no more patches than channels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float

from leakjax.attacks.heads.additive import additive_path, read_sum
from leakjax.attacks.heads.single import unknown_output
from leakjax.attacks.layerwise.iterative import max_steps
from leakjax.attacks.layerwise.path import Path, layer_info, noise_level
from leakjax.attacks.layerwise.system import pull_back_cotangent
from leakjax.attacks.problem import Monitor, Problem
from leakjax.constraints.layer import layer_system
from leakjax.models.reader import Arrays
from leakjax.runtime.cores import side_by_side
from leakjax.runtime.precision import compute_in
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import LsmrSolution, lsmr_condition, relative_residual, solve_lsmr
from leakjax.solvers.lsmr import lsmr

_ROUNDS = 2  # of refinement: each takes off the error but for a share of the condition times the rounding


class Entry(NamedTuple):
    """A segment's `position` in the chain, and the `path` of the parameter that is added to its output."""

    position: int
    path: str


def read_entries(problem: Problem) -> list[Entry]:
    """Where a walk may start without what is known of later layers, first to last; () for batches, whose dL/dz are
    known by their sum alone, and in chains that are affine throughout, where forward rows see more."""
    *segments, _ = problem.segments
    if problem.examples > 1 or all(segment.linear for segment in segments):
        return []
    found = [(k, additive_path(s, problem.variables)) for k, s in enumerate(segments) if s.linear and s.paths]
    return [Entry(k, path) for k, path in found if path is not None]


def enter(problem: Problem, monitor: Monitor) -> dict[int, Path]:
    """By victim a path without a label, at the input of the first entry whose gradient rows leave nothing open for any
    victim; {} where there is none."""
    for entry in read_entries(problem):
        segment = problem.segments[entry.position]
        monitor.tell(f"reading {segment.name} by the gradient of {entry.path}")

        def read(victim: int, segment: Segment = segment, entry: Entry = entry) -> tuple[Path, bool]:
            with compute_in(str(problem.dtype)):
                return _read(problem, segment, entry, victim)

        found = side_by_side(read, list(range(problem.victims)))
        if all(whole for _, whole in found):
            return {path.victim: path for path, _ in found}
    return {}


def labeled(entered: Mapping[int, Path], heads: Sequence[Path]) -> list[Path]:
    """The entered paths, one for each of the labels that the head's paths have for their victim."""
    found: list[Path] = []
    for head in heads:
        path = dataclasses.replace(entered[head.victim], labels=head.labels)
        if not any(p.victim == path.victim and np.array_equal(p.labels, path.labels) for p in found):
            found.append(path)
    return found


def _read(problem: Problem, segment: Segment, entry: Entry, victim: int) -> tuple[Path, bool]:
    """(the path of one victim, whether its input is determined)."""
    gradient: dict[str, Array] = {p: jnp.asarray(problem.gradients[p][victim], problem.dtype) for p in segment.paths}
    dz = read_sum(segment, entry.path, problem.variables, gradient[entry.path])[None]
    program = _program(segment, problem.tolerances.solve)
    solution: LsmrSolution = jax.device_get(program(dict(problem.variables), jnp.asarray(dz), gradient))
    whole = bool(solution.lost <= problem.tolerances.probe)
    x, residual = np.asarray(solution.x), float(solution.residual)
    rank, condition = x.size if whole else None, lsmr_condition(solution)
    info = layer_info(problem, segment.name, x.size, rank, condition, residual, int(solution.steps))
    path = Path(
        victim=victim,
        labels=np.zeros(1, int),
        x=x,
        dx=pull_back_cotangent(segment, problem.variables, x, dz),
        noise=noise_level(problem, x, residual),
        layers=(info,),
        seen=np.ones(x.shape),
        entry=entry.position,
    )
    return path, whole


@keep(32)
def _program(segment: Segment, tolerance: float) -> Callable[..., LsmrSolution]:
    def solve(variables: Arrays, dz: Float[Array, "1 ..."], gradient: Mapping[str, Array]) -> LsmrSolution:
        system = layer_system(segment, variables, unknown_output(segment, dz.dtype), dz, gradient)
        told = _across_channels(dz, {p: variables[p].shape for p in segment.paths})
        operator = lx.FunctionLinearOperator(lambda x: told(system.operator.mv(x)[1]), system.operator.in_structure())
        options = {"tolerance": tolerance, "max_steps": max_steps(segment)}
        found = solve_lsmr(operator, told(system.vector[1]), **options)
        x = found.x
        for _ in range(_ROUNDS):  # against the rows as they are: T is as badly conditioned as dz
            left = optax.tree.sub(system.vector, system.operator.mv(x))
            x = x + lsmr(operator, told(left[1]), **options).x
        return found._replace(x=x, residual=relative_residual(system.operator, system.vector, x))

    return jax.jit(solve)


def _across_channels(
    dz: Float[Array, "1 ..."], shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """{path: gradient} -> {path: T gradient}, T = pinv(dz^T) along an axis of the gradient that is as long as z's last.

    dW = sum_p dz_p x_p^T becomes x_p where dz (positions, channels) has full row rank, so that few steps of LSMR are
    enough. Whatever T is, a null space of A is one of T A: an x that T A determines is determined.
    """
    channels = dz.shape[-1]
    rows = dz.reshape(-1, channels)
    inverse = jnp.linalg.pinv(rows.T) if len(rows) <= channels else None
    along = {p: _axis(shape, channels) for p, shape in shapes.items()}

    def one(gradient: Array, axis: int | None) -> Array:
        if inverse is None or axis is None:
            return gradient
        return jnp.moveaxis(jnp.tensordot(inverse, gradient, axes=(1, axis)), 0, axis)

    return lambda gradient: {p: one(g, along[p]) for p, g in gradient.items()}


def _axis(shape: tuple[int, ...], channels: int) -> int | None:
    """Of a kernel's axes the one of its output channels: last as Flax has them, first as PyTorch; None for none."""
    return next((k for k in (len(shape) - 1, 0) if len(shape) > 1 and shape[k] == channels), None)
