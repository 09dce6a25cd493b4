"""Images by the spans of their tokens, one after another: transformers, for one image a gradient and for several.

    r(x) = ((I - Q_k Q_k^T) u_k(x) / ||u_k(x)||)_k = 0,      span(Q_k) = columns of dL/dK_k

Where a weight matrix K_k meets tokens, its gradient has their span for its columns (`segments.tracing.tokens`), those
of all B examples together. Wherever that is less than the whole space, each image behind the gradient is a root of r by
itself: no label, no loss and nothing behind the last of the reads plays a part, and B images are no more unknowns than
one. A root with its label explains a part of the gradient; without that part there are fewer tokens, and the next root.

Reference: the span check of DAGER (Petrov et al., NeurIPS 2024, arXiv 2405.15586), for tokens of a finite vocabulary.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Shaped

from leakjax.attacks.problem import Monitor, Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Network, batch_gradient
from leakjax.segments.tracing.tokens import Tokens
from leakjax.solvers.gauss_newton import NewtonSolution, levenberg_marquardt
from leakjax.solvers.linear import LsmrSolution, lsmr_condition, solve_side

READS = 4
"""A block of a transformer reads its tokens as often: for queries, keys and values, behind the attention, and before
and behind its hidden layer. Later reads cost more and bring no more rows than these."""
TRIALS = 16  # starts for one image; of those that fail each takes a second or two at 32x32
SPREAD = 0.05  # of the noise on a start, in units of the range: it breaks ties between equal patches
ROOT = 3e-4  # of the tokens' size: roots end below 1e-7 (float64) or 1e-5 (float32), other minima above 1e-2
GAP = 30.0  # between the last singular value of the tokens and the first of what is rounding
EXPLAINED = 0.1  # of the best of the wrong labels' remainders: a right label's is rounding
_GENERIC = 1e-9  # of the largest: singular values of random images' tokens, which fall to 1e-6 or are zeros to 1e-15
_OUTER, _INNER = 80, 500


class Spanned(NamedTuple):
    """x (B, ...), labels (B,), and the condition of the worst of the systems r' that determine each image."""

    x: Float[np.ndarray, "B ..."]
    labels: Shaped[np.ndarray, "B ..."]
    condition: float


class _Setup(NamedTuple):
    """The network of one example, its reads that are used, ranks[left - 1][k] of the tokens of read k of `left`
    examples, and the rank whole[k] that those of any number come to: a norm without bias leaves out one direction."""

    network: Network
    tokens: Tokens
    used: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    whole: tuple[int, ...]


def can_span(problem: Problem) -> bool:
    """Whether the tokens of an example's images fill less than their space somewhere, and what was sent is the mean of
    the examples' own gradients, with classes for labels."""
    plain = problem.defense is None and problem.local_steps == 1 and not problem.statistics
    known = bool(problem.classes) or problem.labels is not None
    if not (plain and known) or problem.targets or any(f not in (None, 1.0) for f in problem.factors):
        return False
    return problem.single is not None and _setup(problem) is not None


def spanned(problem: Problem, monitor: Monitor, victim: int) -> Spanned | None:
    """All images of one gradient, or None where one of them was not found."""
    setup = _setup(problem)
    assert setup is not None, "asked before (`can_span`)"
    left = {p: np.asarray(g[victim], np.float64) for p, g in problem.gradients.items()}
    free = None if problem.labels is None else list(problem.labels[victim])
    programs = _programs(setup.network, setup.used, problem.dtype)
    generator = np.random.default_rng((problem.seed, victim))
    found: list[tuple[np.ndarray, Any, float]] = []
    for remaining in range(problem.examples, 0, -1):
        away = _complements(problem, setup, left, remaining)
        if away is None:
            monitor.tell(f"the spans of {remaining} images do not stand out of the gradient's rounding")
            return None
        one = _next(problem, monitor, setup, programs, left, free, away, remaining, generator)
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
    setup: _Setup,
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
        explained = _explained(problem, setup, end.x, left, free, remaining)
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
    setup: _Setup,
    x: Float[Array, "1 ..."],
    left: Mapping[str, Any],
    free: Sequence[Any] | None,
    remaining: int,
) -> tuple[Any, dict[str, Any]] | None:
    """The label with which an image explains a part of a gradient, and the rest; None where none does.

    The rest has the tokens of one image less, and its singular values beyond these are rounding: of a wrong label they
    are as large as before. The rest of the last image is nothing.
    """
    labels = np.stack(list(problem.classes) if free is None else list(free))
    gradients = _gradient_of(setup.network, problem.loss, tuple(left))(dict(problem.variables), x, to_device(labels))
    parts = {p: np.asarray(g, np.float64) / problem.examples for p, g in gradients.items()}
    rests = [{p: left[p] - parts[p][k] for p in left} for k in range(len(labels))]
    sizes = [_beyond(setup, rest, remaining) for rest in rests]
    best = int(np.argmin(sizes))
    others = [size for k, size in enumerate(sizes) if not np.array_equal(labels[k], labels[best])]
    if not sizes[best] <= EXPLAINED * min([*others, _beyond(setup, left, remaining)]):
        return None
    return labels[best], rests[best]


def _beyond(setup: _Setup, gradient: Mapping[str, Any], remaining: int) -> float:
    """The share of a gradient, at its best read, that one image less than `remaining` does not account for."""
    if remaining == 1:
        return float(np.sqrt(sum(np.sum(g**2) for g in gradient.values())))
    shares = []
    for k, read in enumerate(setup.tokens.reads):
        rank, fewer = setup.ranks[remaining - 1][k], setup.ranks[remaining - 2][k]
        values = np.linalg.svd(_matrix(read.matrices(gradient)), compute_uv=False)
        if fewer < rank < setup.whole[k] and rank <= len(values):
            shares.append((values[fewer - 1] / values[0], values[fewer] / values[0]))
    return max(shares)[1] if shares else np.inf


def _setup(problem: Problem) -> _Setup | None:
    """None where the reads leave fewer dimensions of their spaces than an image has, all tokens together, or where the
    examples of a batch depend on each other."""
    if "token spans" not in problem.shared:
        problem.shared["token spans"] = _read_setup(problem)
    return problem.shared["token spans"]


def _read_setup(problem: Problem) -> _Setup | None:
    assert problem.single is not None
    network = problem.single()
    tokens = network.tokens
    if tokens is None or not any(read.tokens > 1 for read in tokens.reads):
        return None
    low, high = problem.input_range
    generator = np.random.default_rng(0)
    batch = generator.uniform(low, high, problem.batch_shape)
    variables, x = dict(problem.variables), to_device(batch, problem.dtype)
    together = np.asarray(problem.network.logits(variables, x))
    alone = np.concatenate([np.asarray(network.logits(variables, x[b : b + 1])) for b in range(len(x))])
    if not np.allclose(together, alone, rtol=0, atol=1e-3 * np.max(np.abs(alone))):
        return None
    reads, examples = tokens.reads, len(x)
    count = max(examples, *(-(-read.width // read.tokens) + 1 for read in reads if read.tokens > 1))
    more = generator.uniform(low, high, (count, *problem.input_shape))
    each = [tokens.values(variables, one[None], len(reads)) for one in to_device(more, problem.dtype)]
    ranks = tuple(tuple(_rank(read) for read in zip(*each[: b + 1], strict=True)) for b in range(examples))
    whole = tuple(_rank(read) for read in zip(*each, strict=True))
    known = [k for k, r in enumerate(reads) if any(p in problem.gradients for p in r.paths) and r.tokens > 1]

    def open_reads(examples: int) -> list[int]:
        return [k for k in known if ranks[examples - 1][k] < whole[k]][:READS]

    rows = sum(reads[k].tokens * (whole[k] - ranks[-1][k]) for k in open_reads(examples))
    if rows < math.prod(problem.input_shape):
        return None
    used = tuple(sorted({*open_reads(examples), *open_reads(1)}))
    return _Setup(network=network, tokens=tokens, used=used, ranks=ranks, whole=whole)


def _rank(parts: Sequence[Any]) -> int:
    values = np.linalg.svd(np.concatenate([np.asarray(part, np.float64) for part in parts]), compute_uv=False)
    return int(np.sum(values > _GENERIC * values[0]))


def _matrix(parts: Sequence[Any]) -> Float[np.ndarray, "width outputs"]:
    """Several matrices with the same tokens, each of its own size, side by side."""
    matrices = [np.asarray(part, np.float64) for part in parts]
    return np.concatenate([m / (np.linalg.norm(m) or 1.0) for m in matrices], axis=1)


def _complements(
    problem: Problem, setup: _Setup, gradient: Mapping[str, Any], remaining: int
) -> tuple[Float[Array, "width width"], ...] | None:
    """I - Q Q^T of the used reads, zeros for one whose columns do not span the tokens; None where all are zeros."""
    found = []
    for k in setup.used:
        read, rank = setup.tokens.reads[k], setup.ranks[remaining - 1][k]
        left, values, _ = np.linalg.svd(_matrix(read.matrices(gradient)), full_matrices=False)
        after = values[rank] if rank < len(values) else 0.0
        good = rank < setup.whole[k] and rank <= len(values) and values[rank - 1] > GAP * max(after, 1e-15 * values[0])
        basis = left[:, :rank]
        found.append(np.eye(read.width) - basis @ basis.T if good else np.zeros((read.width, read.width)))
    if not any(np.any(a) for a in found):
        return None
    return tuple(to_device(a, problem.dtype) for a in found)


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


@keep(16)
def _gradient_of(network: Network, loss: Any, paths: tuple[str, ...]) -> Callable[..., dict[str, Array]]:
    """(variables, x (1, ...), labels (L, ...)) -> {path: (L, *parameter)} of that image with each of the labels."""
    gradient = batch_gradient(network.logits, loss, paths)

    def each(variables: Arrays, x: Array, labels: Array) -> dict[str, Array]:
        return jax.lax.map(lambda label: gradient(variables, x, label[None]), labels)

    return jax.jit(each)
