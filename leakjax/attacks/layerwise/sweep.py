"""All determined layers of a chunk of clients as ONE program: no round trip to the host between two layers.

    (x_n, dL/dx_n) -> step_{n-1} -> (x_{n-1}, dL/dx_{n-1}) -> ... -> step_0 -> (x_0, dL/dx_0)

with each layer's noise level and tolerance computed from the one after it, as the recursion does. What comes back says
of every layer and client whether it fits and was determined; the recursion takes an answer where it would have asked
the same question, and asks again elsewhere (a sign on the wrong side of a kink, a layer with a null space). Where a
head leaves several candidates, the program of the layer before it goes first: most do not fit that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from leakjax.attacks.layerwise.chunks import Program, run_chunks
from leakjax.attacks.layerwise.direct import DirectSolution
from leakjax.attacks.layerwise.layer_solution import LayerSolution, rows_of
from leakjax.attacks.layerwise.layer_step import Ahead, Solved, Step, arguments, compile_programs, one_step, run_steps
from leakjax.attacks.layerwise.path import Path, level_of, misfit_share, solve_tolerance, tolerance_of
from leakjax.attacks.layerwise.routes import Kind
from leakjax.attacks.layerwise.system import LayerState, slope_floor
from leakjax.attacks.problem import Monitor, Problem
from leakjax.attacks.tolerances import Tolerances
from leakjax.models.reader import Arrays
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.devices import spread
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment

_SAME = 1e4
"""Roundings by which noise levels and tolerances may differ that are one: sums over a layer in two orders, 2e-12 in
float64 and 1e-3 in float32, where neither threshold decides anything."""


class Link(NamedTuple):
    """A layer of a sweep: its segment, how it is solved (`kind` as in a route), and the blocks of its system."""

    segment: Segment
    kind: Kind | None
    directly: bool
    blocks: tuple[str, ...]


class Swept(NamedTuple):
    """One layer of a sweep, by path (`Path.row`): what it was asked, and what it gave."""

    state: LayerState
    solved: Solved


def swept_together(problem: Problem, segments: Sequence[Segment], size: int) -> list[Segment]:
    """The segments that one program solves, last first: up to the first that is nonlinear or has too few rows.

    Where clients are solved one by one on a CPU, none: there a layer's program is small enough for a core's cache, and
    compiles beside the others.
    """
    if size == 1 and jax.default_backend() == "cpu":
        return []
    found = []
    for segment in reversed(segments):
        rows = np.prod(segment.output.shape) + sum(problem.gradients[p][0].size for p in segment.paths)
        if not segment.linear or segment.normalizes or rows < np.prod(segment.input.shape):
            break
        found.append(segment)
    return found if len(found) > 1 else []


def compile_sweep(problem: Problem, monitor: Monitor, steps: Sequence[Step], size: int) -> tuple[Program, Any]:
    """(the program of `steps`, last layer first, for `size` clients; the factors that it takes)."""
    links = tuple(
        Link(s.segment, s.route and s.route.kind, s.route is not None, problem.blocks(s.segment)) for s in steps
    )
    factors = tuple(None if s.route is None else s.route.factor for s in steps)
    settings = (str(problem.dtype), slope_floor(problem), problem.tolerances, misfit_share(problem), problem.devices)
    key = (links, str(links), str(jax.tree.map(lambda a: a.shape, factors)), size, *settings)
    names = [p for s in steps for p in s.segment.paths]
    shapes = (problem, names, steps[0].segment.output.shape, size, factors)
    [program] = compile_programs([(key, lambda: _jitted(links, *settings).lower(*arguments(*shapes)))], monitor)
    return program, factors


def sweep(
    problem: Problem, monitor: Monitor, steps: Sequence[Step], size: int, paths: Sequence[Path]
) -> dict[Segment, Swept]:
    """The layers of `steps` (last first) from what the layer after them gave for `paths`, `size` in one program.

    Nothing where a single layer is left: its own program does.
    """
    if len(steps) < 2:
        return {}
    program, factors = compile_sweep(problem, monitor, steps, size)
    state, victims, segments = state_of(problem, paths), [path.victim for path in paths], [s.segment for s in steps]
    [layers] = run_chunks(problem, segments, program, size, state, victims, [(None, factors)], _clean(problem))
    found = {}
    for step, (solution, lost, dx, following) in zip(steps, layers, strict=True):
        if isinstance(solution, DirectSolution):
            taken = LayerSolution.of_direct(solution)
        else:
            taken = LayerSolution.of_lsmr(solution, lost)
        found[step.segment] = Swept(state, (taken, dx))
        state = LayerState(taken.x, dx, *following)
    return found


def state_of(problem: Problem, paths: Sequence[Path]) -> LayerState:
    """What the next layer is asked for these paths."""
    return LayerState(
        np.stack([p.x for p in paths]),
        np.stack([p.dx for p in paths]),
        np.asarray([p.noise for p in paths]),
        np.asarray([solve_tolerance(problem, p.layers[0].residual) for p in paths]),
    )


def advance(
    problem: Problem, step: Step, size: int, state: LayerState, paths: Sequence[Path], known: Swept | None
) -> Solved:
    """`run_steps` on the `state` of paths; what a sweep has `known` to the same question is taken from it."""
    victims = [path.victim for path in paths]
    if known is None:
        return run_steps(problem, step, size, state, victims)
    rows = np.array([path.row for path in paths])
    missing = np.flatnonzero(~_same(state, rows_of(known.state, rows)))
    return run_steps(problem, step, size, state, victims, ahead=Ahead(rows_of(known.solved, rows), missing))


def _same(a: LayerState, b: LayerState) -> Bool[np.ndarray, " P"]:
    """By path, whether two states ask the same: the same x and dL/dx, noise and tolerance but for rounding."""
    exact = [np.all(np.asarray(p == q).reshape(len(p), -1), axis=1) for p, q in ((a.x, b.x), (a.dx, b.dx))]
    most = _SAME * np.finfo(np.asarray(b.x).dtype).eps
    near = [np.abs(p - q) <= most * np.abs(p) for p, q in ((a.noise, b.noise), (a.tolerance, b.tolerance))]
    return np.logical_and.reduce([*exact, *near])


def _clean(problem: Problem) -> Any:
    """Whether no probe of a chunk's layers was lost: a lost one may be a run that was disturbed (see `run_chunks`)."""
    return lambda layers, tag: all(np.all(lost <= problem.tolerances.probe) for _, lost, _, _ in layers)


@keep(32)
def _jitted(
    links: tuple[Link, ...], dtype: str, floor: float, tolerances: Tolerances, share: float, devices: tuple[Any, ...]
) -> Any:
    """The program of a sweep: (variables, factors, x, dx, noise, tolerance, gradient) -> for each layer (solution, what
    the probe lost, dL/dx, the noise level and tolerance that follow), of several clients at once."""
    steps = [one_step(k.segment, k.kind, dtype, floor, k.blocks, directly=k.directly) for k in links]

    def run(
        variables: Arrays,
        factors: tuple[Any, ...],
        x: Float[Array, "..."],
        dx: Float[Array, "..."],
        noise: Float[Array, ""],
        tolerance: Float[Array, ""],
        gradient: Mapping[str, Float[Array, "..."]],
    ) -> list[Any]:
        layers = []
        for link, step, factor in zip(links, steps, factors, strict=True):
            mine = {p: gradient[p] for p in link.segment.paths}
            asked = (x, dx, noise, tolerance, mine)
            solution, pulled = step(variables, factor if link.directly else jnp.asarray(False), *asked)
            lost = solution.lost if link.directly else step(variables, jnp.asarray(True), *asked)[0].lost
            x, dx = solution.x, pulled
            noise = level_of(tolerances, x, solution.residual, jnp).astype(x.dtype)
            tolerance = tolerance_of(tolerances, share, solution.residual, jnp).astype(x.dtype)
            layers.append((solution, lost, pulled, (noise, tolerance)))
        return layers

    return jax.jit(spread(vmap_several(run, (None, None, 0, 0, 0, 0, 0)), devices, shared=2, split=5))
