"""Paths with a waiting layer: its constraints pulled back, and what became of the layers in between."""

import dataclasses

import numpy as np

from leakjax.attacks.path import Path, noise_level
from leakjax.attacks.problem import Monitor, Problem
from leakjax.attacks.pull_back import Known, pull_back
from leakjax.attacks.ranks import NULL_SPACE, pulled_rank
from leakjax.reconstruction import LayerInfo
from leakjax.solvers.linear import lsmr_condition


def pull(problem: Problem, monitor: Monitor, position: int, path: Path) -> Path:
    """Solve a waiting layer's constraints, pulled back to the segment at `position`, where the path has one.

    Left waiting, one segment deeper, where they still leave directions open.
    """
    anchor = path.anchor
    if anchor is None or anchor.position == position:
        return path
    segments = problem.segments[position : anchor.position + 1]
    monitor.tell(f"pulling {segments[-1].name} back to {segments[0].name}")
    given = Known(anchor.x, anchor.dx, anchor.noise, path.victim)
    found = pull_back(problem, segments, given, path.x)
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
    if matched and rank != n:
        deficiency = None if rank is None else rank - n
        layers[0] = dataclasses.replace(layers[0], rank=rank, rank_deficiency=deficiency, status="deficient")
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


def _pulled_info(info: LayerInfo, depth: int, condition: float, residual: float, matched: bool) -> LayerInfo:
    own = info.rank == info.unknowns
    status = "failed" if not matched else "determined" if own else "pulled_back"
    return dataclasses.replace(
        info, condition=condition, residual=residual, pull_back_depth=0 if own else depth, status=status
    )
