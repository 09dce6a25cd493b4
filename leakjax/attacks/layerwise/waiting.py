"""Paths with a waiting layer: its constraints pulled back, and what became of the layers in between."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from leakjax.attacks.layerwise.lifted import lift
from leakjax.attacks.layerwise.path import Anchor, Path, noise_level
from leakjax.attacks.layerwise.pull_back import Known, PullBack, meet_top, pull_back
from leakjax.attacks.layerwise.ranks import NULL_SPACE, pulled_rank
from leakjax.attacks.layerwise.starts import input_limits, starts
from leakjax.attacks.problem import Monitor, Problem
from leakjax.reconstruction import LayerInfo
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import lsmr_condition

MORE = 12  # starts beyond the first few, where the first solution leaves the range
SPARE = 2.0  # equations for every unknown, from which on a second solution would be a coincidence
SLACK = 5e-3  # of the range, for rounding
ALIKE = 1e-6  # relative difference of two solutions that count as one
_ANY = np.ones(1)


def wait(problem: Problem, position: int, path: Path) -> Path:
    """`path` with the nonlinear segment at `position` added to what waits: it has no linear step."""
    segment = problem.segments[position]
    anchor = path.anchor or Anchor(position, path.x, path.dx, path.noise, None)
    unknowns = int(np.prod(segment.input.shape))
    info = LayerInfo(segment.name, unknowns, None, None, None, np.inf, 0, 0, "deficient")
    return dataclasses.replace(path, layers=(info, *path.layers), seen=None, anchor=anchor)


def pull(problem: Problem, monitor: Monitor, position: int, path: Path) -> list[Path]:
    """Solve a waiting layer's constraints, pulled back to the segment at `position`, where the path has one.

    Left waiting, one segment deeper, where they still leave directions open. A linear layer alone has been solved
    already; a nonlinear one begins at several points, and has a path for every solution that is found in range.
    """
    anchor = path.anchor
    if anchor is None or (anchor.position == position and problem.segments[position].linear):
        return [path]
    segments = problem.segments[position : anchor.position + 1]
    monitor.tell(f"pulling {segments[-1].name} back to {segments[0].name}")
    given = Known(anchor.x, anchor.dx, anchor.noise, path.victim)
    linear = all(segment.linear for segment in segments)
    own = [] if linear else list(starts(problem, position, _near(problem, position, path)))
    guesses = [path.x] if linear else own
    auto, staged = problem.pull_back == "auto", False
    if auto and position == anchor.position:
        lifted = lift(problem, segments[0], given)
        anchor = dataclasses.replace(anchor, inside=None if lifted is None else lifted.inside)
        if lifted is not None and lifted.x is not None:
            clear = all(stage.activation is None or stage.activation.kind for stage in segments[0].stages)
            if lifted.lost > NULL_SPACE and position > 0 and clear:
                return [dataclasses.replace(path, x=lifted.x, dx=lifted.dx, anchor=anchor)]
            staged = lifted.lost <= NULL_SPACE
            guesses = [lifted.x, *guesses]
    elif auto and anchor.inside is not None and (problem.network.has_kinks or not linear):
        met = _meet_top(problem, segments, given, anchor.inside, position, guesses)
        if met is not None:
            guesses = [met, *guesses]
        elif position > 0:
            return [path if segments[0].linear else _blank(segments[0], path)]
    found = pull_back(problem, segments, given, guesses, quick=not linear)
    determined = position == 0 or float(found.probe.lost) <= NULL_SPACE
    if not linear and determined and not float(found.residual) <= problem.matched:
        found = pull_back(problem, segments, given, guesses)
    solutions = [found]
    if own and not staged and float(found.residual) <= problem.matched and float(found.probe.lost) <= NULL_SPACE:
        solutions = _all_solutions(problem, position, segments, given, own, found)
    return [_settled(problem, position, segments, given, path, anchor, one) for one in solutions]


def _all_solutions(
    problem: Problem,
    position: int,
    segments: Sequence[Segment],
    given: Known,
    own: Sequence[np.ndarray],
    found: PullBack,
) -> list[PullBack]:
    """Every solution that the starts lead to, those in range alone where there are any.

    The other starts are tried where the first solution leaves the range, or where the equations are fewer than `SPARE`
    times the unknowns: these may have several isolated solutions, more of them in general position have one.
    """
    low, high = input_limits(problem, position)

    def inside(one: PullBack) -> bool:
        slack = SLACK * (high - low if np.isfinite(high - low) else float(np.sqrt(np.mean(np.asarray(one.x) ** 2))))
        return low - slack <= float(np.min(one.x)) and float(np.max(one.x)) <= high + slack

    solutions = [found]
    if not inside(found) or _equations(problem, segments, given) < SPARE * found.x.size:
        for start in itertools.chain(
            own, () if inside(found) else starts(problem, position, np.asarray(found.x), MORE)
        ):
            other = pull_back(problem, segments, given, [start], quick=True)
            same = any(np.linalg.norm(other.x - one.x) <= ALIKE * np.linalg.norm(one.x) for one in solutions)
            if float(other.residual) <= problem.matched and not same:
                solutions.append(other)
    return [one for one in solutions if inside(one)] or solutions


def _equations(problem: Problem, segments: Sequence[Segment], given: Known) -> int:
    """How many equations the segments put on what enters them: known outputs, and gradient entries that are not 0."""
    top = segments[-1]
    x = jnp.asarray(given.x).reshape(top.output.shape)
    known = int(np.count_nonzero(np.asarray(top.activation.preimage(problem.variables, x, given.noise).known)))
    return known + sum(int(np.count_nonzero(problem.gradients[p][given.victim])) for s in segments for p in s.paths)


def _settled(
    problem: Problem,
    position: int,
    segments: Sequence[Segment],
    given: Known,
    path: Path,
    anchor: Anchor,
    found: PullBack,
) -> Path:
    """The path with what was found for the input of `segments[0]`: determined, still open and waiting, or failed."""
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
