"""One step of the recursion, compiled once for a segment and a chunk size: from (x_next, dx_next) to (x, dx)."""

import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from leakjax.attacks.problem import Monitor, Problem
from leakjax.constraints.layer import BLOCKS, LayerSystem, layer_system
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.cores import ALONE, cores
from leakjax.runtime.devices import placement, spread
from leakjax.runtime.precision import compute_in
from leakjax.runtime.programs import Shelf, keep
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import LsmrSolution, materialize, solve_side

SLOPE_FLOOR = 1e-2
MOST_STEPS = 6000
LARGE = 2**16
"""Numbers of a layer from which on its chunks are not run at once: a core's cache does not hold them, and runs side by
side bring nothing (55x55x64 from 224x224x3 once came out wrong, see `run_steps`)."""


class LayerState(NamedTuple):
    """x_{i+1} and dL/dx_{i+1} of several paths (leading axis), with the absolute noise level of x_{i+1} and the
    relative tolerance that this noise makes sense of."""

    x: Float[np.ndarray, "P ..."]
    dx: Float[np.ndarray, "P ..."]
    noise: Float[np.ndarray, " P"]
    tolerance: Float[np.ndarray, " P"]


Step = Callable[..., tuple[LsmrSolution, Float[Array, "P ..."]]]


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


def max_steps(segment: Segment) -> int:
    """Bound on LSMR steps: a few times the unknowns, capped; batches share equations and are worse conditioned."""
    return int(min(4 * max(int(np.prod(segment.input.shape)), 100), MOST_STEPS * min(segment.input.shape[0], 3)))


@keep(128)
def _lowered(segment: Segment, dtype: str, floor: float, blocks: tuple[str, ...], devices: tuple[Any, ...]) -> Any:
    def step(
        variables: Arrays,
        random: Bool[Array, ""],
        x: Float[Array, "..."],
        dx: Float[Array, "..."],
        noise: Float[Array, ""],
        tolerance: Float[Array, ""],
        gradient: Mapping[str, Float[Array, "..."]],
    ) -> tuple[LsmrSolution, Float[Array, "..."]]:
        dz, system = build_system(segment, variables, x, dx, noise, gradient, floor, blocks)
        rounds = 1 if dtype == "float64" else 3
        solution = solve_side(
            system.operator, system.vector, random, tolerance=tolerance, max_steps=max_steps(segment), rounds=rounds
        )
        pulled = jax.vjp(lambda x: segment.function(variables, x), solution.x)[1](dz)[0]
        return solution, pulled

    return jax.jit(spread(vmap_several(step, (None, None, 0, 0, 0, 0, 0)), devices, shared=2, split=5))


_COMPILED: Shelf[Step] = Shelf(128)


def compile_steps(problem: Problem, segments: Sequence[Segment], size: int, monitor: Monitor) -> list[Step]:
    """The compiled step of every segment for chunks of `size`, compiled side by side."""
    dtype, floor, devices = str(problem.dtype), _floor(problem), problem.devices
    keys = [(s, size, dtype, floor, problem.blocks(s), devices) for s in segments]
    whole, part = placement(devices, split=False), placement(devices, split=True)
    struct = jax.ShapeDtypeStruct
    known = {key: _COMPILED.get(key) for key in keys}
    lowered, start = {}, time.perf_counter()
    for key in keys:
        if known[key] is None:
            segment = key[0]
            shapes = {p: (size, *problem.gradients[p].shape[1:]) for p in segment.paths}
            gradient = {p: struct(shape, problem.dtype, sharding=part) for p, shape in shapes.items()}
            x = struct((size, *segment.output.shape), problem.dtype, sharding=part)
            noise = struct((size,), problem.dtype, sharding=part)
            weights = {p: struct(a.shape, a.dtype, sharding=whole) for p, a in problem.variables.items()}
            random = struct((), bool, sharding=whole)
            program = _lowered(segment, dtype, floor, problem.blocks(segment), devices)
            lowered[key] = program.lower(weights, random, x, x, noise, noise, gradient)
    monitor.trace += time.perf_counter() - start
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = dict(zip(lowered, pool.map(lambda low: low.compile(), lowered.values()), strict=True))
    monitor.compile += time.perf_counter() - start
    return [known[key] or _COMPILED.put(key, made[key]) for key in keys]


def _floor(problem: Problem) -> float:
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
    build = _matrix(segment, _floor(problem), problem.blocks(segment))
    with ALONE:
        return tuple(map(np.asarray, build(dict(problem.variables), *arrays, gradient)))  # type: ignore[return-value]


def run_steps(
    problem: Problem, segment: Segment, step: Step, size: int, state: LayerState, victims: Sequence[int]
) -> tuple[LsmrSolution, Float[np.ndarray, "P ..."]]:
    """Apply a compiled step to all paths, `size` at a time (the last chunk is padded by repetition).

    On CPUs the chunks, and the two right-hand sides of each, run side by side, one a core: a lone victim stays in its
    core's cache and waits for no other. Two runs of one program at once have returned wrong numbers on CPUs
    (`runtime.cores.ALONE`): a wrong solution fits its system no better than by chance, so what is above
    `Tolerances.clean`, or a probe above `Tolerances.probe`, runs again, alone; deficient layers pay for that by a
    second run of their probe. Layers beyond a core's cache go one after another (`LARGE`). Where the problem has
    several devices, each takes its share of every chunk.
    """
    whole, part = (placement(problem.devices, split=split) for split in (False, True))
    with compute_in(str(problem.dtype)):
        weights = jax.device_put(dict(problem.variables), whole)

    def run(task: tuple[bool, int]) -> tuple[LsmrSolution, Float[np.ndarray, "P ..."]]:
        random, start = task
        rows = np.minimum(np.arange(start, start + size), len(victims) - 1)
        owners = np.asarray(victims)[rows]
        with compute_in(str(problem.dtype)):
            gradient = {p: np.asarray(problem.gradients[p][owners], problem.dtype) for p in segment.paths}
            arrays = [np.asarray(np.asarray(a)[rows], problem.dtype) for a in state]
            *arrays, gradient = jax.device_put((*arrays, gradient), part)
            result = jax.block_until_ready(step(weights, jax.device_put(np.asarray(random), whole), *arrays, gradient))
        keep = min(size, len(victims) - start)
        return jax.tree.map(lambda a: np.asarray(a)[:keep], result)

    starts = range(0, len(victims), size)
    tasks = [(random, start) for random in (False, True) for start in starts]
    large = size * max(np.prod(segment.input.shape), np.prod(segment.output.shape)) >= LARGE
    with concurrent.futures.ThreadPoolExecutor(1 if large else workers(problem)) as pool:
        results = list(pool.map(run, tasks))
        at_once = not large and workers(problem) > 1 and len(tasks) > 1
    if at_once:
        results = [
            result if _is_clean(problem, result[0], task[0]) else run(task)
            for task, result in zip(tasks, results, strict=True)
        ]
    solution, pulled = jax.tree.map(lambda *parts: np.concatenate(parts), *results[: len(starts)])
    probes, _ = jax.tree.map(lambda *parts: np.concatenate(parts), *results[len(starts) :])
    return solution._replace(lost=probes.lost), pulled


def _is_clean(problem: Problem, solution: LsmrSolution, random: bool) -> bool:
    """Whether all solutions of a chunk meet their own equations: a probe its known answer."""
    fitting = problem.tolerances.clean
    left, most = (solution.lost, problem.tolerances.probe) if random else (solution.residual, fitting)
    return bool(np.all(np.asarray(left) <= most))


def workers(problem: Problem) -> int:
    """Chunks that are solved side by side: one a core on a CPU, else one."""
    if jax.default_backend() != "cpu" or len(problem.devices) > 1:
        return 1
    return cores()


def pull_back_cotangent(
    segment: Segment, variables: Arrays, x: Float[np.ndarray, "*input"], dz: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "*input"]:
    """dL/dx = (df/dx)^T dz."""
    return np.asarray(_cotangent(segment)(dict(variables), x, dz))


@keep(64)
def _cotangent(segment: Segment) -> Any:
    return jax.jit(lambda variables, x, dz: jax.vjp(lambda x: segment.function(variables, x), x)[1](dz)[0])
