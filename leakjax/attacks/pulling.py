"""Paths with a waiting layer: its constraints pulled back, and what became of the layers in between."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from leakjax.attacks.lifted import lift
from leakjax.attacks.path import Anchor, Path, noise_level
from leakjax.attacks.problem import Monitor, Problem
from leakjax.attacks.pull_back import Known, meet_top, pull_back
from leakjax.attacks.ranks import NULL_SPACE, pulled_rank
from leakjax.attacks.starts import starts
from leakjax.reconstruction import LayerInfo
from leakjax.segments import Segment
from leakjax.solvers.linear import lsmr_condition

_ANY = np.ones(1)


def wait(problem: Problem, position: int, path: Path) -> Path:
    """`path` with the nonlinear segment at `position` added to what waits: it has no linear step."""
    segment = problem.segments[position]
    anchor = path.anchor or Anchor(position, path.x, path.dx, path.noise, None)
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
    linear = all(segment.linear for segment in segments)
    guesses = [path.x] if linear else list(starts(problem, position, _near(problem, position, path)))
    auto = problem.pull_back == "auto"
    if auto and position == anchor.position:
        lifted = lift(problem, segments[0], given)
        anchor = dataclasses.replace(anchor, inside=None if lifted is None else lifted.inside)
        if lifted is not None and lifted.x is not None:
            clear = all(stage.activation is None or stage.activation.kind for stage in segments[0].stages)
            if lifted.lost > NULL_SPACE and position > 0 and clear:
                return dataclasses.replace(path, x=lifted.x, dx=lifted.dx, anchor=anchor)
            guesses = [lifted.x, *guesses]
    elif auto and anchor.inside is not None and (problem.network.has_kinks or not linear):
        met = _meet_top(problem, segments, given, anchor.inside, position, guesses)
        if met is not None:
            guesses = [met, *guesses]
        elif position > 0:
            return path if segments[0].linear else _blank(segments[0], path)
    found = pull_back(problem, segments, given, guesses, quick=not linear)
    determined = position == 0 or float(found.probe.lost) <= NULL_SPACE
    if not linear and determined and not float(found.residual) <= problem.matched:
        found = pull_back(problem, segments, given, guesses)
    x, residual = np.asarray(found.x), float(found.residual)
    matched, n = residual <= problem.matched, x.size
    rank: int | None = n
    seen: np.ndarray | None = np.ones(x.shape)
    if found.probe.lost > NULL_SPACE or not matched:
        if position > 0:
            return dataclasses.replace(path, x=x, dx=np.asarray(found.dx), anchor=anchor)
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


def _meet_top(
    problem: Problem,
    segments: Sequence[Segment],
    given: Known,
    inside: Sequence[np.ndarray],
    position: int,
    guesses: Sequence[np.ndarray],
) -> np.ndarray | None:
    """The input of `segments[0]` where the last segment's rows determine it and all rows agree; None elsewhere."""
    if np.prod(segments[0].input.shape) >= np.prod(segments[-1].input.shape):
        return None  # no fewer unknowns than those that the last segment left open
    for start in (next(starts(problem, position, _ANY)), guesses[0]):
        x, misfit = meet_top(problem, segments, given, inside, start)
        if misfit <= problem.matched:
            return x
    return None


def _blank(segment: Segment, path: Path) -> Path:
    """`path`, with nothing known of the input of a nonlinear `segment`."""
    zeros = np.zeros(segment.input.shape, path.x.dtype)
    return dataclasses.replace(path, x=zeros, dx=zeros)


def _near(problem: Problem, position: int, path: Path) -> np.ndarray:
    """A guess of the input of the segment at `position`, or else its output, from what the path holds."""
    segment = problem.segments[position]
    if segment.linear:
        return path.x
    x = path.x.reshape(segment.output.shape)
    return np.asarray(segment.activation.preimage(problem.variables, jnp.asarray(x), path.noise).value)


def _pulled_info(info: LayerInfo, depth: int, condition: float, residual: float, matched: bool) -> LayerInfo:
    own = info.rank == info.unknowns or depth == 0
    status = "failed" if not matched else "determined" if own else "pulled_back"
    return dataclasses.replace(
        info, condition=condition, residual=residual, pull_back_depth=0 if own else depth, status=status
    )
