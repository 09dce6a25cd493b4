"""Where the recursion starts for a gradient of B examples: all of them at once, from the last layer's gradient alone.

The kernel of a dense head z = W x + c has the gradient G = (1/B) sum_b dz_b x_b^T with dz_b = dL/dz(z_b, y_b): of rank
B where the x_b are independent and there are more outputs than examples. With B G = U S V^T the inputs are
x_b = V S c_b, and the B^2 numbers c_b are all that is unknown:

    sum_b dz_b c_b^T = U,    sum_b dz_b = B g_bias,    dz_b = dL/dz(W V S c_b + c, y_b)

are (K - 1)(B + 1) equations. Examples that share a label differ in their predictions alone: S has small values for
them, and in the c_b these weigh as much as the others.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from leakjax.heads import bias_path, loss_pull
from leakjax.model import Arrays
from leakjax.segments import Segment
from leakjax.systems import segment_rows

STARTS, SPREADS = 8, (0.1, 0.3)  # random logits of the starts: how many, and their standard deviations
QUICK, PATIENT = 300, 4000  # steps for every labeling, and for the one that fits best
_ENOUGH = 1e3  # roundings, relative to the smallest singular value, that a solution may be off by


class BatchHead(NamedTuple):
    """One explanation of a head's gradient: labels (B,), dL/dz and x of every example, the relative residual of the
    equations, and its condition: what a relative error in them does to x, relatively."""

    labels: Int[np.ndarray, " B"]
    dz: Float[np.ndarray, "B K"]
    x: Float[np.ndarray, "B ..."]
    residual: float
    condition: float


def read_batch_head(
    segment: Segment,
    variables: Arrays,
    gradients: Mapping[str, Float[np.ndarray, "..."]],
    loss: str,
    *,
    labelings: Sequence[Int[np.ndarray, " B"]],
    rounding: float,
) -> list[BatchHead] | None:
    """All explanations found of one gradient, up to the order of the examples; None where the head cannot show them.

    Arguments: `segment`, read for B examples; `gradients` of its parameters; `labelings`, the label vectors to try, the
    most plausible first; `rounding`, relative, of the gradients. It cannot where there is no dense kernel, or its
    gradient has a rank below B: as many examples as outputs, or examples whose differences drown in rounding.
    """
    examples = segment.input.shape[0]
    entries = _kernel_entries(segment, variables)
    if entries is None:
        return None
    path, where = entries
    u, s, vt = np.linalg.svd(examples * np.asarray(gradients[path], float).ravel()[where], full_matrices=False)
    if len(s) < examples or not s[examples - 1] > 30 * rounding * s[0]:
        return None
    u, s, vt = u[:, :examples], s[:examples], vt[:examples]
    bias = bias_path(segment, variables)
    given = None if bias is None else _sum_of_pulls(segment, variables, bias, np.asarray(gradients[bias], float))
    origin = segment.function(variables, jnp.zeros(segment.input.shape, segment.input.dtype))
    basis = (s[:, None] * vt).reshape(segment.input.shape).astype(segment.input.dtype)
    seen = segment.function(variables, jnp.asarray(basis)) - origin
    arguments = (dict(variables), origin, seen, jnp.asarray(u, basis.dtype), given)
    solve = _solver(segment, loss)
    limit = _ENOUGH * rounding * s[0] / s[-1]

    def attempt(labels: np.ndarray, steps: int) -> Any:
        found = [solve(*arguments, jnp.asarray(labels), jnp.asarray(spread), steps) for spread in SPREADS]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    trials = [(labels, attempt(labels, QUICK)) for labels in labelings]
    labels, best = min(trials, key=lambda trial: float(np.nanmin(trial[1][1], initial=np.inf)))
    if not np.nanmin(best[1], initial=np.inf) <= limit:
        best = attempt(labels, PATIENT)
    heads: list[BatchHead] = []
    for c, residual, dz in zip(*best, strict=True):
        if not residual <= limit:
            continue
        jacobian = np.asarray(_jacobian(segment, loss)(*arguments, jnp.asarray(labels), jnp.asarray(c)))
        inverse = np.linalg.pinv(jacobian.reshape(-1, c.size)) * np.tile(s, examples)[:, None]
        condition = float(np.linalg.norm(inverse, 2) / np.linalg.norm(c * s))
        head = BatchHead(labels, dz, np.tensordot(c, basis, axes=1), float(residual), condition)
        if not any(_same(head, other) for other in heads):
            heads.append(head)
    return heads


def _kernel_entries(segment: Segment, variables: Arrays) -> tuple[str, np.ndarray] | None:
    """(path, where): gradients[path].ravel()[where] is sum_b dz_b x_b^T, (K, n), for any dz, x; None if there is none.

    Found by values and checked by others: a dense kernel's gradient holds nothing but products, in some order.
    """
    examples, *shape = segment.input.shape
    n, outputs = int(np.prod(shape)), int(np.prod(segment.output.shape[1:]))
    keys = jax.random.split(jax.random.key(5), 3)
    x, y = (jax.random.normal(key, segment.input.shape, segment.input.dtype) for key in keys[:2])
    dz = jax.random.normal(keys[2], segment.output.shape, segment.input.dtype)
    values = np.asarray(x[0], float).ravel()
    for path in segment.paths:
        if int(np.prod(variables[path].shape)) != n * outputs:
            continue
        where = np.zeros((outputs, n), int)
        for k in range(outputs):
            one = jnp.zeros((examples, outputs), dz.dtype).at[0, k].set(1.0).reshape(segment.output.shape)
            shown = np.asarray(segment_rows(segment, variables, one, x)[1][path], float).ravel()
            held = np.flatnonzero(shown)
            if len(held) != n:
                return None
            where[k, np.argsort(values)] = held[np.argsort(shown[held])]
        shown = np.asarray(segment_rows(segment, variables, dz, y)[1][path], float).ravel()[where]
        product = np.asarray(dz, float).reshape(examples, -1).T @ np.asarray(y, float).reshape(examples, -1)
        if np.allclose(shown, product, rtol=1e-3, atol=1e-4 * np.abs(product).max()):
            return path, where
    return None


def _sum_of_pulls(segment: Segment, variables: Arrays, path: str, gradient: np.ndarray) -> Array:
    """B sum_b dz_b, (K,), from the gradient of the bias `path`."""
    zero = jnp.zeros(segment.input.shape, segment.input.dtype)
    outputs = int(np.prod(segment.output.shape[1:]))

    def of_sum(total: Array) -> Array:
        dz = jnp.zeros((segment.output.shape[0], outputs), total.dtype).at[0].set(total)
        return jnp.ravel(segment_rows(segment, variables, dz.reshape(segment.output.shape), zero)[1][path])

    matrix = jax.jacobian(of_sum)(jnp.zeros(outputs, segment.input.dtype))
    return segment.input.shape[0] * jnp.linalg.lstsq(matrix, jnp.ravel(jnp.asarray(gradient, matrix.dtype)))[0]


@functools.lru_cache(maxsize=16)
def _rows(segment: Segment, loss: str) -> Any:
    """(rows, pulls): (c, ...) -> (rows of the residual, dz); (variables, z, labels) -> dz (B, K), not divided by B."""
    examples = segment.input.shape[0]

    def pulls(variables: Arrays, z: Array, labels: Array) -> Array:
        return examples * loss_pull(segment, variables, loss, z, labels).reshape(examples, -1)

    def rows(c: Array, variables: Arrays, origin: Array, seen: Array, u: Array, given: Any, labels: Array) -> Any:
        z = origin + jnp.tensordot(c, seen, axes=1)
        dz = pulls(variables, z, labels)
        both = (dz.T @ c - u) / jnp.sqrt(float(examples))
        return both if given is None else (both, (jnp.sum(dz, axis=0) - given) / jnp.linalg.norm(dz)), dz

    return rows, pulls


@functools.lru_cache(maxsize=16)
def _solver(segment: Segment, loss: str) -> Any:
    rows, pulls = _rows(segment, loss)

    def solve(
        variables: Any, origin: Any, seen: Any, u: Any, given: Any, labels: Any, spread: Any, steps: int
    ) -> tuple[Array, Array, Array]:
        def one(key: Any) -> tuple[Array, Array, Array]:
            logits = origin + spread * jax.random.normal(key, origin.shape, origin.dtype)
            start = jnp.linalg.inv(u.T @ pulls(variables, logits, labels).T)

            def residual(c: Any, _: Any) -> Any:
                return rows(c, variables, origin, seen, u, given, labels)[0]

            method = optx.Dogleg(rtol=1e-14, atol=1e-15)
            c = optx.least_squares(residual, method, start, max_steps=steps, throw=False).value
            left, dz = rows(c, variables, origin, seen, u, given, labels)
            size = jnp.sqrt(sum(jnp.sum(a**2) for a in jax.tree.leaves(left)))
            return c, jnp.where(jnp.all(jnp.isfinite(c)), size, jnp.inf), dz

        return jax.vmap(one)(jax.random.split(jax.random.key(0), STARTS))

    return jax.jit(solve, static_argnums=7)


@functools.lru_cache(maxsize=16)
def _jacobian(segment: Segment, loss: str) -> Any:
    rows, _ = _rows(segment, loss)

    def jacobian(variables: Any, origin: Any, seen: Any, u: Any, given: Any, labels: Any, c: Any) -> Array:
        def flat(c: Any) -> Array:
            leaves = jax.tree.leaves(rows(c, variables, origin, seen, u, given, labels)[0])
            return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

        return jax.jacobian(flat)(c)

    return jax.jit(jacobian)


def _same(one: BatchHead, other: BatchHead) -> bool:
    """Whether two explanations differ by no more than the order of examples and rounding."""
    a, b = (head.x.reshape(len(head.x), -1) for head in (one, other))
    distance = np.linalg.norm(a[:, None] - b[None], axis=2)
    pairs = linear_sum_assignment(distance)
    return bool(np.linalg.norm(distance[pairs]) <= 1e-4 * np.linalg.norm(a))
