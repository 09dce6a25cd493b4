"""Where the recursion starts for a gradient of B examples: all of them at once, from the last layer's gradient alone.

The kernel of a dense head z = W x + c has the gradient G = (1/B) sum_b dz_b x_b^T with dz_b = dL/dz(z_b, y_b): of rank
B where the x_b are independent and there are outputs enough. With B G = U S V^T the inputs are x_b = V S c_b, and the
B^2 numbers c_b are all that is unknown:

    sum_b dz_b c_b^T = U,    sum_b dz_b = B g_bias,    dz_b = dL/dz(W V S c_b + c, y_b)

Sums in place of means, and examples of unequal weight, have w_b dz_b for dz_b: where no solution is found with w = 1
the w_b are B more unknowns.

Examples that share a label differ in their predictions alone: S has small values for them, and in the c_b these weigh
as much as the others. Where these are no more equations than unknowns several solutions may stand, and none is told.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, Int, Key, PyTree
from scipy.optimize import linear_sum_assignment

from leakjax.attacks.heads.single import bias_path
from leakjax.constraints.layer import loss_pull, segment_rows
from leakjax.models.losses import LossSpec, labels_of
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment

SPREADS = (0.1, 0.3)  # standard deviation of the random logits that the starts are made of
STARTS = 8  # of each spread
STEPS = (30, 300)  # for every labeling, the second where the first fits none
MOST_LABELINGS = 80  # tried with weights of the examples
PATIENT = 4000  # for the labeling that fits best, where none fits
_ENOUGH = 1e3  # roundings, relative to the smallest singular value, that a solution may be off by


class DenseHead(NamedTuple):
    """A head read for B examples: its kernel's path and where the gradient's entries are (K, n), its bias's path (or
    None), z at x = 0 (B, K), and the dimension of all dL/dz."""

    segment: Segment
    kernel: str
    where: Int[np.ndarray, "K n"]
    bias: str | None
    origin: Float[Array, "B K"]
    freedom: int

    def redundant(self, *, weighted: bool = False) -> bool:
        """Whether there are more equations than the B^2 unknowns, and B weights."""
        examples = len(self.origin)
        return self.freedom * (examples + (self.bias is not None)) > examples**2 + weighted * examples


class BatchHead(NamedTuple):
    """One explanation of a head's gradient: labels (B,), dL/dz and x of every example, the relative residual of the
    equations, its condition: what a relative error in them does to x, relatively, and the examples' weights w (B,), all
    1 in a mean; `dz` has them in it."""

    labels: Int[np.ndarray, " B"]
    dz: Float[np.ndarray, "B K"]
    x: Float[np.ndarray, "B ..."]
    residual: float
    condition: float
    weights: Float[np.ndarray, " B"]


class _Unknowns(NamedTuple):
    """c (B, B), and the weights w (B,)."""

    c: Float[Array, "B B"]
    w: Float[Array, " B"]


class _Equations(NamedTuple):
    """What the residual of c takes beside labels: weights, z at x = 0, z of the basis V S beyond it, U, B g_bias."""

    variables: Arrays
    origin: Float[Array, "B K"]
    seen: Float[Array, "B K"]
    u: Float[Array, "K B"]
    total: Float[Array, " K"] | None


Labels = Int[np.ndarray, " B"] | Float[np.ndarray, "B K"]
"""Labels of the examples, or what their logits are compared with."""

Solutions = tuple[_Unknowns, Float[Array, " S"], Float[Array, "S B K"]]
"""(c, w), ||residual|| and dz of all starts."""


def read_dense_head(segment: Segment, variables: Arrays, loss: LossSpec) -> DenseHead | None:
    """A head that may separate the examples of a gradient; None where no kernel's gradient holds all dz_b x_b^T."""
    entries = _kernel_entries(segment, variables)
    if entries is None:
        return None
    origin = segment.function(variables, jnp.zeros(segment.input.shape, segment.input.dtype))
    examples, outputs = origin.reshape(len(origin), -1).shape
    z = jax.random.normal(jax.random.key(3), (2 * outputs, *origin.shape), origin.dtype)
    labels = jnp.arange(2 * outputs) % outputs
    pulls = jax.vmap(lambda z, y: loss_pull(segment, variables, loss, z, jnp.full(examples, y)))(z, labels)
    freedom = int(np.linalg.matrix_rank(np.asarray(pulls).reshape(-1, outputs), rtol=1e-5))
    kernel, where = entries
    bias = bias_path(segment, variables)
    return DenseHead(segment=segment, kernel=kernel, where=where, bias=bias, origin=origin, freedom=freedom)


def fits(head: DenseHead) -> bool:
    """Whether the solves fit into memory."""
    examples = len(head.origin)
    outputs = head.origin.size // examples
    return fits_in_memory(8 * 6 * len(SPREADS) * STARTS * (outputs * (examples + 1) + examples**2) * examples**2)


def separate_examples(
    head: DenseHead,
    variables: Arrays,
    gradients: Mapping[str, Float[np.ndarray, "..."]],
    loss: LossSpec,
    *,
    labelings: Sequence[Int[np.ndarray, " B"]],
    rounding: float,
    accept: float,
) -> list[BatchHead] | None:
    """All explanations found of one gradient, up to the order of the examples; None where it cannot be separated.

    Arguments: `gradients` of the head's parameters; `labelings`, the label vectors to try, the most plausible first;
    `rounding`, relative, of the gradients; `accept`, the largest residual of an explanation. It cannot be separated
    where the kernel's gradient has a rank below B (too few outputs, or differences that drown in rounding) and where
    there are no more equations than unknowns.
    """
    segment, examples = head.segment, len(head.origin)
    u, s, vt = _singular(head, gradients)
    if not head.redundant() or len(s) < examples or not s[examples - 1] > 30 * rounding * s[0]:
        return None
    u, s, vt = u[:, :examples], s[:examples], vt[:examples]
    total = None if head.bias is None else _sum_of_pulls(segment, variables, head.bias, gradients[head.bias])
    basis = (s[:, None] * vt).reshape(segment.input.shape).astype(segment.input.dtype)
    seen = segment.function(variables, to_device(basis)) - head.origin
    equations = _Equations(
        variables=dict(variables), origin=head.origin, seen=seen, u=to_device(u, basis.dtype), total=total
    )
    limit = min(_ENOUGH * rounding * s[0] / s[-1], accept)

    def attempt(labels: Labels, steps: int, weighted: bool) -> tuple[Labels, Solutions]:
        return labels, _solver(segment, loss, weighted)(equations, to_device(labels), steps)

    trials = []
    for steps in STEPS:
        trials += [attempt(labels, steps, False) for labels in labelings]
        if min(map(_least, trials)) <= limit:
            break
    else:
        trials.append(attempt(min(trials, key=_least)[0], PATIENT, False))
        if min(map(_least, trials)) > limit and head.redundant(weighted=True):
            every = _all_labelings(labelings, labels_of(head.origin.size // examples))
            trials += [attempt(labels, STEPS[-1], True) for labels in every]
    found: list[BatchHead] = []
    for labels, (unknowns, residuals, dzs) in trials:
        for c, w, residual, dz in zip(*map(np.asarray, (*unknowns, residuals, dzs)), strict=True):
            if not residual <= limit:
                continue
            weighted = not np.all(w == 1.0)
            jacobian = _jacobian(segment, loss, weighted)(equations, to_device(labels), to_device(c), to_device(w))
            condition = _condition(np.asarray(jacobian), c, s)
            x = np.tensordot(c, basis, axes=1)
            one = BatchHead(labels=labels, dz=dz, x=x, residual=float(residual), condition=condition, weights=w)
            if not any(_same(one, other) for other in found):
                found.append(one)
    return found


def examples_shown(head: DenseHead, gradients: Mapping[str, Float[np.ndarray, "..."]], rounding: float) -> int:
    """The rank of the kernel's gradient above rounding: how many examples stand behind it, at least."""
    _, s, _ = _singular(head, gradients)
    return int(np.sum(s > 30 * rounding * s[0]))


def _singular(
    head: DenseHead, gradients: Mapping[str, Float[np.ndarray, "..."]]
) -> tuple[Float[np.ndarray, "K r"], Float[np.ndarray, " r"], Float[np.ndarray, "r n"]]:
    """U, s, V^T of B times the kernel's gradient (K, n)."""
    return np.linalg.svd(len(head.origin) * np.asarray(gradients[head.kernel], float).ravel()[head.where], False)


def _all_labelings(likely: Sequence[Labels], labels: int) -> list[Labels]:
    """Every label vector (B,), sorted, where these are few; else the `likely` ones: counts read from a gradient take it
    for a mean."""
    examples = likely[0].shape
    if len(likely) == 1 or likely[0].ndim > 1 or math.comb(labels + examples[0] - 1, examples[0]) > MOST_LABELINGS:
        return list(likely)
    return [np.array(tags) for tags in itertools.combinations_with_replacement(range(labels), examples[0])]


def _kernel_entries(segment: Segment, variables: Arrays) -> tuple[str, Int[np.ndarray, "K n"]] | None:
    """(path, where): gradients[path].ravel()[where] is sum_b dz_b x_b^T, (K, n), for any dz, x; None if there is none.

    Found by values and checked by others: a dense kernel's gradient holds nothing but products, in some order.
    """
    examples, *shape = segment.input.shape
    n, outputs = int(np.prod(shape)), int(np.prod(segment.output.shape[1:]))
    keys = jax.random.split(jax.random.key(5), 3)
    x, y = (jax.random.normal(key, segment.input.shape, segment.input.dtype) for key in keys[:2])
    dz = jax.random.normal(keys[2], segment.output.shape, segment.input.dtype)
    rows = jax.jit(lambda dz, x: segment_rows(segment, variables, dz.reshape(segment.output.shape), x)[1])
    values = np.argsort(np.asarray(x[0], float).ravel())
    for path in segment.paths:
        if int(np.prod(variables[path].shape)) != n * outputs:
            continue
        where = np.zeros((outputs, n), int)
        for k in range(outputs):
            one = jnp.zeros((examples, outputs), dz.dtype).at[0, k].set(1.0)
            shown = np.asarray(rows(one, x)[path], float).ravel()
            held = np.flatnonzero(shown)
            if len(held) != n:
                return None
            where[k, values] = held[np.argsort(shown[held])]
        shown = np.asarray(rows(dz, y)[path], float).ravel()[where]
        product = np.asarray(dz, float).reshape(examples, -1).T @ np.asarray(y, float).reshape(examples, -1)
        if np.allclose(shown, product, rtol=1e-3, atol=1e-4 * np.abs(product).max()):
            return path, where
    return None


def _sum_of_pulls(
    segment: Segment, variables: Arrays, path: str, gradient: Float[np.ndarray, "..."]
) -> Float[Array, " K"]:
    """sum_b dz_b, (K,), from the gradient of the bias `path`."""
    zero = jnp.zeros(segment.input.shape, segment.input.dtype)
    examples, outputs = zero.shape[0], int(np.prod(segment.output.shape[1:]))

    def of_sum(total: Float[Array, " K"]) -> Float[Array, " n"]:
        dz = jnp.zeros((examples, outputs), total.dtype).at[0].set(total / examples)
        return jnp.ravel(segment_rows(segment, variables, dz.reshape(segment.output.shape), zero)[1][path])

    matrix = jax.jacobian(of_sum)(jnp.zeros(outputs, segment.input.dtype))
    return jnp.linalg.lstsq(matrix, jnp.ravel(jnp.asarray(gradient, matrix.dtype)))[0]


def _residual(
    segment: Segment,
    loss: LossSpec,
    equations: _Equations,
    labels: Int[Array, " B"] | Float[Array, "B K"],
    unknowns: _Unknowns,
) -> tuple[PyTree[Float[Array, "..."]], Float[Array, "B K"]]:
    """(rows of the residual, w dz (B, K))."""
    c, w = unknowns
    dz = _pulls(segment, loss, equations, labels, equations.origin + jnp.tensordot(c, equations.seen, axes=1))
    dz = w[:, None] * dz
    rows = (dz.T @ c - equations.u) / jnp.sqrt(float(len(c)))
    if equations.total is None:
        return rows, dz
    return (rows, (jnp.sum(dz, axis=0) - equations.total) / jnp.linalg.norm(dz)), dz


def _pulls(
    segment: Segment,
    loss: LossSpec,
    equations: _Equations,
    labels: Int[Array, " B"] | Float[Array, "B K"],
    z: Float[Array, "B ..."],
) -> Float[Array, "B K"]:
    """dL/dz of every example for itself, (B, K)."""
    return len(z) * loss_pull(segment, equations.variables, loss, z, labels).reshape(len(z), -1)


@keep(16)
def _solver(segment: Segment, loss: LossSpec, weighted: bool) -> Callable[..., Solutions]:
    """(equations, labels, steps) -> solutions (c, w), ||residual|| and dz of all starts, side by side.

    Without `weighted` w is 1. With it w begins at the factor that the sum of all dz asks for, of either sign.
    """

    def solve(equations: _Equations, labels: Int[Array, " B"] | Float[Array, "B K"], steps: int) -> Solutions:
        dtype = equations.origin.dtype
        eps = float(jnp.finfo(dtype).eps)
        method = optx.Dogleg(rtol=50 * eps, atol=5 * eps)
        ones = jnp.ones(len(equations.origin), dtype)

        def one(
            key: Key[Array, ""], spread: Float[Array, ""], sign: Float[Array, ""]
        ) -> tuple[_Unknowns, Float[Array, ""], Float[Array, "B K"]]:
            noise = jax.random.normal(key, equations.origin.shape, dtype)
            pulls = _pulls(segment, loss, equations, labels, equations.origin + spread * noise)
            factor = jnp.ones((), dtype)
            if weighted and equations.total is not None:
                factor = sign * jnp.linalg.norm(equations.total) / jnp.linalg.norm(jnp.sum(pulls, axis=0))
            start = jnp.linalg.inv(equations.u.T @ (factor * pulls).T)

            def residual(y: Any, _: None) -> PyTree[Float[Array, "..."]]:
                return _residual(segment, loss, equations, labels, y if weighted else _Unknowns(y, ones))[0]

            first: Any = _Unknowns(start, factor * ones) if weighted else start
            y = optx.least_squares(residual, method, first, max_steps=steps, throw=False).value
            end = y if weighted else _Unknowns(y, ones)
            left, dz = _residual(segment, loss, equations, labels, end)
            size = jnp.sqrt(sum(jnp.sum(a**2) for a in jax.tree.leaves(left)))
            return end, jnp.where(jnp.all(jnp.isfinite(end.c)), size, jnp.inf), dz

        keys = jax.random.split(jax.random.key(0), STARTS * len(SPREADS))
        signs = jnp.where(jnp.arange(len(keys)) % 4 == 3, -1.0, 1.0).astype(dtype)
        return jax.vmap(one)(keys, jnp.repeat(jnp.asarray(SPREADS, dtype), STARTS), signs)

    return jax.jit(solve, static_argnums=2)


@keep(16)
def _jacobian(segment: Segment, loss: LossSpec, weighted: bool) -> Callable[..., Float[Array, "r n"]]:
    """(equations, labels, c, w) -> the Jacobian of the residual, (rows, B^2), and B more columns where `weighted`."""

    def flat(
        unknowns: _Unknowns, equations: _Equations, labels: Int[Array, " B"] | Float[Array, "B K"]
    ) -> Float[Array, " r"]:
        leaves = jax.tree.leaves(_residual(segment, loss, equations, labels, unknowns)[0])
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    def build(
        equations: _Equations,
        labels: Int[Array, " B"] | Float[Array, "B K"],
        c: Float[Array, "B B"],
        w: Float[Array, " B"],
    ) -> Float[Array, "r n"]:
        by_c, by_w = jax.jacobian(flat)(_Unknowns(c, w), equations, labels)
        by_c = by_c.reshape(len(by_c), -1)
        return jnp.concatenate([by_c, by_w], axis=1) if weighted else by_c

    return jax.jit(build)


def _condition(jacobian: Float[np.ndarray, "r n"], c: Float[np.ndarray, "B B"], s: Float[np.ndarray, " B"]) -> float:
    """Largest relative change of x = V S c for a change of the equations of size 1; infinite where c is not unique."""
    left, values, right = np.linalg.svd(np.asarray(jacobian, float), full_matrices=False)
    if values[-1] <= len(values) * np.finfo(jacobian.dtype).eps * values[0]:
        return float("inf")
    inverse = ((right.T / values) @ left.T)[: c.size] * np.tile(s, len(c))[:, None]
    return float(np.linalg.norm(inverse, 2) / np.linalg.norm(c * s))


def _least(trial: tuple[Labels, Solutions]) -> float:
    return float(np.nanmin(np.asarray(trial[1][1]), initial=np.inf))


def _same(one: BatchHead, other: BatchHead) -> bool:
    """Whether two explanations differ by no more than the order of examples and rounding."""
    a, b = (head.x.reshape(len(head.x), -1) for head in (one, other))
    distance = np.linalg.norm(a[:, None] - b[None], axis=2)
    rows, columns = linear_sum_assignment(distance)
    near = np.linalg.norm(distance[rows, columns]) <= 1e-4 * np.linalg.norm(a)
    return bool(near and np.array_equal(one.labels[rows], other.labels[columns]))
