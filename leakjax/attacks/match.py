"""Second-order gradient matching over whole batches: Levenberg-Marquardt on the gradient's own residual.

    r(x) = (d/dtheta (1/B) sum_b loss(model(x_b), y_b) - g) / ||g||, parameter by parameter

from noise, several starts at once, labels recovered as counts. The peers match by first-order descent (DLG, Zhu et al.
2019; Geiping et al. 2020); full Gauss-Newton steps reach machine precision where the gradient determines the batch.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.attacks.ranks import DENSE_SIDE, NULL_SPACE
from leakjax.attacks.symmetries import twins
from leakjax.labels import rank_labels
from leakjax.memory import fits_in_memory
from leakjax.network import batch_gradient
from leakjax.reconstruction import Candidate, LayerInfo
from leakjax.solvers.gauss_newton import levenberg_marquardt
from leakjax.solvers.linear import LsmrSolution, lsmr_condition, solve_side

OUTER, INNER = 80, 3000
TRIALS = 8  # labelings and fresh starts of each, tried until one matches
SPREADS = (0.1, 0.3)  # standard deviation of the starts' noise, in turn, relative to the input range


class _Found(NamedTuple):
    """x (B, ...), its labels, ||r|| / size, and the LSMR steps spent."""

    x: np.ndarray
    labels: np.ndarray
    residual: float
    steps: int


def match(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """Match every victim's gradient from noise; any number of examples a gradient, any differentiable model.

    Returns an `Outcome` an example, in groups of one gradient each.
    """
    found = []
    for victim in range(problem.victims):
        best: _Found | None = None
        labelings = _labelings(problem, victim)
        order = sorted(itertools.product(range(len(labelings)), range(TRIALS)), key=sum)
        steps = 0
        for choice, attempt in order[:TRIALS]:
            labels = labelings[choice]
            monitor.tell(f"matching gradient {victim}, labels {labels.tolist()}, start {attempt}")
            trial = _solve(problem, victim, labels, attempt)
            steps += trial.steps
            best = trial if best is None or trial.residual < best.residual else best
            if best.residual <= problem.matched:
                break
        assert best is not None
        best = best._replace(steps=steps)
        monitor.tell(f"looking at gradient {victim}")
        found += _outcomes(problem, victim, best)
    return found


def _labelings(problem: Problem, victim: int) -> list[np.ndarray]:
    if problem.labels is not None:
        return [problem.labels[victim]]
    gradient = _gradient(problem)
    sent = {p: problem.gradients[p][victim] for p in problem.gradients}
    return rank_labels(
        problem.network, gradient, problem.variables, sent, problem.batch_shape, problem.input_range, TRIALS
    )


def _gradient(problem: Problem) -> Any:
    return batch_gradient(problem.network, problem.loss, tuple(problem.gradients))


def _starts(problem: Problem, attempt: int) -> np.ndarray:
    """(S, B, ...): the middle of the range, disturbed."""
    low, high = problem.input_range
    noise = np.random.default_rng(attempt).normal(size=(problem.starts, *problem.batch_shape))
    spread = SPREADS[attempt % len(SPREADS)] * (high - low)
    return (0.5 * (low + high) + spread * noise).astype(problem.dtype)


def _solve(problem: Problem, victim: int, labels: np.ndarray, attempt: int) -> _Found:
    solve, _, _ = _programs(_gradient(problem), float(problem.tolerance))
    sent = {p: jnp.asarray(problem.gradients[p][victim]) for p in problem.gradients}
    starts = jnp.asarray(_starts(problem, attempt))
    solution = solve(dict(problem.variables), sent, jnp.asarray(labels), starts)
    best = int(np.nanargmin(np.asarray(solution.residual)))
    x, residual = np.asarray(solution.x[best]), float(solution.residual[best])
    return _Found(x, labels, residual, int(jnp.sum(solution.inner_steps)))


def _outcomes(problem: Problem, victim: int, found: _Found) -> list[Outcome]:
    """One example each: candidates inside the range, and the whole batch as the one "layer" that was solved."""
    x, labels, residual = found.x, found.labels, found.residual
    n, matched = x.size, residual <= problem.matched
    rank, seen, condition = _local_rank(problem, victim, found) if matched else (None, None, None)
    status = "failed" if not matched else "determined" if rank == n else "deficient"
    deficiency = None if rank is None else rank - n
    info = LayerInfo(
        "network",
        n,
        rank,
        deficiency,
        condition,
        residual,
        0,
        found.steps,
        status,
    )
    low, high = problem.input_range
    slack = 5e-3 * (high - low)
    others = []
    if matched:
        pairs = twins(problem.network, _gradient(problem), problem.loss, problem.variables, x, labels, problem.matched)
        others = [(a, tags) for a, tags in [(x, labels), *pairs] if a.min() >= low - slack and a.max() <= high + slack]
    others = others or [(x, labels)]
    outcomes = []
    for b in range(len(x)):
        candidates = [Candidate(others[0][0][b], int(others[0][1][b]), residual)]
        for a, tags in others[1:]:
            if not np.array_equal(a[b], others[0][0][b]):
                candidates.append(Candidate(a[b], int(tags[b]), residual))
        outcomes.append(Outcome(tuple(candidates), (info,), None if seen is None else seen[b]))
    return outcomes


def _local_rank(problem: Problem, victim: int, found: _Found) -> tuple[int | None, np.ndarray | None, float]:
    """Rank of d g / d x at x, each entry's share in its row space, and its condition."""
    _, look, gram = _programs(_gradient(problem), float(problem.tolerance))
    sent = {p: jnp.asarray(problem.gradients[p][victim]) for p in problem.gradients}
    given = dict(problem.variables), sent, jnp.asarray(found.labels), jnp.asarray(found.x)
    probe: LsmrSolution = look(*given)
    condition, n = lsmr_condition(probe), found.x.size
    if float(probe.lost) <= NULL_SPACE:
        return n, np.ones(found.x.shape), condition
    if n > DENSE_SIDE or not fits_in_memory(4 * 8 * n**2):
        return None, None, condition
    values, vectors = np.linalg.eigh(np.asarray(gram(*given)))
    kept = values > 1e-13 * values[-1]
    seen = np.clip(np.sum(vectors[:, kept] ** 2, axis=1), 0.0, 1.0).reshape(found.x.shape)
    condition = float(np.sqrt(values[-1] / values[kept][0]))
    return int(np.sum(kept)), seen, condition


@functools.lru_cache(maxsize=16)
def _programs(gradient: Any, tolerance: float) -> Any:
    """Compiled: the solve from several starts, the probe of the Jacobian at x, and its Gram matrix."""

    def residual(variables: Any, sent: Any, labels: Any) -> Any:
        over = jax.tree.map(lambda g: 1.0 / jnp.maximum(jnp.linalg.norm(g), jnp.finfo(g.dtype).tiny), sent)

        def function(x: Any) -> Any:
            return jax.tree.map(lambda w, g, s: w * (g - s), over, gradient(variables, x, labels), sent)

        return function, jnp.sqrt(float(len(sent)))

    def solve(variables: Any, sent: Any, labels: Any, starts: Any) -> Any:
        function, size = residual(variables, sent, labels)

        def one(start: Any) -> Any:
            return levenberg_marquardt(
                function, start, size=size, tolerance=10 * tolerance, max_steps=OUTER, max_inner=INNER
            )

        if len(starts) == 1:
            return jax.tree.map(lambda a: a[None], one(starts[0]))
        return jax.vmap(one)(starts)

    def look(variables: Any, sent: Any, labels: Any, x: Any) -> Any:
        rows, tangent = jax.linearize(residual(variables, sent, labels)[0], x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return solve_side(operator, rows, jnp.asarray(True), tolerance=tolerance, max_steps=2 * INNER)

    def gram(variables: Any, sent: Any, labels: Any, x: Any) -> Any:
        _, tangent = jax.linearize(residual(variables, sent, labels)[0], x)
        adjoint = jax.linear_transpose(tangent, x)
        columns = jnp.eye(x.size, dtype=x.dtype)
        return jax.lax.map(lambda e: jnp.ravel(adjoint(tangent(e.reshape(x.shape)))[0]), columns, batch_size=16)

    return jax.jit(solve), jax.jit(look), jax.jit(gram)
