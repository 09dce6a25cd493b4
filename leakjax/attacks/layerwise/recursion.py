"""The recursion over all segments, last layer to first, by their linear systems and, where asked, pulled back.

Candidates of the head (two roots, two signs) are followed side by side and dropped as soon as a layer contradicts them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from leakjax.attacks.layerwise.chunks import workers
from leakjax.attacks.layerwise.closing import Nulls, close
from leakjax.attacks.layerwise.entry import enter, labeled
from leakjax.attacks.layerwise.kept_activations import keep_activations
from leakjax.attacks.layerwise.kinks import Solved, mend_kinks
from leakjax.attacks.layerwise.layer_step import Step, compile_steps
from leakjax.attacks.layerwise.normalized import undo
from leakjax.attacks.layerwise.outcomes import outcomes
from leakjax.attacks.layerwise.path import (
    Anchor,
    Path,
    drop_impossible,
    drop_misfits,
    layer_info,
    noise_level,
)
from leakjax.attacks.layerwise.prior_choice import choose
from leakjax.attacks.layerwise.ranks import matrix_shape, solve_layer_densely
from leakjax.attacks.layerwise.start import start
from leakjax.attacks.layerwise.sweep import Swept, advance, state_of, sweep, swept_together
from leakjax.attacks.layerwise.system import pull_back_cotangent
from leakjax.attacks.layerwise.unsent_statistics import undo_unsent
from leakjax.attacks.layerwise.waiting import pull, wait
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.errors import InputError, UnreadableModelError
from leakjax.reconstruction import LayerSolver
from leakjax.runtime.cores import side_by_side
from leakjax.runtime.devices import solved_together
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.precision import compute_in
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import dense_bytes

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
    problem, size = checked_chain(problem, pulling=pulling)
    *segments, head = problem.segments
    monitor.tell("reading the head")
    entered = enter(problem, monitor)
    paths = start(problem, monitor, head, ranked=not entered)
    if entered:
        paths = labeled(entered, paths)
        segments = segments[: entered[0].entry]
    linear = [segment for segment in segments if segment.linear and not segment.normalizes]
    monitor.tell(f"compiling {len(linear)} layers")
    together = swept_together(problem, segments, size)
    steps = dict(zip(linear, compile_steps(problem, linear, size, monitor, later=together), strict=True))
    swept: dict[Segment, Swept] = {}
    for position in reversed(range(len(segments))):
        if not paths:
            break
        segment = segments[position]
        monitor.tell(f"solving {segment.name}")
        paths = drop_impossible(problem, segment, paths)
        one_each = len({path.victim for path in paths}) == len(paths)
        if segment in together and not swept and (one_each or segment is not together[0]):
            paths = [dataclasses.replace(path, row=k) for k, path in enumerate(paths)]
            left = [steps[s] for s in together[together.index(segment) :]]
            swept = sweep(problem, monitor, left, size, paths)
        step = steps.get(segment)
        if step is not None:
            paths = _advance(problem, position, step, swept.get(segment), size, paths, pulling and position > 0)
        else:
            before = _without_step(segment)
            paths = [before(problem, position, path) for path in paths]
        pulled = [pull(problem, monitor, position, path) for path in drop_misfits(problem, paths)]
        paths = list(itertools.chain.from_iterable(pulled))
    return [choose(problem, monitor, path) for path in paths] if pulling else paths


def checked_chain(problem: Problem, *, pulling: bool) -> tuple[Problem, int]:
    """(the problem as its segments are solved, clients in one program); raises `UnreadableModelError` for a chain that
    the recursion cannot start or go through, `InputError` for one that memory cannot hold."""
    problem = keep_activations(problem) if pulling else problem
    if not problem.segments[-1].paths:
        raise UnreadableModelError(
            "no parameter acts on the data after the last activation: the recursion has no head to start from; end the "
            "model with a parameterized layer"
        )
    _refuse_nonlinear(problem.segments, pulling)
    size = solved_together(problem.victims, problem.chunk, problem.devices)
    _check_memory(problem, size)
    return problem, size


def _without_step(segment: Segment) -> Callable[[Problem, int, Path], Path]:
    """What goes before a normalization, its statistics known or not, or another map that is not affine."""
    if segment.linear:
        return undo
    return undo_unsent if segment.normalizes else wait


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


def _advance(
    problem: Problem, position: int, step: Step, known: Swept | None, size: int, paths: list[Path], waiting: bool
) -> list[Path]:
    victims = [p.victim for p in paths]
    state = state_of(problem, paths)
    solved = Solved(*advance(problem, step, size, state, paths, known), state)
    certain = np.array([p.certain for p in paths])
    solved = mend_kinks(problem, step, size, victims, solved, certain)
    nulls: Nulls = {}

    def finish(victim: int) -> list[tuple[int, Path]]:
        with compute_in(str(problem.dtype)):
            mine = [k for k, path in enumerate(paths) if path.victim == victim]
            return [(k, _solved(problem, position, solved, k, paths[k], waiting, nulls)) for k in mine]

    done = side_by_side(finish, sorted(set(victims)))
    return [path for _, path in sorted(itertools.chain.from_iterable(done), key=lambda pair: pair[0])]


def _solved(problem: Problem, position: int, solved: Solved, k: int, path: Path, waiting: bool, nulls: Nulls) -> Path:
    """The path one layer further: closed by the activation before it, waiting, or with the layer's own answer."""
    segment, state = problem.segments[position], solved.state
    deficient = bool(solved.solution.lost[k] > problem.tolerances.probe)
    if waiting and deficient and path.certain:
        closed = close(problem, position, solved, k, path, nulls)
        if closed is not None:
            return closed
    answer, anchor = _by_step(segment, solved, k, problem.tolerances.probe), path.anchor
    here = Anchor(position, state.x[k], state.dx[k], float(state.noise[k]))
    if anchor is not None or (waiting and deficient):
        anchor = anchor or here
    elif problem.solver == "dense" or answer.rank is None or not answer.condition < ILL_CONDITIONED:
        answer = _by_singular_values(problem, segment, solved, k, path.victim, answer)
    info = layer_info(
        problem,
        segment.name,
        answer.x.size,
        answer.rank,
        answer.condition,
        answer.residual,
        int(solved.solution.steps[k]),
    )
    info = dataclasses.replace(info, solver=answer.solver)
    return dataclasses.replace(
        path,
        x=answer.x,
        dx=answer.dx,
        noise=noise_level(problem, answer.x, answer.residual),
        layers=(info, *path.layers),
        seen=answer.seen,
        anchor=anchor,
        source=dataclasses.replace(here, position=0) if position == 0 and anchor is None else None,
    )


class _Answer(NamedTuple):
    """A layer's input by its own system: x and dL/dx, relative residual, condition, rank and row-space shares, these
    two None where they are not known, and what found it."""

    x: Float[np.ndarray, "..."]
    dx: Float[np.ndarray, "..."]
    residual: float
    condition: float
    rank: int | None
    seen: Float[np.ndarray, "..."] | None
    solver: LayerSolver


def _by_step(segment: Segment, solved: Solved, k: int, probe: float) -> _Answer:
    """What the layer's step found; of full rank where it lost nothing of a random input."""
    solution, x = solved.solution, np.asarray(solved.solution.x[k])
    whole = bool(solution.lost[k] <= probe)
    return _Answer(
        x=x,
        dx=solved.dx[k],
        residual=float(solution.residual[k]),
        condition=float(solution.condition[k]),
        rank=x.size if whole else None,
        seen=np.ones(segment.input.shape) if whole else None,
        solver="direct" if solution.direct[k] else "lsmr",
    )


def _by_singular_values(
    problem: Problem, segment: Segment, solved: Solved, k: int, victim: int, answer: _Answer
) -> _Answer:
    """The step's answer, with the rank of the layer's matrix where that is small, and its solution where it fits."""
    found = solve_layer_densely(problem, segment, solved.state, k, victim)
    if found is None:
        return answer
    dz, dense = found
    ranked = answer._replace(rank=dense.rank, condition=dense.condition, seen=dense.seen.reshape(segment.input.shape))
    better = dense.residual <= max(2 * answer.residual, 1e-12) or dense.rank == answer.x.size
    if problem.solver != "dense" and not better:
        return ranked
    x = dense.x.reshape(segment.input.shape).astype(answer.x.dtype)
    return ranked._replace(
        x=x, dx=pull_back_cotangent(segment, problem.variables, x, dz), residual=dense.residual, solver="dense"
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
