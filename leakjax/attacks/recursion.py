"""The recursion over all segments, last layer to first, by their linear systems and, where asked, pulled back.

Candidates of the head (two roots, two signs) are followed side by side and dropped as soon as a layer contradicts them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.attacks.layer_step import (
    LayerState,
    compile_steps,
    dense_system,
    max_steps,
    pull_back_cotangent,
    run_steps,
    workers,
)
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.attacks.pull_back import Known, gram, pull_back
from leakjax.errors import InputError, UnreadableModelError
from leakjax.heads import loss_pull, read_head
from leakjax.memory import fits_in_memory
from leakjax.reconstruction import Candidate, LayerInfo
from leakjax.residuals import pull_gradients, push_forward
from leakjax.segments import Chain, Segment
from leakjax.solvers.linear import DenseSolution, LsmrSolution, dense_bytes, lsmr_condition, solve_dense
from leakjax.systems import segment_rows

NULL_SPACE = 3e-6  # a probe that comes back with less than this lost met no null space
ILL_CONDITIONED = 1e5  # above it a layer is solved again by singular values, where that is small enough
DENSE_SIDE = 4000
EXACT_SHARE, NOISY_SHARE = 0.03, 0.002  # of the misfit left by the next layer, for the tolerance of this one
NOISE_FACTORS = (1.0, 0.1, 10.0, 0.01, 100.0)
MOST_KINKS, MOST_TRIALS = 4, 32  # entries moved across a kink, and tried at a time


@dataclasses.dataclass(frozen=True, eq=False)
class _Anchor:
    """A layer with a null space, waiting: its position, and what is known at its output."""

    position: int
    x: np.ndarray
    dx: np.ndarray
    noise: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Path:
    """One candidate on its way to the image."""

    victim: int
    label: int
    x: np.ndarray
    dx: np.ndarray
    noise: float
    layers: tuple[LayerInfo, ...]
    seen: np.ndarray | None
    anchor: _Anchor | None = None


def recurse(problem: Problem, monitor: Monitor, *, pulling: bool) -> list[Outcome]:
    """Invert every victim's gradient layer by layer; one example a gradient.

    Returns an `Outcome` a victim. Layers are solved by LSMR, or by singular values where LSMR found a null space or
    bad conditioning; the rank of a layer too large for that stays None. With `pulling` a layer with a null space waits
    for the layers before it (`pull_back`).
    """
    *segments, head = problem.chain.segments
    if not head.paths:
        raise UnreadableModelError(
            "no parameter acts on the data after the last activation: the recursion has no head to start from; end the "
            "model with a parameterized layer"
        )
    size = min(problem.victims, problem.chunk)
    _check_memory(problem, size)
    monitor.tell(f"compiling {len(segments)} layers")
    steps = compile_steps(problem, segments, size, monitor)
    monitor.tell("reading the head")
    paths, position = _start(problem, head), len(segments)
    for segment, step in zip(reversed(segments), reversed(steps), strict=True):
        if not paths:
            break
        monitor.tell(f"solving {segment.name}")
        position -= 1
        paths = _possible(problem, segment, paths)
        paths = _prune(problem, _advance(problem, segment, step, size, paths, pulling and position > 0))
        paths = [_pull(problem, monitor, position, path) for path in paths]
    return _outcomes(problem, paths)


def _start(problem: Problem, head: Segment) -> list[_Path]:
    reading = read_head(
        head,
        problem.variables,
        {p: np.asarray(problem.gradients[p], problem.dtype) for p in head.paths},
        problem.loss,
        labels=problem.labels,
        tolerance=problem.tolerance,
        accept=problem.matched,
    )
    paths = []
    for candidate in reading.candidates:
        v = candidate.victim
        lost, residual = float(reading.solution.lost[v]), float(reading.solution.residual[v])
        condition, rank, seen = lsmr_condition(reading.solution, v), candidate.x.size, np.ones(candidate.x.shape)
        if lost > NULL_SPACE:
            rank, seen = _head_rank(problem, head, candidate.dz)
        info = _info(problem, head.name, candidate.x.size, rank, condition, residual, int(reading.solution.steps[v]))
        dx = pull_back_cotangent(head, problem.variables, candidate.x, candidate.dz)
        paths.append(_Path(v, candidate.label, candidate.x, dx, _noise(problem, candidate.x, residual), (info,), seen))
    return paths


def _head_rank(problem: Problem, head: Segment, dz: np.ndarray) -> tuple[int | None, np.ndarray | None]:
    """Rank and seen share of the head's gradient block alone; None where its matrix is too large."""
    rows, columns = sum(problem.gradients[p][0].size for p in head.paths), int(np.prod(head.input.shape))
    if not fits_in_memory(dense_bytes(rows, columns)) or min(rows, columns) > DENSE_SIDE:
        return None, None

    def entries(x: Any) -> Any:
        g = segment_rows(head, problem.variables, jnp.asarray(dz), x)[1]
        return jnp.concatenate([jnp.ravel(g[p]) for p in head.paths])

    jacobian = jax.jacrev if rows < columns else jax.jacfwd
    matrix = np.asarray(jacobian(entries)(jnp.zeros(head.input.shape, problem.dtype))).reshape(rows, columns)
    solution = solve_dense(matrix, np.zeros(len(matrix)), tolerance=_rank_tolerance(problem, matrix.shape))
    return solution.rank, solution.seen.reshape(head.input.shape)


def _advance(
    problem: Problem, segment: Segment, step: Any, size: int, paths: list[_Path], waiting: bool
) -> list[_Path]:
    victims = [p.victim for p in paths]
    state = LayerState(
        np.stack([p.x for p in paths]),
        np.stack([p.dx for p in paths]),
        np.asarray([p.noise for p in paths]),
        np.asarray([_tolerance(problem, p.layers[0].residual) for p in paths]),
    )
    solution, dx = run_steps(problem, segment, step, size, state, victims)
    if segment.activation.has_masks:
        solution, dx, state = _best_noise(problem, segment, step, size, state, victims, solution, dx)
    solution, dx, state = _best_side(problem, segment, step, size, state, victims, solution, dx)
    return [_solved(problem, segment, state, k, path, solution, dx, waiting) for k, path in enumerate(paths)]


def _best_noise(
    problem: Problem,
    segment: Segment,
    step: Any,
    size: int,
    state: LayerState,
    victims: list[int],
    solution: Any,
    dx: Any,
) -> tuple[LsmrSolution, np.ndarray, LayerState]:
    """Where a masked activation's system does not fit, an entry near 0 was taken for the wrong side: move the level."""
    for factor in NOISE_FACTORS[1:]:
        bad = _misfits(problem, segment, solution)
        if not len(bad):
            break
        trial = LayerState(state.x[bad], state.dx[bad], state.noise[bad] * factor, state.tolerance[bad])
        other, other_dx = run_steps(problem, segment, step, size, trial, [victims[k] for k in bad])
        better = other.residual < 0.5 * solution.residual[bad]
        solution, dx, state = _replace((solution, dx, state), bad[better], (other, other_dx, trial), better)
    return solution, dx, state


def _best_side(
    problem: Problem,
    segment: Segment,
    step: Any,
    size: int,
    state: LayerState,
    victims: list[int],
    solution: Any,
    dx: Any,
) -> tuple[LsmrSolution, np.ndarray, LayerState]:
    """Where a kinked activation's system does not fit, an entry within the noise of a kink has the other side's slope.

    Every such entry is tried on its other side, one at a time; the best is kept, and the next one sought.
    """
    for _ in range(MOST_KINKS):
        trials = [
            (k, x) for k in _misfits(problem, segment, solution) for x in _other_sides(problem, segment, state, int(k))
        ]
        if not trials:
            break
        owners = np.array([k for k, _ in trials])
        trial = LayerState(
            np.stack([x for _, x in trials]), state.dx[owners], state.noise[owners], state.tolerance[owners]
        )
        other, other_dx = run_steps(problem, segment, step, size, trial, [victims[k] for k in owners])
        mine = [np.flatnonzero(owners == k) for k in np.unique(owners)]
        best = np.array([m[np.argmin(other.residual[m])] for m in mine])
        best = best[other.residual[best] < 0.7 * solution.residual[owners[best]]]
        if not len(best):
            break
        solution, dx, state = _replace((solution, dx, state), owners[best], (other, other_dx, trial), best)
    return solution, dx, state


def _misfits(problem: Problem, segment: Segment, solution: LsmrSolution) -> np.ndarray:
    """Paths whose system was solved and does not fit: a masking error, where a step limit would be conditioning."""
    converged = solution.steps < max_steps(segment)
    return np.flatnonzero(converged & (solution.residual > max(30 * problem.rounding, 1e-9)))


def _other_sides(problem: Problem, segment: Segment, state: LayerState, k: int) -> list[np.ndarray]:
    """x_{i+1} of path k with one entry moved to where the slope changes, for the entries that are nearest to it."""
    x, noise = state.x[k].reshape(segment.output.shape), state.noise[k]

    def slope(x: np.ndarray) -> np.ndarray:
        preimage = segment.activation.preimage(problem.variables, jnp.asarray(x), jnp.asarray(noise, x.dtype))
        return np.asarray(preimage.slope)

    here, move = slope(x), np.zeros_like(x)
    steps = np.geomspace(1e-3, 1, 10) if segment.activation.has_masks else np.ones(1)
    for distance in 3 * noise * steps:
        for d in (-distance, distance):
            there = slope(x + d)
            kinked = np.abs(there - here) > 0.05 * np.maximum(np.abs(there), np.abs(here))
            move = np.where((move == 0) & kinked, d, move)
    found = []
    for position in sorted(np.flatnonzero(move), key=lambda p: abs(move.flat[p]))[:MOST_TRIALS]:
        moved = x.copy()
        moved.flat[position] += move.flat[position]
        found.append(moved.reshape(state.x[k].shape))
    return found


def _replace(old: Any, where: np.ndarray, new: Any, chosen: np.ndarray) -> Any:
    """`old` with its rows `where` taken from the rows `chosen` of `new`, leaf by leaf."""

    def replace(old: Any, new: Any) -> Any:
        old = np.array(old)
        old[where] = np.asarray(new)[chosen]
        return old

    return jax.tree.map(replace, old, new)


def _solved(
    problem: Problem,
    segment: Segment,
    state: LayerState,
    k: int,
    path: _Path,
    solution: LsmrSolution,
    dx: np.ndarray,
    waiting: bool,
) -> _Path:
    n = int(np.prod(segment.input.shape))
    x, pulled, residual = np.asarray(solution.x[k]), dx[k], float(solution.residual[k])
    seen: np.ndarray | None = np.ones(segment.input.shape)
    rank: int | None = n
    condition: float | None = lsmr_condition(solution, k)
    anchor = path.anchor
    if anchor is not None or (waiting and solution.lost[k] > NULL_SPACE):
        rank, seen = (n, seen) if solution.lost[k] <= NULL_SPACE else (None, None)
        position = problem.chain.segments.index(segment)
        anchor = anchor or _Anchor(position, path.x, path.dx, float(state.noise[k]))
    elif problem.solver == "dense" or not (solution.lost[k] <= NULL_SPACE and condition < ILL_CONDITIONED):
        dense = _dense(problem, segment, state, k, path.victim)
        if dense is None:
            rank, seen = (n, seen) if solution.lost[k] <= NULL_SPACE else (None, None)
        else:
            dz, answer = dense
            rank, condition, seen = answer.rank, answer.condition, answer.seen.reshape(segment.input.shape)
            if problem.solver == "dense" or answer.residual <= max(2 * residual, 1e-12) or rank == n:
                x, residual = answer.x.reshape(segment.input.shape).astype(x.dtype), answer.residual
                pulled = pull_back_cotangent(segment, problem.variables, x, dz)
    info = _info(problem, segment.name, n, rank, condition, residual, int(solution.steps[k]))
    return dataclasses.replace(
        path,
        x=x,
        dx=pulled,
        noise=_noise(problem, x, residual),
        layers=(info, *path.layers),
        seen=seen,
        anchor=anchor,
    )


def _pull(problem: Problem, monitor: Monitor, position: int, path: _Path) -> _Path:
    """Solve a waiting layer's constraints, pulled back to the segment at `position`, where the path has one.

    Left waiting, one segment deeper, where they still leave directions open.
    """
    anchor = path.anchor
    if anchor is None or anchor.position == position:
        return path
    segments = problem.chain.segments[position : anchor.position + 1]
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
        rank, seen = _pulled_rank(problem, segments, given, x) if matched else (None, None)
    depth, condition = len(segments) - 1, lsmr_condition(found.probe)
    layers = [
        _pulled_info(info, k, condition, residual, matched) if k <= depth else info
        for k, info in enumerate(path.layers)
    ]
    if matched and rank != n:
        deficiency = None if rank is None else rank - n
        layers[0] = dataclasses.replace(layers[0], rank=rank, rank_deficiency=deficiency, status="deficient")
    layers[0] = dataclasses.replace(layers[0], steps=found.steps)
    noise = _noise(problem, x, residual)
    return dataclasses.replace(
        path, x=x, dx=np.asarray(found.dx), noise=noise, layers=tuple(layers), seen=seen, anchor=None
    )


def _pulled_info(info: LayerInfo, depth: int, condition: float, residual: float, matched: bool) -> LayerInfo:
    own = info.rank == info.unknowns
    status = "failed" if not matched else "determined" if own else "pulled_back"
    return dataclasses.replace(
        info, condition=condition, residual=residual, pull_back_depth=0 if own else depth, status=status
    )


def _pulled_rank(
    problem: Problem, segments: Sequence[Segment], given: Known, x: np.ndarray
) -> tuple[int | None, np.ndarray | None]:
    """Rank of the pulled-back Jacobian at x and each entry's share in its row space; None where it is too large."""
    if x.size > DENSE_SIDE or not fits_in_memory(4 * 8 * x.size**2):
        return None, None
    values, vectors = np.linalg.eigh(gram(problem, segments, given, x))
    kept = values > 1e-13 * values[-1]
    return int(np.sum(kept)), np.clip(np.sum(vectors[:, kept] ** 2, axis=1), 0.0, 1.0).reshape(x.shape)


def _dense(
    problem: Problem, segment: Segment, state: LayerState, k: int, victim: int
) -> tuple[np.ndarray, DenseSolution] | None:
    rows, columns = _matrix_shape(problem, segment)
    large = min(rows, columns) > DENSE_SIDE or not fits_in_memory(dense_bytes(rows, columns))
    if problem.solver == "lsmr" or (problem.solver == "auto" and large):
        return None
    dz, matrix, vector = dense_system(problem, segment, state, k, victim)
    used = np.any(matrix != 0, axis=1)
    return dz, solve_dense(matrix[used], vector[used], tolerance=_rank_tolerance(problem, matrix.shape))


def _matrix_shape(problem: Problem, segment: Segment) -> tuple[int, int]:
    rows = int(np.prod(segment.output.shape)) + sum(problem.gradients[p][0].size for p in segment.paths)
    return rows, int(np.prod(segment.input.shape))


def _check_memory(problem: Problem, size: int) -> None:
    """Refuse, before anything is compiled, what this machine's memory cannot hold."""
    itemsize = np.dtype(problem.dtype).itemsize
    for segment in problem.chain.segments[:-1]:
        rows, columns = _matrix_shape(problem, segment)
        if problem.solver == "dense":
            needed, remedy = dense_bytes(rows, columns), 'the matrix-free solver="lsmr" (--solver lsmr)'
        else:
            needed = 12 * min(workers() * size, 2 * problem.victims) * itemsize * segment.work
            remedy = f"a chunk below {size} victims" if size > 1 else "a machine with more memory"
        if not fits_in_memory(needed):
            raise InputError(
                f"layer {segment.name!r} would take {needed:,} bytes of memory, more than this machine has free; "
                f"use {remedy}"
            )


def _rank_tolerance(problem: Problem, shape: tuple[int, ...]) -> float:
    return max(max(shape) * float(np.finfo(problem.dtype).eps), 10 * problem.noise)


def _noise(problem: Problem, x: np.ndarray, residual: float) -> float:
    """Absolute level under which an entry of x may be rounding."""
    return 30 * max(residual if residual < 1e-3 else 0.0, problem.rounding, 3e-12) * float(np.sqrt(np.mean(x**2)))


def _tolerance(problem: Problem, residual: float) -> float:
    """Relative tolerance of a layer's solve: well below the misfit that the layer after it left, and no lower."""
    share = EXACT_SHARE if problem.noise < 1e-12 else NOISY_SHARE
    return float(np.clip(share * residual, problem.tolerance, 1e-7))


def _info(
    problem: Problem, name: str, unknowns: int, rank: int | None, condition: float | None, residual: float, steps: int
) -> LayerInfo:
    fitting = "determined" if rank == unknowns else "deficient"
    status = "failed" if residual > problem.matched else fitting
    deficiency = None if rank is None else rank - unknowns
    return LayerInfo(name, unknowns, rank, deficiency, condition, residual, 0, steps, status)


def _possible(problem: Problem, segment: Segment, paths: list[_Path]) -> list[_Path]:
    """Drop a victim's paths whose x_{i+1} the activation cannot give, where it has others (a head's wrong sign)."""
    if len({path.victim for path in paths}) == len(paths):
        return paths
    low, high = segment.activation.reach(problem.variables, problem.dtype)

    def outside(path: _Path) -> bool:
        beyond = max(low - float(path.x.min()), float(path.x.max()) - high)
        return path.anchor is None and beyond > 1e-2 * float(np.sqrt(np.mean(path.x**2)))

    good = {path.victim for path in paths if not outside(path)}
    return [path for path in paths if path.victim not in good or not outside(path)]


def _prune(problem: Problem, paths: list[_Path]) -> list[_Path]:
    """Drop a victim's paths that fit a layer far worse than its best one."""
    kept = []
    for path in paths:
        best = np.nanmin([p.layers[0].residual for p in paths if p.victim == path.victim] + [np.inf])
        if path.anchor is not None or path.layers[0].residual <= max(1e3 * best, problem.matched):
            kept.append(path)
    return kept


def _outcomes(problem: Problem, paths: list[_Path]) -> list[Outcome]:
    residuals = _gradient_residuals(problem, paths)
    low, high = problem.input_range
    slack = 5e-3 * (high - low)
    outcomes = []
    for victim in range(problem.victims):
        mine = [(r, p) for r, p in zip(residuals, paths, strict=True) if p.victim == victim]
        inside = [(r, p) for r, p in mine if p.x.min() >= low - slack and p.x.max() <= high + slack]
        mine = sorted(inside or mine, key=lambda pair: pair[0])
        best = mine[0][0] if mine else np.inf
        mine = [pair for pair in mine if pair[0] <= max(10 * best, problem.matched)]
        candidates = tuple(Candidate(p.x[0], p.label, float(r)) for r, p in mine)
        outcomes.append(Outcome(candidates, mine[0][1].layers if mine else (), _seen(mine[0][1]) if mine else None))
    return outcomes


def _seen(path: _Path) -> np.ndarray | None:
    later = [info.status for info in path.layers[1:]]
    whole = all(status in ("determined", "pulled_back") for status in later) and path.layers[0].status != "failed"
    return path.seen[0] if whole and path.seen is not None else None


def _gradient_residuals(problem: Problem, paths: list[_Path]) -> list[float]:
    """||g(x) - g|| / ||g|| of every path, through the chain of segments."""
    gradient = _gradient_of(problem.chain, problem.loss)
    residuals = []
    for path in paths:
        found = gradient(dict(problem.variables), jnp.asarray(path.x, problem.dtype), jnp.asarray(path.label))
        given = {p: problem.gradients[p][path.victim] for p in found}
        error = np.sqrt(sum(np.sum((np.asarray(found[p]) - given[p]) ** 2) for p in found))
        residuals.append(float(error / np.sqrt(sum(np.sum(g**2) for g in given.values()))))
    return residuals


@functools.lru_cache(maxsize=32)
def _gradient_of(chain: Chain, loss: str) -> Any:
    """(variables, x, label) -> {path: dL/dtheta}, by the same segments that the layers are solved with."""
    segments = chain.segments

    def gradient(variables: Any, x: Any, label: Any) -> Any:
        xs, zs, slopes = push_forward(segments, variables, x)
        dz = loss_pull(segments[-1], variables, loss, zs[-1], label)
        return pull_gradients(segments, variables, xs, slopes, dz)[0]

    return jax.jit(gradient)
