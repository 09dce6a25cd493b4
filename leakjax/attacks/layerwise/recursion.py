"""The recursion over all segments, last layer to first, by their linear systems and, where asked, pulled back.

Candidates of the head (two roots, two signs) are followed side by side and dropped as soon as a layer contradicts them.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from leakjax.attacks.layerwise.closing import Nulls, close
from leakjax.attacks.layerwise.kept_activations import keep_activations
from leakjax.attacks.layerwise.kinks import Solved, mend_kinks
from leakjax.attacks.layerwise.layer_step import (
    LayerState,
    Step,
    compile_steps,
    pull_back_cotangent,
    run_steps,
    workers,
)
from leakjax.attacks.layerwise.outcomes import outcomes
from leakjax.attacks.layerwise.path import (
    Anchor,
    Path,
    drop_impossible,
    drop_misfits,
    layer_info,
    noise_level,
    solve_tolerance,
)
from leakjax.attacks.layerwise.prior_choice import choose
from leakjax.attacks.layerwise.ranks import NULL_SPACE, matrix_shape, solve_layer_densely
from leakjax.attacks.layerwise.start import start
from leakjax.attacks.layerwise.waiting import pull, wait
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.errors import InputError, UnreadableModelError
from leakjax.runtime.cores import side_by_side
from leakjax.runtime.devices import solved_together
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.precision import compute_in
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import dense_bytes, lsmr_condition

ILL_CONDITIONED = 1e5  # above it a layer is solved again by singular values, where that is small enough


def recurse(problem: Problem, monitor: Monitor, *, pulling: bool) -> list[Outcome]:
    """Invert every victim's gradient layer by layer, the examples of one gradient together.

    Returns an `Outcome` an example. Layers are solved by LSMR, or by singular values where LSMR found a null space or
    bad conditioning; the rank of a layer too large for that stays None. With `pulling` a layer with a null space waits
    for the layers before it (`pull_back`).
    """
    problem = keep_activations(problem) if pulling else problem
    return outcomes(problem, follow(problem, monitor, pulling=pulling))


def follow(problem: Problem, monitor: Monitor, *, pulling: bool) -> list[Path]:
    """`recurse`, up to the images that were reached; several candidates a victim."""
    problem = keep_activations(problem) if pulling else problem
    *segments, head = problem.segments
    if not head.paths:
        raise UnreadableModelError(
            "no parameter acts on the data after the last activation: the recursion has no head to start from; end the "
            "model with a parameterized layer"
        )
    _refuse_nonlinear(problem.segments, pulling)
    size = solved_together(problem.victims, problem.chunk, problem.devices)
    _check_memory(problem, size)
    monitor.tell("reading the head")
    paths = start(problem, monitor, head)
    linear = [k for k, segment in enumerate(segments) if segment.linear]
    monitor.tell(f"compiling {len(linear)} layers")
    steps = dict(zip(linear, compile_steps(problem, [segments[k] for k in linear], size, monitor), strict=True))
    for position in reversed(range(len(segments))):
        if not paths:
            break
        monitor.tell(f"solving {segments[position].name}")
        paths = drop_impossible(problem, segments[position], paths)
        if position in steps:
            paths = _advance(problem, position, steps[position], size, paths, pulling and position > 0)
        else:
            paths = [wait(problem, position, path) for path in paths]
        pulled = [pull(problem, monitor, position, path) for path in drop_misfits(problem, paths)]
        paths = list(itertools.chain.from_iterable(pulled))
    return [choose(problem, monitor, path) for path in paths] if pulling else paths


def _refuse_nonlinear(chain: Sequence[Segment], pulling: bool) -> None:
    """The head must be affine, and without pulling back every segment."""
    *segments, head = chain
    if not head.linear:
        raise UnreadableModelError(
            f"the model's last map is nonlinear ({head.nonlinearity}): the recursion has no head to start from; end "
            "the model with an affine layer"
        )
    found = next((s for s in segments if not s.linear), None)
    if found is not None and not pulling:
        raise UnreadableModelError(
            f"{found.name} is no affine map ({found.nonlinearity}): this attack solves linear systems alone; use "
            'attack="copa" (--attack copa), or model.eval() if this is batch norm that the client ran in eval mode'
        )


def _advance(problem: Problem, position: int, step: Step, size: int, paths: list[Path], waiting: bool) -> list[Path]:
    segment, victims = problem.segments[position], [p.victim for p in paths]
    state = LayerState(
        np.stack([p.x for p in paths]),
        np.stack([p.dx for p in paths]),
        np.asarray([p.noise for p in paths]),
        np.asarray([solve_tolerance(problem, p.layers[0].residual) for p in paths]),
    )
    solved = Solved(*run_steps(problem, segment, step, size, state, victims), state)
    certain = np.array([p.certain for p in paths])
    solved = mend_kinks(problem, segment, step, size, victims, solved, certain)
    nulls: Nulls = {}

    def finish(victim: int) -> list[tuple[int, Path]]:
        with compute_in(str(problem.dtype)):
            mine = [k for k, path in enumerate(paths) if path.victim == victim]
            return [(k, _solved(problem, position, solved, k, paths[k], waiting, nulls)) for k in mine]

    done = side_by_side(finish, sorted(set(victims)))
    return [path for _, path in sorted(itertools.chain.from_iterable(done), key=lambda pair: pair[0])]


def _solved(problem: Problem, position: int, solved: Solved, k: int, path: Path, waiting: bool, nulls: Nulls) -> Path:
    segment, (solution, dx, state) = problem.segments[position], solved
    n = int(np.prod(segment.input.shape))
    x, pulled, residual = np.asarray(solution.x[k]), dx[k], float(solution.residual[k])
    seen: np.ndarray | None = np.ones(segment.input.shape)
    rank: int | None = n
    condition: float | None = lsmr_condition(solution, k)
    anchor = path.anchor
    deficient = solution.lost[k] > NULL_SPACE
    if waiting and deficient and path.certain:
        closed = close(problem, position, solved, k, path, nulls)
        if closed is not None:
            return closed
    if anchor is not None or (waiting and deficient):
        rank, seen = (None, None) if deficient else (n, seen)
        anchor = anchor or Anchor(position, state.x[k], state.dx[k], float(state.noise[k]))
    elif problem.solver == "dense" or not (solution.lost[k] <= NULL_SPACE and condition < ILL_CONDITIONED):
        dense = solve_layer_densely(problem, segment, state, k, path.victim)
        if dense is None:
            rank, seen = (n, seen) if solution.lost[k] <= NULL_SPACE else (None, None)
        else:
            dz, answer = dense
            rank, condition, seen = answer.rank, answer.condition, answer.seen.reshape(segment.input.shape)
            if problem.solver == "dense" or answer.residual <= max(2 * residual, 1e-12) or rank == n:
                x, residual = answer.x.reshape(segment.input.shape).astype(x.dtype), answer.residual
                pulled = pull_back_cotangent(segment, problem.variables, x, dz)
    info = layer_info(problem, segment.name, n, rank, condition, residual, int(solution.steps[k]))
    noise = noise_level(problem, x, residual)
    source = Anchor(0, state.x[k], state.dx[k], float(state.noise[k])) if position == 0 and anchor is None else None
    return dataclasses.replace(
        path, x=x, dx=pulled, noise=noise, layers=(info, *path.layers), seen=seen, anchor=anchor, source=source
    )


def _check_memory(problem: Problem, size: int) -> None:
    """Refuse, before anything is compiled, what this machine's memory cannot hold."""
    itemsize = np.dtype(problem.dtype).itemsize
    for segment in problem.segments[:-1]:
        rows, columns = matrix_shape(problem, segment)
        if problem.solver == "dense" and segment.linear:
            needed, remedy = dense_bytes(rows, columns), 'the matrix-free solver="lsmr" (--solver lsmr)'
        else:
            needed = 12 * min(workers(problem) * size, 2 * problem.victims) * itemsize * segment.work
            remedy = f"a chunk below {size} victims" if size > 1 else "a machine with more memory"
        if not fits_in_memory(needed):
            raise InputError(
                f"layer {segment.name!r} would take {needed:,} bytes of memory, more than this machine has free; "
                f"use {remedy}"
            )
