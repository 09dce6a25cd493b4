"""The first step of every path: what the head's gradient says of its input."""

import numpy as np

from leakjax.attacks.heads.batch import examples_shown, fits, read_dense_head, separate_examples
from leakjax.attacks.heads.labelings import labelings
from leakjax.attacks.heads.single import read_head
from leakjax.attacks.heads.wanted import Wanted
from leakjax.attacks.layerwise.path import Path, layer_info, noise_level
from leakjax.attacks.layerwise.ranks import head_rank
from leakjax.attacks.layerwise.system import pull_back_cotangent, pull_back_cotangents
from leakjax.attacks.problem import Monitor, Problem
from leakjax.errors import InputError, UnreadableModelError
from leakjax.runtime.devices import solved_together
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import lsmr_condition

LABELINGS = 8
_COUNT = (
    "the last layer's gradient has rank {shown}: {shown} examples or more stand behind it, or noise, and not {told}; "
    "give examples={shown} (--batch-size {shown}), or the noise"
)
_FEWER = " (its rank is {shown}: the gradient holds {shown} examples that differ, or fewer outputs than examples)"


def start(problem: Problem, monitor: Monitor, head: Segment, *, ranked: bool = True) -> list[Path]:
    """All paths of all victims; raises `InputError` where a batch's head does not separate its examples.

    Unless `ranked`, the rank of a head with a null space is not asked for: where labels alone are wanted of it.
    Where a head's gradient is of another number of examples than was told, the monitor hears of it.
    """
    return _of_one(problem, monitor, head, ranked) if problem.examples == 1 else _of_batches(problem, monitor, head)


def _of_one(problem: Problem, monitor: Monitor, head: Segment, ranked: bool) -> list[Path]:
    """Victims are read `chunk` at a time, as their layers are: what a victim gives does not depend on its company."""
    size = solved_together(problem.victims, problem.chunk, ())
    paths = [path for first in range(0, problem.victims, size) for path in _of_some(problem, head, first, size, ranked)]
    misfits = sorted({path.victim for path in paths if path.layers[0].status == "failed"})
    dense = read_dense_head(head, problem.variables, problem.loss) if misfits else None
    for victim in misfits if dense else []:
        assert dense is not None
        mine = {p: problem.gradients[p][victim] for p in head.paths}
        shown = examples_shown(dense, mine, problem.tolerances.rounding)
        if shown > 1:
            monitor.reasons[victim] = _COUNT.format(shown=shown, told=1)
            if shown < min(dense.where.shape):
                monitor.several.add(victim)
    return paths


def _of_some(problem: Problem, head: Segment, first: int, size: int, ranked: bool) -> list[Path]:
    victims = np.minimum(np.arange(first, first + size), problem.victims - 1)
    wanted = Wanted.of(problem, list(victims))
    reading = read_head(
        head,
        problem.variables,
        {p: np.asarray(problem.gradients[p][victims], problem.dtype) for p in head.paths},
        problem.loss,
        wanted=wanted,
        tolerance=problem.tolerances.solve,
        accept=problem.tolerances.matched,
        count=min(size, problem.victims - first),
    )
    paths, pulled = [], pull_back_cotangents(head, problem.variables, [(c.x, c.dz) for c in reading.candidates], size)
    for candidate, dx in zip(reading.candidates, pulled, strict=True):
        v = candidate.victim
        read = wanted.classes and problem.target(first + v) is not None
        if read and any(path.victim == first + v for path in paths):
            continue  # every label is as wrong
        lost, residual = float(reading.solution.lost[v]), float(reading.solution.residual[v])
        condition, rank, seen = lsmr_condition(reading.solution, v), candidate.x.size, np.ones(candidate.x.shape)
        if lost > problem.tolerances.probe:
            rank, seen = head_rank(problem, head, candidate.dz) if ranked else (None, None)
        info = layer_info(
            problem, head.name, candidate.x.size, rank, condition, residual, int(reading.solution.steps[v])
        )
        noise = noise_level(problem, candidate.x, residual)
        target = problem.target(first + v)
        target = candidate.target if target is None else target
        tags = np.array([candidate.label]) if target is None else target[None]
        paths.append(Path(victim=first + v, labels=tags, x=candidate.x, dx=dx, noise=noise, layers=(info,), seen=seen))
    return paths


def _of_batches(problem: Problem, monitor: Monitor, head: Segment) -> list[Path]:
    outputs = int(np.prod(head.output.shape[1:]))
    remedy = 'use attack="match" (--attack match), or a smaller batch'
    dense = read_dense_head(head, problem.variables, problem.loss)
    if dense is None:
        raise UnreadableModelError(f"the last layer is not dense: its gradient mixes the examples of a batch; {remedy}")
    if not fits(dense):
        raise InputError(f"separating {problem.examples} examples takes more memory than this machine has; {remedy}")
    paths, separable, ranks = [], False, []
    for v in range(problem.victims):
        found = separate_examples(
            dense,
            problem.variables,
            {p: problem.gradients[p][v] for p in head.paths},
            problem.loss,
            labelings=labelings(problem, v, LABELINGS),
            rounding=problem.tolerances.rounding,
            accept=problem.tolerances.matched,
        )
        separable |= found is not None
        if not found:
            shown = examples_shown(dense, {p: problem.gradients[p][v] for p in head.paths}, problem.tolerances.rounding)
            ranks.append(shown)
            if shown > problem.examples:
                monitor.reasons[v] = _COUNT.format(shown=shown, told=problem.examples)
        for one in found or []:
            rank = one.x.size if np.isfinite(one.condition) else None
            info = layer_info(problem, head.name, one.x.size, rank, one.condition, one.residual, 0)
            dz = (one.dz / problem.examples).reshape(head.output.shape).astype(problem.dtype)
            x = one.x.astype(problem.dtype)
            dx = pull_back_cotangent(head, problem.variables, x, dz)
            noise = noise_level(problem, x, one.condition * one.residual)
            weights = None if np.all(one.weights == 1.0) else one.weights
            paths.append(
                Path(
                    victim=v,
                    labels=one.labels,
                    x=x,
                    dx=dx,
                    noise=noise,
                    layers=(info,),
                    seen=np.ones(x.shape),
                    weights=weights,
                )
            )
    if not separable:
        raise InputError(
            f"the last layer's gradient does not separate the {problem.examples} examples behind it: it has {outputs} "
            f"outputs and must have more than there are examples, no two of them alike"
            f"{_FEWER.format(shown=max(ranks))}; {remedy}"
        )
    return paths
