"""Other images with the very same gradient: the second root of a logit, and the sign of an odd network.

On a positively homogeneous network without biases, z(t x) = t z(x) for t > 0, the gradient of t x is that of x where
t dL/dz(t z) = dL/dz(z); on an odd one, z(-x) = -z(x), that of -x with another label may be. No residual tells them
apart, so they are sought and shown.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from leakjax.attacks.problem import Labels
from leakjax.models.losses import LossSpec, labels_of, read_loss
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient, Logits

_SCALES = np.geomspace(1e-6, 1e6, 4000)
_SAME = 1e-8


def twins(
    logits: Logits,
    gradient: Gradient,
    loss: LossSpec,
    variables: Arrays,
    x: Float[np.ndarray, "B *image"],
    labels: Labels,
    matched: float,
) -> list[tuple[Float[np.ndarray, "B *image"], Labels]]:
    """All (x', labels') with the gradient of (x, labels) that differ by one example's scale or sign, or by all signs.

    `matched`: largest relative difference of two gradients that count as the same.
    """
    variables = dict(variables)
    run = jax.jit(logits)
    z = run(variables, to_device(x))

    def is_ray(t: float) -> bool:
        return float(jnp.linalg.norm(run(variables, to_device(t * x)) - t * z)) <= _SAME * float(jnp.linalg.norm(z))

    homogeneous, odd = is_ray(2.0) and is_ray(0.5), is_ray(-1.0)
    scales = np.concatenate([_SCALES if homogeneous else [], (-_SCALES if homogeneous else [-1.0]) if odd else []])
    if not len(scales):
        return []
    measure = jax.jit(gradient)
    given = measure(variables, to_device(x), to_device(labels))
    size = _norm(given)
    found, classes = [], labels.ndim == 1 and labels.dtype.kind in "iu"
    for b in range(len(x)):
        others = range(labels_of(z[b].size)) if classes else [labels[b]]
        for scale, label in _roots(loss, np.asarray(z[b]), labels[b], others, scales):
            other, tags = np.array(x), np.array(labels)
            other[b] *= scale
            tags[b] = label
            sent = measure(variables, to_device(other), to_device(tags))
            if _norm(jax.tree.map(jnp.subtract, sent, given)) <= matched * size:
                found.append((other, tags))
    if odd and len(x) > 1 and classes and labels_of(z[0].size) == 2:  # all at once, where the model mixes its examples
        sent = measure(variables, to_device(-x), to_device(1 - labels))
        if _norm(jax.tree.map(jnp.subtract, sent, given)) <= matched * size:
            found.append((-x, 1 - labels))
    return found


def _roots(
    loss: LossSpec, z: Float[np.ndarray, "..."], label: Any, others: Sequence[Any], scales: Float[np.ndarray, " T"]
) -> list[tuple[float, Any]]:
    """(t, y) other than (1, label), y of `others`, with <t dL/dz(t z, y), dL/dz(z, label)> = ||dL/dz(z, label)||^2."""
    pulls = _pulls(loss)
    here = np.asarray(pulls(z, np.ones(1), label))[0]
    found = []
    for other in others:

        def excess(t: float | Float[np.ndarray, " T"], other: Any = other) -> Float[np.ndarray, " S"]:
            return np.asarray(pulls(z, np.atleast_1d(t), other)) @ here / (here @ here) - 1.0

        values = excess(scales)
        for k in np.flatnonzero((values[:-1] * values[1:] < 0) & (scales[:-1] * scales[1:] > 0)):
            low, high, rising = scales[k], scales[k + 1], values[k] < 0
            for _ in range(60):
                middle = 0.5 * (low + high)
                below = (excess(middle)[0] < 0) == rising
                low, high = (middle, high) if below else (low, middle)
            found.append((0.5 * (low + high), other))
        found += [(-1.0, other)] if scales[-1] == -1.0 and abs(values[-1]) < 1e-6 else []
    return [(t, y) for t, y in found if not np.array_equal(y, label) or abs(t - 1) > 1e-4]


@keep(8)
def _pulls(loss: LossSpec) -> Callable[..., Float[Array, "T K"]]:
    """(z, t (T,), label) -> t dL/dz(t z), flat, (T, K)."""

    def pulls(z: Float[Array, "..."], t: Float[Array, " T"], label: Shaped[Array, "..."]) -> Float[Array, "T K"]:
        return jax.vmap(lambda s: s * jnp.ravel(jax.grad(read_loss(loss))(s * z, label)))(t)

    return jax.jit(pulls)


def _norm(gradients: Mapping[str, Float[Array, "..."]]) -> float:
    return float(np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients))))
