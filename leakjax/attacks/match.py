"""Second-order gradient matching over whole batches: Levenberg-Marquardt on the gradient's own residual.

    r(x) = (d/dtheta (1/B) sum_b loss(model(x_b), y_b) - g) / ||g||, parameter by parameter

from noise, several starts at once, labels recovered as counts. The peers match by first-order descent (DLG, Zhu et al.
2019; Geiping et al. 2020); full Gauss-Newton steps reach machine precision where the gradient determines the batch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from leakjax.attacks.gradient_residual import OUTER, Compare, dense_rows, match_programs
from leakjax.attacks.labelings import labelings
from leakjax.attacks.outcomes import kept, split
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.attacks.ranks import DENSE_SIDE, NULL_SPACE
from leakjax.attacks.recursion import follow
from leakjax.attacks.symmetries import twins
from leakjax.attacks.told import Told, predicted, tell
from leakjax.errors import InputError
from leakjax.memory import fits_in_memory
from leakjax.priors import from_natural
from leakjax.reconstruction import LayerInfo
from leakjax.solvers.dense_newton import Rows, dense_levenberg_marquardt
from leakjax.solvers.linear import LsmrSolution, lsmr_condition

TRIALS, KINKED_TRIALS = 8, 2  # labelings and fresh starts of each, tried until one matches; smoothing takes long
NEAR = 1e-2  # ||r|| / size of a layer-wise answer that may be another candidate
FINE = 1e-8  # forcing where noise keeps the rows from falling
SPREADS = (0.1, 0.3)  # standard deviation of the starts' noise, in turn, relative to the input range
SMOOTH_SPREADS = (1e-3, 0.1)  # of smooth noise


class _Found(NamedTuple):
    """x (B, ...), its labels, ||r|| / size, and the LSMR (or dense) steps spent."""

    x: np.ndarray
    labels: np.ndarray
    residual: float
    steps: int


class _Start(NamedTuple):
    """Where a solve begins: starts (S, B, ...) with their labels (B,), whether smoothing may help it, a name; whether
    it is an answer of the layers already."""

    xs: np.ndarray
    labels: np.ndarray
    smoothed: bool
    name: str
    layerwise: bool = False


def match(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """Match every victim's gradient; any number of examples a gradient, any differentiable model.

    From noise; a readable model also from the layer-wise answers, first where it has kinks and for batches: there all
    of those that match are candidates.
    Returns an `Outcome` an example, in groups of one gradient each.
    """
    if problem.solver == "dense":
        _check_memory(problem)
    found = []
    for victim in range(problem.victims):
        trials: list[_Found] = []
        told = tell(problem, victim)
        for start in _order(problem, monitor, victim):
            done = any(t.residual <= told.matched for t in trials)
            if done and not start.layerwise:
                break
            if done and not _misfit(problem, told, start.labels, start.xs[0]) <= max(NEAR, told.matched):
                continue
            monitor.tell(f"matching gradient {victim} from {start.name}, labels {start.labels.tolist()}")
            solve = _solve_densely if problem.solver == "dense" else _solve
            trials.append(solve(problem, monitor, told, start))
        monitor.tell(f"looking at gradient {victim}")
        found += _outcomes(problem, told, sorted(trials, key=lambda t: np.nan_to_num(t.residual, nan=np.inf)))
    return found


def _check_memory(problem: Problem) -> None:
    """Refuse dense steps, before anything is compiled, where their matrices do not fit."""
    n = int(np.prod(problem.batch_shape))
    needed = 8 * (2 * n * sum(g[0].size for g in problem.gradients.values()) + 4 * n**2)
    if not fits_in_memory(needed):
        raise InputError(
            f"solver 'dense' would take {needed:,} bytes of memory for {n} unknowns, more than this machine has free; "
            'use the matrix-free solver="lsmr" (--solver lsmr)'
        )


def _order(problem: Problem, monitor: Monitor, victim: int) -> Iterator[_Start]:
    """All starts of one victim in the order in which they are tried; made when they are asked for."""
    rounded = problem.defense is not None and problem.defense.name in ("qsgd", "sign", "soteria", "top_k")
    kinked, layers = problem.network.has_kinks, problem.chain is not None and not rounded
    first = kinked or problem.examples > 1
    if layers and first:
        yield from _layerwise(problem, monitor, victim)
    choices = labelings(problem, victim, TRIALS)
    order = sorted(itertools.product(range(len(choices)), range(TRIALS)), key=sum)
    for turn, (choice, attempt) in enumerate(order[: KINKED_TRIALS if kinked else TRIALS]):
        yield _Start(_noise(problem, attempt), choices[choice], kinked, f"noise {attempt}")
        if turn == 1 and layers and not first:
            yield from _layerwise(problem, monitor, victim)


def _layerwise(problem: Problem, monitor: Monitor, victim: int) -> Iterator[_Start]:
    """What `copa` finds for this victim alone, an update taken for its steps' mean gradient; nothing where the model
    has no head to start from."""
    alone = dataclasses.replace(
        problem,
        gradients={p: g[victim : victim + 1] / problem.local_steps for p, g in problem.gradients.items()},
        labels=None if problem.labels is None else problem.labels[victim : victim + 1],
        local_steps=1,
        defense=None,
    )
    try:
        paths = follow(alone, monitor, pulling=True)
    except InputError:
        return
    for path in paths:
        if np.all(np.isfinite(path.x)):
            yield _Start(path.x[None], path.labels, False, "the layer-wise answer", layerwise=True)


def _compare(problem: Problem, told: Told) -> Compare:
    return Compare(predicted(problem), problem.input_range, told.signs)


def _given(problem: Problem, told: Told, labels: np.ndarray, *, prior: bool = False) -> tuple[Any, Any, Any]:
    """What the compiled programs take before x: weights, what was sent, labels."""
    sent = told.sent if prior else told.sent._replace(prior=None)
    return dict(problem.variables), sent, jnp.asarray(labels)


def _noise(problem: Problem, attempt: int) -> np.ndarray:
    """(S, B, ...): the middle of the range, disturbed; smoothly, and little at first, for dense steps."""
    low, high = problem.input_range
    noise = np.random.default_rng(attempt).normal(size=(problem.starts, *problem.batch_shape))
    if problem.solver == "dense":
        noise = np.stack([from_natural(jnp.asarray(one)) for one in noise])
    spread = (SMOOTH_SPREADS if problem.solver == "dense" else SPREADS)[attempt % len(SPREADS)] * (high - low)
    return (0.5 * (low + high) + spread * noise).astype(problem.dtype)


def _solve_densely(problem: Problem, monitor: Monitor, told: Told, start: _Start) -> _Found:
    """From each of the starts until one matches."""
    rows, given = dense_rows(_compare(problem, told)), _given(problem, told, start.labels, prior=told.noisy)
    trials = []
    for first in start.xs:
        here = jnp.asarray(first)
        solution = dense_levenberg_marquardt(
            Rows(*(functools.partial(function, *given, here) for function in rows)),
            np.zeros(here.size, problem.dtype),
            size=float(np.sqrt(len(problem.gradients))),
            tolerance=10 * float(problem.tolerance),
            max_steps=OUTER,
            tell=monitor.tell,
        )
        x = np.asarray(here + from_natural(jnp.asarray(solution.x.reshape(here.shape))))
        residual = _misfit(problem, told, start.labels, x) if told.noisy else solution.residual
        trials.append(_Found(x, start.labels, residual, solution.steps))
        if residual <= told.matched:
            break
    return min(trials, key=lambda trial: np.nan_to_num(trial.residual, nan=np.inf))


def _solve(problem: Problem, monitor: Monitor, told: Told, start: _Start) -> _Found:
    """With the prior first, where there is one; without it afterwards, unless noise remains."""
    forcing = {"forcing": FINE} if told.noisy else {}
    solve, smooth, *_ = match_programs(_compare(problem, told), float(problem.tolerance), **forcing)
    held = told.sent.prior is not None
    given = _given(problem, told, start.labels, prior=held)
    starts = jnp.asarray(start.xs, problem.dtype)
    solution = solve(*given, starts)
    steps = int(jnp.sum(solution.inner_steps))
    if not float(jnp.nanmin(solution.residual)) <= told.matched and start.smoothed:
        blurred = smooth(*given, starts)
        again = solve(*given, blurred.x)
        steps += int(jnp.sum(blurred.inner_steps) + jnp.sum(again.inner_steps))
        solution = again if float(jnp.nanmin(again.residual)) < float(jnp.nanmin(solution.residual)) else solution
    if held and not told.noisy:
        solution = solve(*_given(problem, told, start.labels), solution.x)
        steps += int(jnp.sum(solution.inner_steps))
    best = int(np.argmin(np.nan_to_num(np.asarray(solution.residual), nan=np.inf)))
    x, residual = np.asarray(solution.x[best]), float(solution.residual[best])
    return _Found(x, start.labels, _misfit(problem, told, start.labels, x) if told.noisy else residual, steps)


def _misfit(problem: Problem, told: Told, labels: np.ndarray, x: np.ndarray) -> float:
    """||r|| / size, without a prior."""
    misfit = match_programs(_compare(problem, told), float(problem.tolerance))[3]
    return float(misfit(*_given(problem, told, labels), jnp.asarray(x)))


def _outcomes(problem: Problem, told: Told, trials: list[_Found]) -> list[Outcome]:
    """One example each: candidates inside the range, and the whole batch as the one "layer" that was solved.

    `trials`, best first: the others that match are candidates too, and so are the twins of each. What is certified is
    said of the answer that comes first.
    """
    n = trials[0].x.size
    matching = [trial for trial in trials if trial.residual <= told.matched]
    ranks = [_local_rank(problem, told, trial) for trial in matching] or [(None, None, None)]
    whole = bool(matching) and all(rank == n for rank, _, _ in ranks)
    answers = []
    for k, trial in enumerate(matching or trials[:1]):
        answers.append((trial.x, trial.labels, trial.residual, k))
        if matching:
            given = problem.variables, trial.x, trial.labels, problem.matched
            pairs = twins(problem.network.logits, predicted(problem), problem.loss, *given)
            answers += [(images, tags, trial.residual, k) for images, tags in pairs]
    answers = kept(problem, answers, lambda answer: answer[0], whole=whole)
    if whole and not problem.in_range(answers[0][0]):
        answers = answers[:1]
    rank, seen, condition = ranks[answers[0][3]]
    status = "failed" if not matching else "determined" if rank == n else "deficient"
    deficiency = None if rank is None else rank - n
    steps = sum(trial.steps for trial in trials)
    info = LayerInfo("network", n, rank, deficiency, condition, answers[0][2], 0, steps, status)
    images = split([answer[:3] for answer in answers])
    return [Outcome(mine, (info,), None if seen is None else seen[b]) for b, mine in enumerate(images)]


def _local_rank(problem: Problem, told: Told, found: _Found) -> tuple[int | None, np.ndarray | None, float]:
    """Rank of d r / d x at x, each entry's share in its row space, and its condition."""
    _, _, look, _, gram = match_programs(_compare(problem, told), float(problem.tolerance))
    given = *_given(problem, told, found.labels), jnp.asarray(found.x)
    probe: LsmrSolution = look(*given)
    condition, n = lsmr_condition(probe), found.x.size
    if float(probe.lost) <= NULL_SPACE:
        return n, np.ones(found.x.shape), condition
    single = np.dtype(problem.dtype) != np.float64  # squares of small singular values drown in its rounding
    if single or n > DENSE_SIDE or not fits_in_memory(4 * 8 * n**2):
        return None, None, condition
    values, vectors = np.linalg.eigh(np.asarray(gram(*given)))
    large = values > 1e-13 * values[-1]
    seen = np.clip(np.sum(vectors[:, large] ** 2, axis=1), 0.0, 1.0).reshape(found.x.shape)
    condition = float(np.sqrt(values[-1] / values[large][0]))
    return int(np.sum(large)), seen, condition
