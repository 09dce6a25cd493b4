"""Images by the spans of their tokens, one after another: transformers, for one image a gradient and for several.

    r(x) = ((I - Q_k Q_k^T) u_k(x) / ||u_k(x)||)_k = 0,      span(Q_k) = columns of dL/dK_k

Where a weight matrix K_k meets tokens, its gradient has their span for its columns (`segments.tracing.tokens`), those
of all B examples together. Wherever that is less than the whole space, each image behind the gradient is a root of r by
itself: no label, no loss and nothing behind the last of the reads plays a part, and B images are no more unknowns than
one. A root with its label explains a part of the gradient; without that part there are fewer tokens, and the next root.

Reference: the span check of DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586), for tokens of a finite vocabulary.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Shaped

from leakjax.attacks.heads.spans import Spans, beyond, complements, read_spans, telling_read
from leakjax.attacks.problem import Monitor, Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient, Network, batch_gradient
from leakjax.solvers.gauss_newton import NewtonSolution, levenberg_marquardt
from leakjax.solvers.linear import LsmrSolution, lsmr_condition, solve_side

TRIALS = 16  # starts for one image: one in eight of the hardest came to its root; a failing one takes 30 s at 32x32
SPREAD = 0.05  # of the noise on a start, in units of the range: it breaks ties between equal patches
ROOT = 3e-4  # of the tokens' size: roots end below 1e-7 (float64) or 1e-5 (float32), other minima above 2e-3
EXPLAINED = 0.1  # of the best of the wrong labels' remainders: a right label's is rounding
_OUTER, _INNER = 80, 500


class Spanned(NamedTuple):
    """x (B, ...), labels (B,), and the condition of the worst of the systems r' that determine each image."""

    x: Float[np.ndarray, "B ..."]
    labels: Shaped[np.ndarray, "B ..."]
    condition: float


def can_span(problem: Problem) -> bool:
    """Whether the tokens of an example's images fill less than their space somewhere, and what was sent is the mean of
    the examples' own gradients, with classes for labels."""
    plain = problem.defense is None and problem.local_steps == 1 and not problem.statistics
    known = bool(problem.classes) or problem.labels is not None
    if not (plain and known) or problem.targets or any(f not in (None, 1.0) for f in problem.factors):
        return False
    return read_spans(problem) is not None


def spanned(problem: Problem, monitor: Monitor, victim: int) -> Spanned | None:
    """All images of one gradient, or None where one of them was not found."""
    spans = read_spans(problem)
    assert spans is not None, "asked before (`can_span`)"
    left = {p: np.asarray(g[victim], np.float64) for p, g in problem.gradients.items()}
    free = None if problem.labels is None else list(problem.labels[victim])
    programs = _programs(spans.network, spans.used, problem.dtype)
    generator = np.random.default_rng((problem.seed, victim))
    found: list[tuple[np.ndarray, Any, float]] = []
    for remaining in range(problem.examples, 0, -1):
        away = complements(spans, left, remaining)
        if away is None:
            monitor.tell(f"the spans of {remaining} images do not stand out of the gradient's rounding")
            return None
        away = tuple(to_device(a, problem.dtype) for a in away)
        one = _next(problem, monitor, spans, programs, left, free, away, remaining, generator)
        if one is None:
            return None
        x, label, condition, left = one
        found.append((x, label, condition))
        if free is not None:
            free.pop(next(k for k, tag in enumerate(free) if np.array_equal(tag, label)))
    return _ordered(problem, victim, found)


def _ordered(problem: Problem, victim: int, found: list[tuple[np.ndarray, Any, float]]) -> Spanned:
    """In the order of the labels that were given, else in that of the labels themselves."""
    if problem.labels is None:
        order = sorted(range(len(found)), key=lambda k: int(found[k][1]))
    else:
        rest = list(range(len(found)))
        order = []
        for tag in problem.labels[victim]:
            order.append(next(k for k in rest if np.array_equal(found[k][1], tag)))
            rest.remove(order[-1])
    images, labels = np.concatenate([found[k][0] for k in order]), np.stack([found[k][1] for k in order])
    return Spanned(images, labels, max(condition for _, _, condition in found))


def _next(
    problem: Problem,
    monitor: Monitor,
    spans: Spans,
    programs: "_Programs",
    left: Mapping[str, Any],
    free: Sequence[Any] | None,
    away: tuple[Any, ...],
    remaining: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, Any, float, dict[str, Any]] | None:
    """(image, label, condition, what is left of the gradient) of one more image; None where no start ends at one."""
    variables = dict(problem.variables)
    number = problem.examples - remaining + 1
    for attempt in range(TRIALS):
        x = to_device(_start(problem, attempt, generator), problem.dtype)
        if attempt % 2:
            x = programs.first(variables, away, x).x
        end = programs.all(variables, away, x)
        monitor.tell(f"image {number} by its tokens, start {attempt}: residual {float(end.residual):.1e}")
        if not float(end.residual) <= ROOT:
            continue
        look = programs.look(variables, away, end.x)
        if not float(look.lost) <= problem.tolerances.probe:
            continue  # a point of a set: other images have these tokens as well
        explained = _explained(problem, spans, end.x, left, free, remaining)
        if explained is not None:
            return np.asarray(end.x), explained[0], lsmr_condition(look), explained[1]
    return None


def _start(problem: Problem, attempt: int, generator: np.random.Generator) -> Float[np.ndarray, "1 ..."]:
    """Mid-range first, then a color at random, with a little noise."""
    low, high = problem.input_range
    shape = (1, *problem.input_shape)
    level = 0.5 if attempt == 0 else generator.uniform(0.1, 0.9, shape[-1])
    return low + (high - low) * (level + SPREAD * generator.normal(size=shape))


def _explained(
    problem: Problem,
    spans: Spans,
    x: Float[Array, "1 ..."],
    left: Mapping[str, Any],
    free: Sequence[Any] | None,
    remaining: int,
) -> tuple[Any, dict[str, Any]] | None:
    """The label with which an image explains a part of a gradient, and the rest; None where none does.

    The rest has the tokens of one image less, and its singular values beyond these are rounding: of a wrong label they
    are as large as before. The rest of the last image is nothing.
    """
    read = telling_read(spans, left, remaining)
    if read is None:
        return None
    variables = dict(problem.variables)
    paths = tuple(p for p in spans.tokens.reads[read].paths if p in left)
    part = _gradient_of(spans.network, problem.loss, paths)

    def rest(label: Any, parts: Callable[..., dict[str, Array]], paths: Sequence[str]) -> dict[str, Any]:
        given = parts(variables, x, to_device(np.asarray(label)[None]))
        return {p: left[p] - np.asarray(given[p], np.float64) / problem.examples for p in paths}

    labels = list(problem.classes) if free is None else list(free)
    sizes = [beyond(spans, read, rest(label, part, paths), remaining - 1) for label in labels]
    best = int(np.argmin(sizes))
    others = [size for label, size in zip(labels, sizes, strict=True) if not np.array_equal(label, labels[best])]
    if not sizes[best] <= EXPLAINED * min([*others, beyond(spans, read, left, remaining - 1)]):
        return None
    return labels[best], rest(labels[best], _gradient_of(spans.network, problem.loss, tuple(left)), tuple(left))


class _Programs(NamedTuple):
    """Compiled, of (variables, complements, x): roots by all used reads, by the first of them, and the rank at one."""

    all: Callable[..., NewtonSolution]
    first: Callable[..., NewtonSolution]
    look: Callable[..., LsmrSolution]


@keep(16)
def _programs(network: Network, used: tuple[int, ...], dtype: Any) -> _Programs:
    tokens = network.tokens
    assert tokens is not None

    def rows(variables: Arrays, away: Sequence[Array], x: Array, count: int) -> list[Array]:
        values = tokens.values(variables, x, used[count - 1] + 1)
        return [(u / jnp.linalg.norm(u)) @ a for u, a in zip([values[k] for k in used[:count]], away, strict=True)]

    def solve(variables: Arrays, away: Sequence[Array], x: Array, count: int) -> NewtonSolution:
        function = functools.partial(rows, variables, away[:count], count=count)
        size, tolerance = jnp.ones((), x.dtype), 4 * float(jnp.finfo(x.dtype).eps)
        return levenberg_marquardt(function, x, size=size, tolerance=tolerance, max_steps=_OUTER, max_inner=_INNER)

    def look(variables: Arrays, away: Sequence[Array], x: Array) -> LsmrSolution:
        r, tangent = jax.linearize(lambda x: rows(variables, away, x, len(used)), x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return solve_side(operator, r, jnp.asarray(True), tolerance=1e-10, max_steps=4 * _INNER)

    return _Programs(
        jax.jit(functools.partial(solve, count=len(used))), jax.jit(functools.partial(solve, count=1)), jax.jit(look)
    )


@keep(32)
def _gradient_of(network: Network, loss: Any, paths: tuple[str, ...]) -> Gradient:
    """Compiled: (variables, x (1, ...), labels (1, ...)) -> the gradient of `paths`."""
    return jax.jit(batch_gradient(network.logits, loss, paths))
