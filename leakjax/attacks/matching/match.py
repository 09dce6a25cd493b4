"""Second-order gradient matching over whole batches: Levenberg-Marquardt on the gradient's own residual.

    r(x) = (d/dtheta (1/B) sum_b loss(model(x_b), y_b) - g) / ||g||, parameter by parameter

from noise, several starts at once, labels recovered as counts. The peers match by first-order descent (DLG, Zhu et al.
2019; Geiping et al. 2020); full Gauss-Newton steps reach machine precision where the gradient determines the batch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from leakjax.attacks.adaptive import Told, tell
from leakjax.attacks.heads.labelings import labelings
from leakjax.attacks.heads.targets import shares_positions
from leakjax.attacks.layerwise.recursion import follow, recurse
from leakjax.attacks.matching.label_maps import can_relax, relaxed_maps
from leakjax.attacks.matching.outcome import Found, compare, given, is_open, matched_outcomes, misfit
from leakjax.attacks.matching.residual import OUTER, dense_rows, match_programs
from leakjax.attacks.matching.spans import can_span, spanned
from leakjax.attacks.problem import Labels, Monitor, Outcome, Problem
from leakjax.constraints.priors import from_natural
from leakjax.errors import InputError
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.solvers.dense_newton import Rows, dense_levenberg_marquardt

TRIALS, KINKED_TRIALS = 8, 2  # labelings and fresh starts of each, tried until one matches; smoothing takes long
NEAR = 1e-2  # ||r|| / size of a layer-wise answer that may be another candidate
MAP_TRIALS = 2  # starts of an image whose label map is unknown: dense steps, beside which its match costs little
AGAIN, AGAIN_LARGE = 3, 1  # starts beyond the first that matches, where another answer may be as good
FEW = 1000  # unknowns, above which such starts cost too much for more than one
FINE = 1e-8  # forcing where noise keeps the rows from falling
SPREADS = (0.1, 0.3)  # standard deviation of the starts' noise, in turn, relative to the input range
SMOOTH_SPREADS = (1e-3, 0.1)  # of smooth noise


class _Start(NamedTuple):
    """Where a solve begins: starts (S, B, ...) with their labels (B,), whether smoothing may help it, a name; whether
    it is an answer of the layers already; whether its labels are a map that was found beside it; the condition of a
    system of its own that determines it, None where there is none."""

    xs: Float[np.ndarray, "S B ..."]
    labels: Labels
    smoothed: bool
    name: str
    layerwise: bool = False
    mapped: bool = False
    condition: float | None = None


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
        told = tell(problem, victim)
        try:
            trials = _trials(problem, monitor, told, victim)
        except InputError:
            raise
        except (ValueError, np.linalg.LinAlgError, ArithmeticError) as error:  # one client's numbers, not the others'
            words = f"its numbers cannot be worked with ({str(error).splitlines()[0]}): look at the gradient's entries"
            found += [Outcome((), (), None, reason=words)] * problem.examples
            continue
        monitor.tell(f"looking at gradient {victim}")
        found += matched_outcomes(problem, told, sorted(trials, key=lambda t: np.nan_to_num(t.residual, nan=np.inf)))
    return found


def _trials(problem: Problem, monitor: Monitor, told: Told, victim: int) -> list[Found]:
    """Answers from one start after another, until one matches and what may be others have been looked for."""
    trials: list[Found] = []
    near, more = max(NEAR, told.matched), None
    for start in _order(problem, monitor, victim):
        images = [t for t in trials if t.residual <= told.matched and _may_be_an_image(problem, told, t)]
        if images and not start.layerwise:
            more = _more_starts(problem, monitor, told, victim, images[0]) if more is None else more - 1
            if more <= 0:
                break
        if images and start.layerwise and not misfit(problem, told, start.labels, start.xs[0]) <= near:
            continue
        shown = f"labels {start.labels.tolist()}" if start.labels.ndim == 1 else "its targets"
        monitor.tell(f"matching gradient {victim} from {start.name}, {shown}")
        solve = _solve_densely if problem.solver == "dense" else _solve
        trial = _as_it_is(problem, told, start) or solve(problem, monitor, told, start)
        if start.mapped and not trial.residual <= told.matched:  # beside a wrong map the image moves away
            left = misfit(problem, told, start.labels, start.xs[0])
            trial = Found(start.xs[0], start.labels, left, trial.steps)
        trials.append(trial)
        monitor.tell(f"{start.name}: relative residual {trials[-1].residual:.1e} after {int(trials[-1].steps)} steps")
        if trial.condition is not None:
            break
    return trials


def _as_it_is(problem: Problem, told: Told, start: _Start) -> Found | None:
    """A start that a system of its own determines, where it matches already."""
    if start.condition is None:
        return None
    left = misfit(problem, told, start.labels, start.xs[0])
    return (
        Found(x=start.xs[0], labels=start.labels, residual=left, steps=0, condition=start.condition)
        if left <= told.matched
        else None
    )


def _more_starts(problem: Problem, monitor: Monitor, told: Told, victim: int, trial: Found) -> int:
    """How many starts more after an answer: none where it is proved, or leaves directions open in any case."""
    if is_open(problem, told, trial) or _proved(problem, monitor, victim, trial):
        return 0
    return AGAIN if trial.x.size <= FEW else AGAIN_LARGE


def _may_be_an_image(problem: Problem, told: Told, trial: Found) -> bool:
    """Whether an answer lies in range, or leaves directions open: another point of its set may lie there."""
    return problem.in_range(trial.x) or is_open(problem, told, trial)


def _proved(problem: Problem, monitor: Monitor, victim: int, trial: Found) -> bool:
    """Whether the layers' own systems determine this very image: no other start can end elsewhere.

    Layer by layer, as R-GAP does; where its proof is global it is of the gradient, not of the attack.
    """
    plain = problem.chain is not None and problem.examples == 1 and problem.local_steps == 1 and not problem.defense
    if not plain or problem.target(victim) is not None or shares_positions(problem):
        return False
    try:
        (outcome,) = recurse(problem.alone(victim), monitor, pulling=False)
    except InputError:
        return False
    if outcome.proof != "global" or len(outcome.candidates) != 1 or outcome.layers[0].status != "determined":
        return False
    return bool(np.max(np.abs(outcome.candidates[0].image - trial.x[0])) <= 1e-3 * np.ptp(problem.input_range))


def _check_memory(problem: Problem) -> None:
    """Refuse dense steps, before anything is compiled, where their matrices do not fit."""
    n = int(np.prod(problem.batch_shape))
    rows = sum(g[0].size for g in (*problem.gradients.values(), *problem.statistics.values()))
    needed = 8 * (2 * n * rows + 4 * n**2)
    if not fits_in_memory(needed):
        raise InputError(
            f"solver 'dense' would take {needed:,} bytes of memory for {n} unknowns, more than this machine has free; "
            'use the matrix-free solver="lsmr" (--solver lsmr)'
        )


def _order(problem: Problem, monitor: Monitor, victim: int) -> Iterator[_Start]:
    """All starts of one victim in the order in which they are tried; made when they are asked for."""
    rounded = problem.defense is not None and not problem.defense.server.layers
    kinked, layers = problem.network.has_kinks, problem.chain is not None and not rounded
    layers = layers and not shares_positions(problem)
    if can_relax(problem):
        yield from _with_maps(problem, monitor, victim)
        return
    if can_span(problem):
        yield from _from_spans(problem, monitor, victim)
    first = kinked or problem.examples > 1
    if layers and first:
        yield from _layerwise(problem, monitor, victim)
    choices = labelings(problem, victim, TRIALS)
    order = sorted(itertools.product(range(len(choices)), range(TRIALS)), key=sum)
    for turn, (choice, attempt) in enumerate(order[: KINKED_TRIALS if kinked else TRIALS]):
        yield _Start(_noise(problem, attempt), choices[choice], kinked, f"noise {attempt}")
        if turn == 1 and layers and not first:
            yield from _layerwise(problem, monitor, victim)


def _with_maps(problem: Problem, monitor: Monitor, victim: int) -> Iterator[_Start]:
    """Images with the label maps that were found beside them, rounded."""
    starts = (_noise(problem, attempt) for attempt in range(MAP_TRIALS))
    for found in relaxed_maps(problem, monitor, tell(problem, victim), starts):
        yield _Start(found.x[None], found.classes[None], False, "a relaxed label map", mapped=True)


def _from_spans(problem: Problem, monitor: Monitor, victim: int) -> Iterator[_Start]:
    """The images that the spans of their tokens determine, one by one."""
    found = spanned(problem, monitor, victim)
    if found is not None:
        how = {"layerwise": True, "condition": found.condition}
        yield _Start(found.x[None], found.labels, False, "the spans of its tokens", **how)


def _layerwise(problem: Problem, monitor: Monitor, victim: int) -> Iterator[_Start]:
    """What `copa` finds for this victim alone, an update taken for its steps' mean gradient; nothing where the model
    has no head to start from."""
    alone = problem.alone(victim, local_steps=1, defense=None)
    mean = {p: g / problem.local_steps for p, g in alone.gradients.items()}
    alone = dataclasses.replace(alone, gradients=mean)
    try:
        paths = follow(alone, monitor, pulling=True)
    except InputError:
        return
    for path in paths:
        if np.all(np.isfinite(path.x)):
            yield _Start(path.x[None], path.labels, False, "the layer-wise answer", layerwise=True)


def _noise(problem: Problem, attempt: int) -> Float[np.ndarray, "S B ..."]:
    """(S, B, ...): the middle of the range, disturbed; smoothly, and little at first, for dense steps."""
    low, high = problem.input_range
    noise = np.random.default_rng((attempt, problem.seed)).normal(size=(problem.starts, *problem.batch_shape))
    if problem.solver == "dense":
        noise = np.stack([from_natural(to_device(one)) for one in noise])
    spread = (SMOOTH_SPREADS if problem.solver == "dense" else SPREADS)[attempt % len(SPREADS)] * (high - low)
    return (0.5 * (low + high) + spread * noise).astype(problem.dtype)


def _solve_densely(problem: Problem, monitor: Monitor, told: Told, start: _Start) -> Found:
    """From each of the starts until one matches."""
    rows, known = dense_rows(compare(problem, told)), given(problem, told, start.labels, prior=told.noisy)
    trials = []
    for first in start.xs:
        here = to_device(first)
        solution = dense_levenberg_marquardt(
            Rows(*(functools.partial(function, *known, here) for function in rows)),  # type: ignore[arg-type]
            np.zeros(here.size, problem.dtype),
            size=float(np.sqrt(len(told.sent.gradient))),
            tolerance=10 * problem.tolerances.solve,
            max_steps=OUTER,
            tell=monitor.tell,
        )
        x = np.asarray(here + from_natural(to_device(solution.x.reshape(here.shape))))
        residual = misfit(problem, told, start.labels, x) if told.noisy else solution.residual
        trials.append(Found(x, start.labels, residual, solution.steps))
        if residual <= told.matched:
            break
    return min(trials, key=lambda trial: np.nan_to_num(trial.residual, nan=np.inf))


def _solve(problem: Problem, monitor: Monitor, told: Told, start: _Start) -> Found:
    """With the prior first, where there is one; without it afterwards, unless noise remains."""
    forcing = {"forcing": FINE} if told.noisy else {}
    programs = match_programs(compare(problem, told), problem.tolerances.solve, **forcing)
    held = told.sent.prior is not None
    known = given(problem, told, start.labels, prior=held)
    starts = to_device(start.xs, problem.dtype)
    solution = programs.solve(*known, starts)
    steps = int(jnp.sum(solution.inner_steps))
    if not float(jnp.nanmin(solution.residual)) <= told.matched and start.smoothed:
        blurred = programs.smooth(*known, starts)
        again = programs.solve(*known, blurred.x)
        steps += int(jnp.sum(blurred.inner_steps) + jnp.sum(again.inner_steps))
        solution = again if float(jnp.nanmin(again.residual)) < float(jnp.nanmin(solution.residual)) else solution
    if held and not told.noisy:
        solution = programs.solve(*given(problem, told, start.labels), solution.x)
        steps += int(jnp.sum(solution.inner_steps))
    best = int(np.argmin(np.nan_to_num(np.asarray(solution.residual), nan=np.inf)))
    x, residual = np.asarray(solution.x[best]), float(solution.residual[best])
    return Found(x, start.labels, misfit(problem, told, start.labels, x) if told.noisy else residual, steps)
