"""A compiled step on many paths: chunk after chunk, side by side where that is safe."""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from leakjax.attacks.layerwise.system import LayerState
from leakjax.attacks.problem import Problem
from leakjax.runtime.cores import blas_threads, cores
from leakjax.runtime.devices import placement
from leakjax.runtime.precision import compute_in
from leakjax.segments.chain import Segment

LARGE = 2**16
"""Numbers of a layer from which on its chunks are not run at once: a core's cache does not hold them, and runs side by
side bring nothing (55x55x64 from 224x224x3 once came out wrong, see `run_chunks`)."""


Program = Callable[..., Any]


def run_chunks(
    problem: Problem,
    segments: Sequence[Segment],
    program: Program,
    size: int,
    state: LayerState,
    victims: Sequence[int],
    kinds: Sequence[tuple[Any, Any]],
    is_clean: Callable[[Any, Any], bool],
) -> list[Any]:
    """The program of `segments` on all chunks, once for each of the `kinds`: (its tag, the program's second argument).

    On CPUs the chunks, and the kinds of each, run side by side, one a core: a lone victim stays in its core's cache and
    waits for no other; the small matrices of a layer gain nothing from threads. Two runs of one program at once have
    returned wrong numbers on CPUs (`runtime.cores.ALONE`): a wrong solution fits its system no better than by chance,
    so a result that is not clean (`Tolerances.clean`, or a probe above `Tolerances.probe`) runs again, alone; deficient
    layers pay for that by a second run of their probe. Layers beyond a core's cache go one after another (`LARGE`).
    Where the problem has several devices, each takes its share of every chunk.
    """
    paths = [p for segment in segments for p in segment.paths]
    whole, part = (placement(problem.devices, split=split) for split in (False, True))
    with compute_in(str(problem.dtype)):
        weights = jax.device_put(dict(problem.variables), whole)
        given = [jax.device_put(value, whole) for _, value in kinds]

    def run(task: tuple[int, int]) -> Any:
        kind, start = task
        rows = np.minimum(np.arange(start, start + size), len(victims) - 1)
        owners = np.asarray(victims)[rows]
        with compute_in(str(problem.dtype)):
            gradient = {p: np.asarray(problem.gradients[p][owners], problem.dtype) for p in paths}
            arrays = [np.asarray(np.asarray(a)[rows], problem.dtype) for a in state]
            *arrays, gradient = jax.device_put((*arrays, gradient), part)
            result = jax.block_until_ready(program(weights, given[kind], *arrays, gradient))
        keep = min(size, len(victims) - start)
        return jax.tree.map(lambda a: np.asarray(a)[:keep], result)

    starts = range(0, len(victims), size)
    tasks = [(kind, start) for kind in range(len(kinds)) for start in starts]
    large = size * max(np.prod(s.shape) for segment in segments for s in (segment.input, segment.output)) >= LARGE
    lanes = 1 if large else workers(problem)
    with blas_threads(1), concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        results = list(pool.map(run, tasks))
    if lanes > 1 and len(tasks) > 1:
        results = [
            result if is_clean(result, kinds[task[0]][0]) else run(task)
            for task, result in zip(tasks, results, strict=True)
        ]
    count = len(starts)
    return [
        jax.tree.map(lambda *parts: np.concatenate(parts), *results[k * count : (k + 1) * count])
        for k in range(len(kinds))
    ]


def workers(problem: Problem) -> int:
    """Chunks that are solved side by side: one a core on a CPU, else one."""
    if jax.default_backend() != "cpu" or len(problem.devices) > 1:
        return 1
    return cores()
