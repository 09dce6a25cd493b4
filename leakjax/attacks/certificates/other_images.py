"""Are there other images with this gradient? What a local rank cannot say, tried on the answer itself.

The Jacobian at an answer speaks of its neighborhood alone. Far from it another image may have the very same gradient:
the answer moved by a symmetry of the network (`moves`), or a point of a curved set of which the null space is but the
tangent. Both are found by gradients at the answer, and of the same answer moved.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from leakjax.attacks.adaptive import predicted
from leakjax.attacks.certificates.certificate import relative_error
from leakjax.attacks.certificates.moves import moves
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.jacobian import inverse_norms
from leakjax.solvers.lsmr import lsmr

ORBIT = 64  # images of a symmetry that are counted, and listed as candidates
STEPS = 0.25, 1.0  # of the input range: how far along open directions the gradient is looked at
_DIRECTIONS = 2
_INNER = 6000

Labels = Int[Array, " B"] | Float[Array, "B K"]
"""Labels of the examples, or what their logits are compared with."""

Given = tuple[Arrays, Float[Array, "B ..."], Labels]
"""Variables, images and labels."""


def seek_others(problem: Problem, monitor: Monitor, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of all gradients with the symmetries and the curvature that their answers show.

    Nothing is sought where a proof is global, or where nothing is certified anyway.
    """
    found, size = [], problem.examples
    for first in range(0, len(outcomes), size):
        group = outcomes[first : first + size]
        matched = all(o.candidates and _sound(problem, o) for o in group)
        if not matched or group[0].proof == "global":
            found += group
            continue
        monitor.tell(f"looking for other images of gradient {first // size}")
        group = _with_curvature(problem, _with_symmetries(problem, group))
        kinked = at_kink(problem, np.stack([o.candidates[0].image for o in group]), tags_of(group))
        found += [dataclasses.replace(o, curved=o.curved or kinked) for o in group]
    return found


def _sound(problem: Problem, outcome: Outcome) -> bool:
    matched = outcome.candidates[0].gradient_residual <= problem.tolerances.matched
    return matched and all(info.status != "failed" for info in outcome.layers)


def tags_of(group: list[Outcome]) -> Labels:
    """The labels of the answers, (B,), or the target, (1, K)."""
    first = [outcome.candidates[0] for outcome in group]
    return jnp.asarray([c.label if c.target is None else c.target for c in first])


def _with_symmetries(problem: Problem, group: list[Outcome]) -> list[Outcome]:
    answer = np.stack([o.candidates[0].image for o in group]).astype(problem.dtype)
    labels = tags_of(group)
    limits, gap = problem.tolerances, problem.gap
    error = float(np.nan_to_num(relative_error(group[0].layers[0]), nan=np.inf))
    # What a symmetry leaves moves with the answer's own error.
    same = float(np.clip(10 * error, limits.same_gradient, limits.same_at_most))
    result = list(group)
    for b, outcome in enumerate(group):
        images, names = _orbit(problem, answer, labels, b, gap, same)
        if not names:
            continue
        others = [x for x in images if problem.in_range(x)]
        if not others:
            continue
        first = outcome.candidates[0]
        known = [c.image for c in outcome.candidates]
        new = [x for x in others if not any(np.max(np.abs(x - k)) <= gap for k in known)]
        moved = np.zeros(answer.shape[1:], bool)
        for x in others:
            moved |= np.abs(x - answer[b]) > gap
        candidates = (*outcome.candidates, *(dataclasses.replace(first, image=x) for x in new))
        result[b] = dataclasses.replace(
            outcome, candidates=candidates, symmetry=", ".join(names), count=1 + len(others), moved=moved
        )
    return result


def at_kink(problem: Problem, x: Float[np.ndarray, "B ..."], labels: Labels) -> bool:
    """Whether the gradient's derivative at x is another a billionth of the range away: a kink lies at x itself.

    There (a black image behind ReLU without biases) the Jacobian speaks of neither side, and its rank of nothing.
    """
    width = problem.input_range[1] - problem.input_range[0]
    given = dict(problem.variables), jnp.asarray(x, problem.dtype), labels
    away = _kinks(predicted(problem))(*given, jnp.asarray(problem.tolerances.kink_step * width, problem.dtype))
    return not float(away) <= problem.tolerances.kink_change


@keep(16)
def _kinks(gradient: Gradient) -> Callable[..., Float[Array, ""]]:
    """(variables, x, labels, step) -> max ||W (J(x +- step u) - J(x)) v|| / ||W J(x) v||, u and v random."""

    def kinks(variables: Arrays, x: Float[Array, "B ..."], labels: Labels, step: Float[Array, ""]) -> Float[Array, ""]:
        u, v = (jax.random.normal(jax.random.key(k), x.shape, x.dtype) for k in (21, 22))
        over = inverse_norms(gradient(variables, x, labels))

        def slope(at: Float[Array, "B ..."]) -> dict[str, Float[Array, "..."]]:
            tangent = jax.jvp(lambda x: gradient(variables, x, labels), (at,), (v,))[1]
            return jax.tree.map(jnp.multiply, over, tangent)

        here = slope(x)
        size = jnp.maximum(optax.tree.norm(here), jnp.finfo(x.dtype).tiny)
        away = [optax.tree.norm(optax.tree.sub(slope(x + side * step * u), here)) for side in (-1, 1)]
        return jnp.maximum(*away) / size

    return jax.jit(kinks)


def same_open_set(
    problem: Problem,
    x: Float[np.ndarray, "B ..."],
    labels: Int[np.ndarray, " B"] | Float[np.ndarray, "B K"],
    other: Float[np.ndarray, "B ..."],
) -> bool:
    """Whether `other` differs from x, to first order, in nothing but directions that the gradient leaves open."""
    given = dict(problem.variables), jnp.asarray(x), jnp.asarray(labels)
    return float(_slopes(predicted(problem))(*given, jnp.asarray(other)[None])[0]) <= problem.tolerances.open_answers


def other_images(problem: Problem, x: Float[np.ndarray, "B ..."], labels: Labels) -> list[Float[np.ndarray, "..."]]:
    """Images in range of some example, other than x, that a symmetry of the network gives: the gradient stays as it is
    to the last digits, however noisy x is."""
    gap, same = problem.gap, problem.tolerances.symmetric
    return [o for b in range(len(x)) for o in _orbit(problem, x, labels, b, gap, same)[0] if problem.in_range(o)]


def _orbit(
    problem: Problem, answer: Float[np.ndarray, "B ..."], labels: Labels, b: int, gap: float, same: float
) -> tuple[list[Float[np.ndarray, "..."]], list[str]]:
    """Images of example b, other than the answer, that moves give without a change of the gradient, and their names.

    Up to `ORBIT`, by the moves that leave the gradient as it is, and by these again.
    """
    measure = _differences(predicted(problem))
    given = dict(problem.variables), jnp.asarray(answer), labels
    tried = list(moves(answer.shape[1:], problem.input_range))

    def fresh(x: Float[np.ndarray, "*shape"], seen: Sequence[Float[np.ndarray, "*shape"]]) -> bool:
        return all(np.max(np.abs(x - other)) > gap for other in seen)

    first = [(move, move.apply(answer[b])) for move in tried]
    first = [(move, image) for move, image in first if fresh(image, [answer[b]])]
    if not first:
        return [], []
    stack = np.repeat(answer[None], len(first), axis=0)
    stack[:, b] = np.stack([image for _, image in first])
    holds = np.asarray(measure(*given, jnp.asarray(stack))) <= same
    holding = [move for (move, _), kept in zip(first, holds, strict=True) if kept]
    names = list(dict.fromkeys(move.name for move in holding))
    found, frontier = [], [answer[b]]
    while frontier and len(found) < ORBIT:
        grown = []
        for image in frontier:
            for move in holding:
                other = move.apply(image)
                if len(found) < ORBIT and fresh(other, [answer[b], *found]):
                    found.append(other)
                    grown.append(other)
        frontier = grown
    kept = _with_same_gradient(problem, measure, given, found, b, same)
    return kept, names if kept else []


def _with_same_gradient(
    problem: Problem,
    measure: Callable[..., Float[Array, " K"]],
    given: Given,
    moved: list[Float[np.ndarray, "..."]],
    b: int,
    same: float,
) -> list[Float[np.ndarray, "..."]]:
    """Those whose own gradient is the answer's, and that differ from it in more than directions that are open anyway.

    A move may leave one image's gradient as it is and not another's; one that moves dead pixels alone is no symmetry.
    """
    if not moved:
        return []
    stack = np.repeat(np.asarray(given[1])[None], len(moved), axis=0)
    stack[:, b] = np.stack(moved)
    holds = np.asarray(measure(*given, jnp.asarray(stack))) <= same
    seen = np.asarray(_slopes(predicted(problem))(*given, jnp.asarray(stack))) > problem.tolerances.open_step
    return [x for x, kept in zip(moved, holds & seen, strict=True) if kept]


@keep(16)
def _differences(gradient: Gradient) -> Callable[..., Float[Array, " N"]]:
    """(variables, x, labels, others (N, B, ...)) -> max_p ||g_p(other) - g_p(x)|| / ||g_p(x)|| of each.

    A parameter whose gradient is 1e-9 of all is measured by that.
    """

    def differences(
        variables: Arrays, x: Float[Array, "B ..."], labels: Labels, others: Float[Array, "N B ..."]
    ) -> Float[Array, " N"]:
        here = gradient(variables, x, labels)
        total = jnp.sqrt(sum(jnp.sum(g**2) for g in here.values()))
        sizes = {p: jnp.maximum(jnp.linalg.norm(jnp.ravel(g)), 1e-9 * total) for p, g in here.items()}

        def one(other: Float[Array, "B ..."]) -> Float[Array, ""]:
            there = gradient(variables, other, labels)
            away = [jnp.linalg.norm(jnp.ravel(there[p] - here[p])) / sizes[p] for p in here]
            return jnp.max(jnp.stack(away))

        return jax.lax.map(one, others)

    return jax.jit(differences)


@keep(16)
def _slopes(gradient: Gradient) -> Callable[..., Float[Array, " N"]]:
    """(variables, x, labels, others (N, B, ...)) -> ||W J (other - x)|| / sqrt(parameters), W = 1 / ||g_p||: 0 where
    the difference leaves no trace to first order."""

    def slopes(
        variables: Arrays, x: Float[Array, "B ..."], labels: Labels, others: Float[Array, "N B ..."]
    ) -> Float[Array, " N"]:
        here, tangent = jax.linearize(lambda x: gradient(variables, x, labels), x)
        over = inverse_norms(here)

        def one(other: Float[Array, "B ..."]) -> Float[Array, ""]:
            return optax.tree.norm(jax.tree.map(jnp.multiply, over, tangent(other - x))) / jnp.sqrt(float(len(here)))

        return jax.lax.map(one, others)

    return jax.jit(slopes)


def _with_curvature(problem: Problem, group: list[Outcome]) -> list[Outcome]:
    """Every outcome of an open gradient with whether its null space ends near the answer."""
    info = group[0].layers[0]
    if info.rank == info.unknowns or info.rank == 0:
        return group
    answer = jnp.asarray(np.stack([o.candidates[0].image for o in group]), problem.dtype)
    labels = tags_of(group)
    width = problem.input_range[1] - problem.input_range[0]
    look = _along_open(predicted(problem), problem.tolerances.solve)
    away = np.asarray(look(dict(problem.variables), answer, labels, width * jnp.asarray(STEPS, problem.dtype)))
    curved = not bool(np.all(away <= problem.tolerances.open_far))
    return [dataclasses.replace(o, curved=curved) for o in group]


@keep(16)
def _along_open(gradient: Gradient, tolerance: float) -> Callable[..., Float[Array, " SD"]]:
    """(variables, x, labels, steps (S,)) -> the relative change of the gradient `steps` away along random directions
    that J = dg/dx does not see, d = w - J^+ J w, twice for rounding; (S D,)."""

    def look(
        variables: Arrays, x: Float[Array, "B ..."], labels: Labels, steps: Float[Array, " S"]
    ) -> Float[Array, " SD"]:
        here, plain = jax.linearize(lambda x: gradient(variables, x, labels), x)
        over = inverse_norms(here)

        def tangent(d: Float[Array, "B ..."]) -> dict[str, Float[Array, "..."]]:
            return jax.tree.map(jnp.multiply, over, plain(d))

        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))

        def open_part(w: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
            return w - lsmr(operator, tangent(w), tolerance=10 * tolerance, max_steps=_INNER).x

        def along(key: Key[Array, ""]) -> Float[Array, " S"]:
            d = open_part(open_part(jax.random.normal(key, x.shape, x.dtype)))
            d = d / jnp.maximum(jnp.max(jnp.abs(d)), jnp.finfo(x.dtype).tiny)

            def change(step: Float[Array, ""]) -> Float[Array, ""]:
                there = gradient(variables, x + step * d, labels)
                rows = jax.tree.map(lambda w, a, b: w * (a - b), over, there, here)
                return optax.tree.norm(rows) / jnp.sqrt(float(len(here)))

            return jax.lax.map(change, steps)

        return jnp.ravel(jax.lax.map(along, jax.random.split(jax.random.key(7), _DIRECTIONS)))

    return jax.jit(look)
