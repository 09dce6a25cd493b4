"""Paths with a waiting layer: its constraints pulled back, and what became of the layers in between."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from leakjax.attacks.path import Anchor, Path, noise_level
from leakjax.attacks.problem import Monitor, Problem
from leakjax.attacks.pull_back import Known, pull_back
from leakjax.attacks.ranks import NULL_SPACE, pulled_rank
from leakjax.attacks.starts import starts
from leakjax.reconstruction import LayerInfo
from leakjax.solvers.linear import lsmr_condition


def wait(problem: Problem, position: int, path: Path) -> Path:
    """`path` with the nonlinear segment at `position` added to what waits: it has no linear step."""
    segment = problem.segments[position]
    anchor = path.anchor or Anchor(position, path.x, path.dx, path.noise)
    unknowns = int(np.prod(segment.input.shape))
    info = LayerInfo(segment.name, unknowns, None, None, None, np.inf, 0, 0, "deficient")
    return dataclasses.replace(path, layers=(info, *path.layers), seen=None, anchor=anchor)


def pull(problem: Problem, monitor: Monitor, position: int, path: Path) -> Path:
    """Solve a waiting layer's constraints, pulled back to the segment at `position`, where the path has one.

    Left waiting, one segment deeper, where they still leave directions open. A linear layer alone has been solved
    already; a nonlinear one begins at several points.
    """
    anchor = path.anchor
    if anchor is None or (anchor.position == position and problem.segments[position].linear):
        return path
    segments = problem.segments[position : anchor.position + 1]
    monitor.tell(f"pulling {segments[-1].name} back to {segments[0].name}")
    given = Known(anchor.x, anchor.dx, anchor.noise, path.victim)
    if all(segment.linear for segment in segments):
        found = pull_back(problem, segments, given, [path.x])
    else:
        near = path.x if segments[0].linear else _output(problem, position, path)
        found = pull_back(problem, segments, given, starts(problem, position, near), quick=True)
        determined = position == 0 or float(found.probe.lost) <= NULL_SPACE
        if determined and not float(found.residual) <= problem.matched:
            found = pull_back(problem, segments, given, starts(problem, position, near))
    x, residual = np.asarray(found.x), float(found.residual)
    matched, n = residual <= problem.matched, x.size
    rank: int | None = n
    seen: np.ndarray | None = np.ones(x.shape)
    if found.probe.lost > NULL_SPACE or not matched:
        if position > 0:
            return dataclasses.replace(path, x=x, dx=np.asarray(found.dx))
        rank, seen = pulled_rank(problem, segments, given, x) if matched else (None, None)
    depth, condition = len(segments) - 1, lsmr_condition(found.probe)
    layers = [
        _pulled_info(info, k, condition, residual, matched) if k <= depth else info
        for k, info in enumerate(path.layers)
    ]
    if matched and (rank != n or position == 0 or depth == 0):
        deficiency = None if rank is None else rank - n
        status = layers[0].status if rank == n else "deficient"
        layers[0] = dataclasses.replace(layers[0], rank=rank, rank_deficiency=deficiency, status=status)
    layers[0] = dataclasses.replace(layers[0], steps=found.steps)
    noise = noise_level(problem, x, residual)
    return dataclasses.replace(
        path,
        x=x,
        dx=np.asarray(found.dx),
        noise=noise,
        layers=tuple(layers),
        seen=seen,
        anchor=None,
        source=anchor,
    )


def _output(problem: Problem, position: int, path: Path) -> np.ndarray:
    """z of the segment at `position`, where x_{i+1} tells it, from what the path holds."""
    segment = problem.segments[position]
    x = path.x.reshape(segment.output.shape)
    return np.asarray(segment.activation.preimage(problem.variables, jnp.asarray(x), path.noise).value)


def _pulled_info(info: LayerInfo, depth: int, condition: float, residual: float, matched: bool) -> LayerInfo:
    own = info.rank == info.unknowns or depth == 0
    status = "failed" if not matched else "determined" if own else "pulled_back"
    return dataclasses.replace(
        info, condition=condition, residual=residual, pull_back_depth=0 if own else depth, status=status
    )
