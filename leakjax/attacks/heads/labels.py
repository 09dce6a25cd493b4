"""Labels of a whole batch from one gradient: how many examples of each, the most plausible first.

The mean gradient is (1/B) sum_c n_c E[g | label c] up to what the inputs change. A bias b of the logits makes it exact
but for the mean prediction: dL/db_c = mean_b p_bc - n_c / B (softmax cross-entropy). Without one, the counts are the
non-negative least-squares combination of the gradients of dummy inputs (after Geng et al., arXiv 2110.09074).
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Int, Key, Shaped

from leakjax.models.losses import labels_of
from leakjax.models.reader import Arrays
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient, Logits

DUMMIES = 8  # dummy batches of one label each
Moments = tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, "..."]]]
"""Mean and mean square of gradients, by parameter."""

MOST_NUMBERS = 2e7  # of one parameter's gradients, over all labels, that are held at once


def rank_labels(
    logits: Logits,
    gradient: Gradient,
    variables: Arrays,
    sent: Mapping[str, Float[np.ndarray, "..."]],
    shape: tuple[int, ...],
    input_range: tuple[float, float],
    most: int,
) -> list[Int[np.ndarray, " B"]]:
    """Up to `most` label vectors (B,), sorted within themselves, the most plausible first.

    Arguments: `logits` and `gradient` of batches of `shape` (B, H, W, C), `sent`, the gradient received.
    """
    outputs = jax.eval_shape(logits, dict(variables), jnp.zeros(shape)).shape[1]
    scores = shape[0] * _shares(gradient, variables, sent, shape, input_range, labels_of(outputs))
    return [np.repeat(np.arange(len(counts)), counts) for counts in likely_counts(scores, shape[0], most)]


def likely_counts(scores: Float[np.ndarray, " K"], total: int, most: int) -> list[Int[np.ndarray, " K"]]:
    """Integer counts >= 0 that sum to `total`, nearest to `scores` first, by moving up to two examples."""
    counts = np.floor(np.maximum(scores, 0)).astype(int)
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 0, counts - scores, -np.inf))] -= 1
    while counts.sum() < total:
        counts[np.argmax(scores - counts)] += 1
    found = {tuple(counts)}
    for _ in range(2):
        for base in list(found):
            for a, b in itertools.permutations(range(len(scores)), 2):
                if base[a] > 0:
                    moved = np.array(base)
                    moved[a] -= 1
                    moved[b] += 1
                    found.add(tuple(moved))
        if len(found) > 4 * most or len(scores) > 200:
            break
    return [np.array(c) for c in sorted(found, key=lambda c: float(np.sum((np.array(c) - scores) ** 2)))[:most]]


def _shares(
    gradient: Gradient,
    variables: Arrays,
    sent: Mapping[str, Float[np.ndarray, "..."]],
    shape: tuple[int, ...],
    input_range: tuple[float, float],
    labels: int,
) -> Float[np.ndarray, " K"]:
    """Share of each label: non-negative weights, summing to 1, of dummy gradients that explain the sent one best.

    The one parameter is compared whose gradient tells labels apart most: variance between labels over that within.
    """
    sizes = {path: labels * np.size(g) for path, g in sent.items()}
    compared = tuple(path for path in sent if sizes[path] <= max(MOST_NUMBERS, min(sizes.values())))
    mean, square = _dummy_gradients(gradient, compared, labels)(dict(variables), shape, *input_range)

    def told_apart(path: str) -> float:
        within = float(np.mean(square[path] - mean[path] ** 2))
        return float(np.mean(np.var(mean[path], axis=0))) / max(within, 1e-30)

    path = max(compared, key=told_apart)
    scale = float(np.linalg.norm(sent[path]))
    if not scale > 0:  # it shows nothing: any label is as likely
        return np.full(labels, 1.0 / labels)
    columns = np.asarray(mean[path], float).reshape(labels, -1).T / scale
    emphasis = 10.0 * float(np.linalg.norm(columns))  # the shares sum to 1
    matrix = np.concatenate([columns, np.full((1, labels), emphasis)])
    return scipy.optimize.nnls(matrix, np.append(np.ravel(sent[path]) / scale, emphasis))[0]


@keep(16)
def _dummy_gradients(gradient: Gradient, paths: tuple[str, ...], labels: int) -> Callable[..., Moments]:
    """(variables, shape, low, high) -> mean and mean square of the gradients of `paths` over dummies of each label."""

    def chosen(variables: Arrays, x: Shaped[Array, "B ..."], tags: Int[Array, " B"]) -> dict[str, Float[Array, "..."]]:
        found = gradient(variables, x, tags)
        return {path: found[path] for path in paths}

    @functools.partial(jax.jit, static_argnums=1)
    def draw(variables: Arrays, shape: tuple[int, ...], low: Float[Array, ""], high: Float[Array, ""]) -> Moments:
        dtype = variables[paths[0]].dtype  # a buffer may count steps

        def of_label(label: Int[Array, ""]) -> Moments:
            def add(sums: Moments, key: Key[Array, ""]) -> tuple[Moments, None]:
                x = low + (high - low) * jax.random.uniform(key, shape, dtype)
                g = chosen(variables, x, jnp.full(shape[0], label))
                return jax.tree.map(lambda s, a: s + a / DUMMIES, sums, (g, jax.tree.map(jnp.square, g))), None

            struct = jax.eval_shape(chosen, variables, jax.ShapeDtypeStruct(shape, dtype), jnp.full(shape[0], 0))
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (struct, struct))
            return jax.lax.scan(add, zeros, jax.random.split(jax.random.key(11), DUMMIES))[0]

        return jax.lax.map(of_label, jnp.arange(labels))

    return draw
