"""One step of the recursion, compiled once for a segment and a chunk size: from (x_next, dx_next) to (x, dx).

A segment is solved directly where it can be (`direct`), else by LSMR; what a direct solve leaves open is LSMR's too.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from leakjax.attacks.layerwise import direct, iterative
from leakjax.attacks.layerwise.chunks import Program, run_chunks
from leakjax.attacks.layerwise.direct import DirectSolution, Route
from leakjax.attacks.layerwise.system import LayerState, slope_floor
from leakjax.attacks.problem import Monitor, Problem
from leakjax.runtime.devices import placement
from leakjax.runtime.programs import Shelf
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import LsmrSolution, lsmr_condition
from leakjax.solvers.lsmr import extreme_singular_values

MOST_CONDITION = 1e3
"""Up to which an answer of a gradient block alone stands: it leaves out rows that may see better what that block hardly
sees, and LSMR weighs all of them (a K1 of condition 1e7 beside forward rows of condition 19 lost 70 dB)."""


class LayerSolution(NamedTuple):
    """Of P paths' systems: x, ||A x - b|| / ||b||, what a random probe lost (see `LsmrSolution`), LSMR's steps, the
    condition (estimated), and whether the solve was direct."""

    x: Float[np.ndarray, "P ..."]
    residual: Float[np.ndarray, " P"]
    lost: Float[np.ndarray, " P"]
    steps: Int[np.ndarray, " P"]
    condition: Float[np.ndarray, " P"]
    direct: Bool[np.ndarray, " P"]


@dataclasses.dataclass(eq=False)
class Step:
    """The programs of a segment: a direct one where it has a `route`, and LSMR's, compiled when it is first needed."""

    segment: Segment
    route: Route | None
    programs: dict[bool, Program]
    compile: Callable[[bool], Program]

    def program(self, *, directly: bool) -> Program:
        """The compiled program of one kind."""
        if directly not in self.programs:
            self.programs[directly] = self.compile(directly)
        return self.programs[directly]


_COMPILED: Shelf[Program] = Shelf(256)


def compile_steps(problem: Problem, segments: Sequence[Segment], size: int, monitor: Monitor) -> list[Step]:
    """The steps of segments for chunks of `size`; those programs that are needed in any case compiled side by side."""
    start = time.perf_counter()
    routes = direct.routes(problem, segments)
    monitor.trace += time.perf_counter() - start

    def compile_all(wanted: Sequence[tuple[Segment, bool]]) -> list[Program]:
        return _compile(problem, [(s, routes.get(s) if directly else None) for s, directly in wanted], size, monitor)

    made = compile_all([(s, s in routes) for s in segments])
    return [
        Step(s, routes.get(s), {s in routes: program}, lambda directly, s=s: compile_all([(s, directly)])[0])
        for s, program in zip(segments, made, strict=True)
    ]


def _compile(
    problem: Problem, wanted: Sequence[tuple[Segment, Route | None]], size: int, monitor: Monitor
) -> list[Program]:
    dtype, floor, devices = str(problem.dtype), slope_floor(problem), problem.devices
    whole, part = placement(devices, split=False), placement(devices, split=True)
    struct = jax.ShapeDtypeStruct
    weights = {p: struct(a.shape, a.dtype, sharding=whole) for p, a in problem.variables.items()}
    lowered, programs, start = {}, {}, time.perf_counter()
    for segment, route in wanted:
        blocks = problem.blocks(segment)
        shapes = None if route is None else jax.tree.map(lambda a: a.shape, route.factor)
        key = (segment, route is None, str(route and route.kind), str(shapes), size, dtype, floor, blocks, devices)
        programs[segment] = key
        if key in _COMPILED:
            continue
        rows = {p: (size, *problem.gradients[p].shape[1:]) for p in segment.paths}
        gradient = {p: struct(shape, problem.dtype, sharding=part) for p, shape in rows.items()}
        x = struct((size, *segment.output.shape), problem.dtype, sharding=part)
        noise = struct((size,), problem.dtype, sharding=part)
        if route is None:
            program, given = iterative.lowered(segment, dtype, floor, blocks, devices), struct((), bool, sharding=whole)
        else:
            program = direct.lowered(segment, route.kind, floor, blocks, devices)
            given = jax.tree.map(lambda a: struct(a.shape, a.dtype, sharding=whole), route.factor)
        lowered[key] = program.lower(weights, given, x, x, noise, noise, gradient)
    monitor.trace += time.perf_counter() - start
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for key, program in zip(lowered, pool.map(lambda low: low.compile(), lowered.values()), strict=True):
            _COMPILED.put(key, program)
    monitor.compile += time.perf_counter() - start
    return [_COMPILED.get(programs[segment]) for segment, _ in wanted]  # type: ignore[misc]


def run_steps(
    problem: Problem, step: Step, size: int, state: LayerState, victims: Sequence[int]
) -> tuple[LayerSolution, Float[np.ndarray, "P ..."]]:
    """Apply a step to all paths, `size` at a time (the last chunk is padded by repetition): (solutions, dL/dx).

    What a direct solve leaves open (a null space, a misfit) is solved by LSMR, whose answer is the least-squares one of
    minimum norm; a misfit is left alone where another path of its victim fits.
    """
    if step.route is None:
        return _iterate(problem, step, size, state, victims)
    solution, pulled = _solve_directly(problem, step, size, state, victims)
    good = (solution.lost <= problem.tolerances.probe) & (solution.residual <= problem.tolerances.clean)
    if step.route.kind is not None and step.route.kind.full:
        good &= solution.condition <= MOST_CONDITION
    settled = {victim for victim, fits in zip(victims, good, strict=True) if fits}
    rest = [k for k, victim in enumerate(victims) if victim not in settled]
    if not rest:
        return solution, pulled
    where = np.asarray(rest)
    again, other = _iterate(
        problem, step, size, jax.tree.map(lambda a: np.asarray(a)[where], state), [victims[k] for k in rest]
    )

    def mixed(a: Any, b: Any) -> Any:
        a = np.array(a)
        a[where] = b
        return a

    return jax.tree.map(mixed, solution, again), mixed(pulled, other)


def _solve_directly(
    problem: Problem, step: Step, size: int, state: LayerState, victims: Sequence[int]
) -> tuple[LayerSolution, Float[np.ndarray, "P ..."]]:
    assert step.route is not None

    def is_clean(found: DirectSolution, task: None) -> bool:
        """Whether the probes came back: a misfit of the system itself is a wrong candidate's, or LSMR's to settle."""
        return bool(np.all(found.lost <= problem.tolerances.probe))

    program = step.program(directly=True)
    [(found, pulled)] = run_chunks(
        problem, step.segment, program, size, state, victims, [(None, step.route.factor)], is_clean
    )
    solution = LayerSolution(
        x=found.x,
        residual=found.residual,
        lost=found.lost,
        steps=np.max(found.steps, axis=1),
        condition=np.array([_condition(jax.tree.map(lambda a, k=k: a[k], found)) for k in range(len(victims))]),
        direct=np.ones(len(victims), bool),
    )
    return solution, pulled


def _condition(found: DirectSolution) -> float:
    """Of one system that was solved directly: ||A|| over the smallest singular value on each of its two sides.

    An estimate: rows that were left out can only see more, how the two sides meet can make both see less.
    """
    if not (np.isfinite(found.largest) and found.least > 0):
        return float("inf")
    left = [
        extreme_singular_values(a, b, s)[0]
        for a, b, s in zip(found.alphas, found.betas, found.recorded, strict=True)
        if s > 0
    ]
    least = min([float(found.least), *left])
    return float(found.largest) / least if least > 0 else float("inf")


def _iterate(
    problem: Problem, step: Step, size: int, state: LayerState, victims: Sequence[int]
) -> tuple[LayerSolution, Float[np.ndarray, "P ..."]]:
    def is_clean(solution: LsmrSolution, random: bool) -> bool:
        """Whether all solutions of a chunk meet their own equations: a probe its known answer."""
        fitting = problem.tolerances.clean
        left, most = (solution.lost, problem.tolerances.probe) if random else (solution.residual, fitting)
        return bool(np.all(np.asarray(left) <= most))

    sides = [(random, np.asarray(random)) for random in (True, False)]
    program = step.program(directly=False)
    (probes, _), (found, pulled) = run_chunks(problem, step.segment, program, size, state, victims, sides, is_clean)
    solution = LayerSolution(
        x=found.x,
        residual=found.residual,
        lost=probes.lost,
        steps=found.steps,
        condition=np.array([lsmr_condition(found, k) for k in range(len(victims))]),
        direct=np.zeros(len(victims), bool),
    )
    return solution, pulled
