"""Paths with a waiting layer: its constraints pulled back, and what became of the layers in between.

A layer that its own equations leave open waits. At each segment before it the same three steps are taken:

    Waiting -> lift | meet the top -> Newton -> Determined | StillOpen | Failed

*Lift*, at the layer itself where it is nonlinear: its stages are solved one after another, last stage first. *Meet the
top*, at segments further down: the last segment's rows alone, where these determine the input that is sought. *Newton*:
the pulled-back residual of all segments from every start that there is. What is still open waits one segment deeper.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.layerwise.lifted import lift
from leakjax.attacks.layerwise.path import Anchor, Path, noise_level
from leakjax.attacks.layerwise.pull_back import Known, PullBack, meet_top, pull_back
from leakjax.attacks.layerwise.ranks import pulled_rank
from leakjax.attacks.layerwise.roots import all_roots, near
from leakjax.attacks.layerwise.starts import starts
from leakjax.attacks.problem import Monitor, Problem
from leakjax.reconstruction import LayerInfo
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import lsmr_condition

_ANY = np.ones(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Waiting:
    """The layer that `path` waits with (`anchor`), as the segment at `position` meets it."""

    problem: Problem
    position: int
    path: Path
    anchor: Anchor

    @property
    def segments(self) -> tuple[Segment, ...]:
        """From the one whose input is sought to the one that waits."""
        return self.problem.segments[self.position : self.anchor.position + 1]

    @property
    def known(self) -> Known:
        """What is held at the output of the layer that waits."""
        return Known(self.anchor.x, self.anchor.dx, self.anchor.noise, self.path.victim)

    @property
    def linear(self) -> bool:
        """Whether every segment is affine in its input."""
        return all(segment.linear for segment in self.segments)

    @functools.cached_property
    def own_starts(self) -> list[Float[np.ndarray, "..."]]:
        """Where Newton's method begins when nothing better is known; none where the path's answer serves."""
        guess = [] if self.linear else [near(self.problem, self.position, self.path)]
        return [start for x in guess for start in starts(self.problem, self.position, x)]

    def matches(self, residual: float | Float[Array | np.ndarray, ""]) -> bool:
        """Whether a relative residual is rounding."""
        return float(residual) <= self.problem.tolerances.matched


class Begin(NamedTuple):
    """Newton's method may begin: from these guesses, best first; `alone`: whether the answer is the only one."""

    anchor: Anchor
    guesses: Sequence[Float[np.ndarray, "..."]]
    alone: bool = False


class StillOpen(NamedTuple):
    """Directions are open: the layer waits one segment deeper, from here."""

    anchor: Anchor
    x: Float[np.ndarray, "..."]
    dx: Float[np.ndarray, "..."]


class Determined(NamedTuple):
    """The input is found: the only one near, or, for the image, with the `rank`, row-space shares and `condition` of
    the whole Jacobian, which a solve may never have looked at."""

    found: PullBack
    rank: int | None
    seen: Float[np.ndarray, "..."] | None
    condition: float = 1.0


class Failed(NamedTuple):
    """The image is reached, and nothing matches."""

    found: PullBack


def wait(problem: Problem, position: int, path: Path) -> Path:
    """`path` with the nonlinear segment at `position` added to what waits: it has no linear step."""
    segment = problem.segments[position]
    anchor = path.anchor or Anchor(position, path.x, path.dx, path.noise, inside=None)
    info = LayerInfo(
        name=segment.name,
        unknowns=int(np.prod(segment.input.shape)),
        rank=None,
        rank_deficiency=None,
        condition=None,
        residual=np.inf,
        pull_back_depth=0,
        steps=0,
        status="deficient",
    )
    return dataclasses.replace(path, layers=(info, *path.layers), seen=None, anchor=anchor)


def pull(problem: Problem, monitor: Monitor, position: int, path: Path) -> list[Path]:
    """Solve a waiting layer's constraints, pulled back to the segment at `position`, where the path has one.

    Left waiting, one segment deeper, where they still leave directions open. A linear layer alone has been solved
    already; a nonlinear one begins at several points, and has a path for every solution that is found in range.
    """
    if path.anchor is None or (path.anchor.position == position and problem.segments[position].linear):
        return [path]
    waiting = Waiting(problem, position, path, path.anchor)
    monitor.tell(f"pulling {waiting.segments[-1].name} back to {waiting.segments[0].name}")
    begin = _begin(waiting)
    if isinstance(begin, StillOpen):
        return [_wait_on(path, begin)]
    waiting = dataclasses.replace(waiting, anchor=begin.anchor)
    return [_ended(waiting, _state(waiting, found)) for found in _newton(waiting, begin)]


def _begin(waiting: Waiting) -> Begin | StillOpen:
    """Lift at the layer itself, meet the top further down; neither where another solver was asked for."""
    plain = Begin(waiting.anchor, waiting.own_starts or [waiting.path.x])
    if waiting.problem.pull_back != "auto":
        return plain
    if waiting.position == waiting.anchor.position:
        return _lift(waiting, plain)
    if waiting.anchor.inside is not None and (waiting.problem.network.has_kinks or not waiting.linear):
        return _meet_the_top(waiting, plain)
    return plain


def _lift(waiting: Waiting, plain: Begin) -> Begin | StillOpen:
    """The layer's stages, last first: its input where they give it, or as far as its least norm goes."""
    (segment,) = waiting.segments
    lifted = lift(waiting.problem, segment, waiting.known)
    anchor = dataclasses.replace(plain.anchor, inside=None if lifted is None else lifted.inside)
    if lifted is None or lifted.x is None or lifted.dx is None:
        return plain._replace(anchor=anchor)
    invertible = all(stage.activation is None or stage.activation.kind for stage in segment.stages)
    if lifted.lost > waiting.problem.tolerances.probe and waiting.position > 0 and invertible:
        return StillOpen(anchor, lifted.x, lifted.dx)
    return Begin(anchor, [lifted.x, *plain.guesses], alone=lifted.lost <= waiting.problem.tolerances.probe)


def _meet_the_top(waiting: Waiting, plain: Begin) -> Begin | StillOpen:
    """The input where the last segment's rows determine it and all rows agree; further down, elsewhere."""
    problem, segments, path = waiting.problem, waiting.segments, waiting.path
    fewer = np.prod(segments[0].input.shape) < np.prod(segments[-1].input.shape)
    for start in (next(starts(problem, waiting.position, _ANY)), plain.guesses[0]) if fewer else ():
        x, misfit = meet_top(problem, segments, waiting.known, plain.anchor.inside or (), start)
        if waiting.matches(misfit):
            return plain._replace(guesses=[x, *plain.guesses])
    if waiting.position == 0:
        return plain
    if segments[0].linear:
        return StillOpen(plain.anchor, path.x, path.dx)
    zeros = np.zeros(segments[0].input.shape, path.x.dtype)  # nothing is known of its input
    return StillOpen(plain.anchor, zeros, zeros)


def _newton(waiting: Waiting, begin: Begin) -> list[PullBack]:
    """The solutions of the pulled-back residual: one, or all that the starts lead to where it may have several."""
    problem, segments, known = waiting.problem, waiting.segments, waiting.known
    found = pull_back(problem, segments, known, begin.guesses, quick=not waiting.linear)
    determined = float(found.probe.lost) <= waiting.problem.tolerances.probe
    if not waiting.linear and (determined or waiting.position == 0) and not waiting.matches(found.residual):
        found = pull_back(problem, segments, known, begin.guesses)
        determined = float(found.probe.lost) <= waiting.problem.tolerances.probe
    if waiting.own_starts and not begin.alone and determined and waiting.matches(found.residual):
        return all_roots(problem, waiting.position, segments, known, waiting.own_starts, found)
    return [found]


def _state(waiting: Waiting, found: PullBack) -> Determined | StillOpen | Failed:
    """What a solution is: at the image the end, before it only where it matches and no direction is lost."""
    x, matched = np.asarray(found.x), waiting.matches(found.residual)
    if matched and found.probe.lost <= waiting.problem.tolerances.probe:
        return Determined(found, x.size, np.ones(x.shape))
    if waiting.position > 0:
        return StillOpen(waiting.anchor, x, np.asarray(found.dx))
    if not matched:
        return Failed(found)
    return Determined(found, *pulled_rank(waiting.problem, waiting.segments, waiting.known, x))


def _wait_on(path: Path, state: StillOpen) -> Path:
    return dataclasses.replace(path, x=state.x, dx=state.dx, anchor=state.anchor)


def _ended(waiting: Waiting, state: Determined | StillOpen | Failed) -> Path:
    """The path with what was found for the input of the first of the segments, and with what each layer came to."""
    if isinstance(state, StillOpen):
        return _wait_on(waiting.path, state)
    found, matched = state.found, isinstance(state, Determined)
    x, residual, depth = np.asarray(found.x), float(found.residual), len(waiting.segments) - 1
    condition = max(lsmr_condition(found.probe), state.condition if isinstance(state, Determined) else 1.0)
    first, *later = [
        _pulled_info(info, k, condition, residual, matched) if k <= depth else info
        for k, info in enumerate(waiting.path.layers)
    ]
    if isinstance(state, Determined) and (state.rank != x.size or waiting.position == 0 or depth == 0):
        deficiency = None if state.rank is None else state.rank - x.size
        status = first.status if state.rank == x.size else "deficient"
        first = dataclasses.replace(first, rank=state.rank, rank_deficiency=deficiency, status=status)
    return dataclasses.replace(
        waiting.path,
        x=x,
        dx=np.asarray(found.dx),
        noise=noise_level(waiting.problem, x, residual),
        layers=(dataclasses.replace(first, steps=found.steps), *later),
        seen=state.seen if isinstance(state, Determined) else None,
        anchor=None,
        source=waiting.anchor,
    )


def _pulled_info(info: LayerInfo, depth: int, condition: float, residual: float, matched: bool) -> LayerInfo:
    own = info.rank == info.unknowns or depth == 0
    status = "failed" if not matched else "determined" if own else "pulled_back"
    return dataclasses.replace(
        info,
        condition=condition,
        residual=residual,
        pull_back_depth=0 if own else depth,
        status=status,
        solver="pull_back" if status == "pulled_back" else info.solver,
    )
