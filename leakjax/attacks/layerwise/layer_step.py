"""One step of the recursion, compiled once for a segment and a chunk size: from (x_next, dx_next) to (x, dx).

A segment is solved directly where it can be (`direct`), else by LSMR; what a direct solve leaves open is LSMR's too.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from leakjax.attacks.layerwise.chunks import Program, run_chunks
from leakjax.attacks.layerwise.direct import direct_step
from leakjax.attacks.layerwise.iterative import lsmr_step
from leakjax.attacks.layerwise.layer_solution import LayerSolution, merged, rows_of
from leakjax.attacks.layerwise.routes import Kind, Route, routes
from leakjax.attacks.layerwise.system import LayerState, slope_floor
from leakjax.attacks.problem import Monitor, Problem
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.devices import placement, spread
from leakjax.runtime.programs import Shelf, keep, quickly
from leakjax.segments.chain import Segment

Solved = tuple[LayerSolution, Float[np.ndarray, "P ..."]]
"""Of several paths: their solutions, dL/dx of each."""


@dataclasses.dataclass(eq=False)
class Step:
    """The programs of a segment: a direct one where it has a `route`, and LSMR's, each compiled when first needed."""

    segment: Segment
    route: Route | None
    programs: dict[bool, Program]
    compile: Callable[[bool], Program]

    @property
    def alone(self) -> bool:
        """Whether the gradient block is solved without the forward rows."""
        return self.route is not None and self.route.kind is not None and self.route.kind.full

    def program(self, *, directly: bool) -> Program:
        """The compiled program of one kind."""
        if directly not in self.programs:
            self.programs[directly] = self.compile(directly)
        return self.programs[directly]


_COMPILED: Shelf[Program] = Shelf(256)

_FEW = 64
"""Clients of one architecture up to which programs are compiled without XLA's own optimization: cnn6's six steps take
10 CPU seconds to compile instead of 27, and then 0.30 a client instead of 0.15."""

_CLIENTS: Shelf[int] = Shelf(256)


def compile_steps(
    problem: Problem,
    segments: Sequence[Segment],
    size: int,
    monitor: Monitor,
    *,
    later: Sequence[Segment] = (),
    planned: bool = False,
) -> list[Step]:
    """The steps of segments for chunks of `size`; those programs that are needed in any case, which are not those of
    the segments for `later`, compiled side by side. Clients of a plan (`planned`) are not counted."""
    start = time.perf_counter()
    known, options = routes(problem, segments, size), _options(problem, planned=planned)
    monitor.trace += time.perf_counter() - start

    def compile_all(wanted: Sequence[tuple[Segment, bool]]) -> list[Program]:
        asked = [(s, known.get(s) if directly else None) for s, directly in wanted]
        return _compile(problem, asked, size, monitor, options)

    now = [s for s in segments if s not in later]
    made = dict(zip(now, compile_all([(s, s in known) for s in now]), strict=True))
    return [
        Step(
            s,
            known.get(s),
            {s in known: made[s]} if s in made else {},
            lambda directly, s=s: compile_all([(s, directly)])[0],
        )
        for s in segments
    ]


def one_step(
    segment: Segment, kind: Kind | None, dtype: str, floor: float, blocks: tuple[str, ...], *, directly: bool
) -> Callable[..., Any]:
    """The step of a segment for one client: (variables, given, x, dx, noise, tolerance, gradient) -> (solution, dL/dx);
    `given` is the factor of its weights or None where it goes `directly`, else whether the probe is asked for."""
    return direct_step(segment, kind, floor, blocks) if directly else lsmr_step(segment, dtype, floor, blocks)


@keep(128)
def _jitted(
    segment: Segment,
    kind: Kind | None,
    dtype: str,
    floor: float,
    blocks: tuple[str, ...],
    devices: tuple[Any, ...],
    directly: bool,
) -> Any:
    step = one_step(segment, kind, dtype, floor, blocks, directly=directly)
    return jax.jit(spread(vmap_several(step, (None, None, 0, 0, 0, 0, 0)), devices, shared=2, split=5))


def _compile(
    problem: Problem,
    wanted: Sequence[tuple[Segment, Route | None]],
    size: int,
    monitor: Monitor,
    options: dict[str, Any] | None,
) -> list[Program]:
    dtype, floor, devices = str(problem.dtype), slope_floor(problem), problem.devices

    def lower(segment: Segment, route: Route | None) -> tuple[Hashable, Callable[[], Any]]:
        kind, blocks = route and route.kind, problem.blocks(segment)
        given = jax.ShapeDtypeStruct((), bool) if route is None else route.factor
        shapes = jax.tree.map(lambda a: a.shape, given)
        key = (segment, route is None, str(kind), str(shapes), size, dtype, floor, blocks, devices, options is None)
        jitted = _jitted(segment, kind, dtype, floor, blocks, devices, route is not None)
        return key, lambda: jitted.lower(*arguments(problem, segment.paths, segment.output.shape, size, given))

    return compile_programs([lower(*one) for one in wanted], monitor, options)


def _options(problem: Problem, *, planned: bool) -> dict[str, Any] | None:
    """How XLA compiles a problem's steps: quickly where few clients of the architecture have come, else in full."""
    key = (problem.segments, str(problem.dtype))
    clients = (_CLIENTS.get(key) or 0) + problem.victims
    if not planned:
        _CLIENTS.put(key, clients)
    return quickly(problem.devices or ()) if clients <= _FEW else None


def arguments(
    problem: Problem, paths: Sequence[str], output: Sequence[int], size: int, given: Any
) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """The shapes of what a step takes, `size` clients at once, and where it lies."""
    whole, part = (placement(problem.devices, split=split) for split in (False, True))

    def struct(shape: Sequence[int], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    weights = {p: struct(a.shape, a.dtype, whole) for p, a in problem.variables.items()}
    shared = jax.tree.map(lambda a: struct(a.shape, a.dtype, whole), given)
    x = struct((size, *output), problem.dtype, part)
    one = struct((size,), problem.dtype, part)
    gradient = {p: struct((size, *problem.gradients[p].shape[1:]), problem.dtype, part) for p in paths}
    return weights, shared, x, x, one, one, gradient


def compile_programs(
    wanted: Sequence[tuple[Hashable, Callable[[], Any]]], monitor: Monitor, options: dict[str, Any] | None = None
) -> list[Program]:
    """The programs of (key, what lowers it): those that are not known yet are compiled side by side, with `options`."""
    start = time.perf_counter()
    programs = {key: _COMPILED.get(key) for key, _ in wanted}
    if all(program is not None for program in programs.values()):
        return [programs[key] for key, _ in wanted]  # type: ignore[misc]
    lowered = {key: lower() for key, lower in wanted if programs[key] is None}
    monitor.trace += time.perf_counter() - start
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for key, program in zip(lowered, pool.map(lambda low: low.compile(options), lowered.values()), strict=True):
            programs[key] = _COMPILED.put(key, program)
    monitor.compile += time.perf_counter() - start
    return [programs[key] for key, _ in wanted]  # type: ignore[misc]


class Ahead(NamedTuple):
    """What a step gives for several paths, where that is known; the rows `missing` are still to be solved."""

    solved: Solved
    missing: Int[np.ndarray, " M"]


def run_steps(
    problem: Problem, step: Step, size: int, state: LayerState, victims: Sequence[int], ahead: Ahead | None = None
) -> Solved:
    """Apply a step to all paths, `size` at a time (the last chunk is padded by repetition).

    What a direct solve leaves open (a null space, a misfit) is solved by LSMR, whose answer is the least-squares one of
    minimum norm; a misfit is left alone where another path of its victim fits.
    """
    solution, pulled = _first(problem, step, size, state, victims, ahead)
    if step.route is None:
        return solution, pulled
    good = solution.stands(problem, alone=step.alone)
    settled = {victim for victim, fits in zip(victims, good, strict=True) if fits}
    rest = np.array([k for k, victim in enumerate(victims) if victim not in settled], int)
    if not len(rest):
        return solution, pulled
    again = _iterate(problem, step, size, rows_of(state, rest), [victims[k] for k in rest])
    return merged((solution, pulled), again, rest)


def _first(
    problem: Problem, step: Step, size: int, state: LayerState, victims: Sequence[int], ahead: Ahead | None
) -> Solved:
    """What the step's own solver gives, direct or LSMR; of what is known `ahead`, only the rows that are missing."""
    solve = _iterate if step.route is None else _solve_directly
    if ahead is None:
        return solve(problem, step, size, state, victims)
    if not len(ahead.missing):
        return ahead.solved
    again = solve(problem, step, size, rows_of(state, ahead.missing), [victims[k] for k in ahead.missing])
    return merged(ahead.solved, again, ahead.missing)


def _solve_directly(problem: Problem, step: Step, size: int, state: LayerState, victims: Sequence[int]) -> Solved:
    assert step.route is not None

    def is_clean(result: Any, task: None) -> bool:
        """Whether the probes came back: a misfit of the system itself is a wrong candidate's, or LSMR's to settle."""
        return bool(np.all(result[0].lost <= problem.tolerances.probe))

    program = step.program(directly=True)
    given = [(None, step.route.factor)]
    [(found, pulled)] = run_chunks(problem, [step.segment], program, size, state, victims, given, is_clean)
    return LayerSolution.of_direct(found), pulled


def _iterate(problem: Problem, step: Step, size: int, state: LayerState, victims: Sequence[int]) -> Solved:
    def is_clean(result: Any, random: bool) -> bool:
        """Whether all solutions of a chunk meet their own equations: a probe its known answer."""
        solution, fitting = result[0], problem.tolerances.clean
        left, most = (solution.lost, problem.tolerances.probe) if random else (solution.residual, fitting)
        return bool(np.all(np.asarray(left) <= most))

    sides = [(random, np.asarray(random)) for random in (True, False)]
    program = step.program(directly=False)
    (probes, _), (found, pulled) = run_chunks(problem, [step.segment], program, size, state, victims, sides, is_clean)
    return LayerSolution.of_lsmr(found, probes.lost), pulled
