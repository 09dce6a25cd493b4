"""The linear system that one segment puts on its input, as a matrix-free operator.

With z = f(theta, x) and dz = dL/dz known, the input x of a segment obeys (R-GAP, arXiv 2010.07733, eqs. 6-9)

    forward constraints     f(theta, x) - f(theta, 0)                     = z - f(theta, 0)
    gradient constraints    d/dtheta <dz, f(theta, x)> - (same at x = 0)  = g - (same at x = 0)

Both are affine in x, whatever f is made of, and come out of automatic differentiation: no matrix is ever built.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Int

from leakjax.models.activations import Preimage
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.reader import Arrays
from leakjax.segments.chain import Segment

BLOCKS = ("forward", "gradient")
"""The constraints that a segment puts on its input, by the names of their rows."""

_CONSTANT_SHARE = 1e-3  # of a gradient's size: what its part that depends on x counts for at least

_NOTHING = 1e-4
"""Of the largest gradient's size: a block below it counts less than the others, and rounding in float32, 6e-8, comes to
no more than 6e-4 of a row."""

Rows = tuple[Float[Array, "..."], Mapping[str, Float[Array, "..."]]]

Labels = Int[np.ndarray | Array, "B ..."] | Float[np.ndarray | Array, "B ..."]
"""Classes of B examples, or what their logits are compared with."""


class LayerSystem(NamedTuple):
    """operator(x) = vector, in rows (forward, {path: gradient}), each multiplied by its weight; 0 drops a row.

    `weight`: of the forward rows."""

    operator: lx.AbstractLinearOperator
    vector: Rows
    weight: Float[Array, "..."]


def segment_rows(
    segment: Segment,
    variables: Arrays,
    dz: Float[Array, "..."],
    x: Float[Array, "..."],
    smoothing: float | Float[Array, ""] | None = None,
) -> Rows:
    """(f(theta, x), d/dtheta <dz, f(theta, x)>): what the input x of a segment would show of itself."""
    weights = {path: variables[path] for path in segment.paths}
    z, pull = jax.vjp(lambda w: segment.function({**variables, **w}, x, smoothing), weights)
    if segment.statistics is not None and not segment.normalizes:  # parameters before a sum act through it
        pull = jax.vjp(lambda w: segment.whole({**variables, **w}, x, smoothing), weights)[1]
    return z, pull(dz)[0]


def layer_system(
    segment: Segment,
    variables: Arrays,
    preimage: Preimage,
    dz: Float[Array, "..."],
    gradient: Mapping[str, Float[Array, "..."]],
    slope_floor: float = 0.0,
    blocks: tuple[str, ...] = BLOCKS,
) -> LayerSystem:
    """The weighted system on the input of `segment`.

    Arguments: `preimage`, of the activation at the segment's output; `dz`, dL/dz, 0 where its slope is not known;
    `gradient`, dL/dtheta by path; `slope_floor`, the slope far above which rounding does not matter; `blocks`, which
    of `BLOCKS` to use: the rows of the others get weight 0.

    The weights match the noise: an error e in x_next is an error e / act'(z) in z, so forward rows are multiplied by
    act'(z) / sqrt(act'(z)^2 + slope_floor^2) where a floor is given (equal weights condition the system better, and
    are as good where noise is far below what matters), else by act'(z); the client's rounding of d/dtheta <dz, f> is
    proportional to ||dz||, so gradient rows are divided by it. Both blocks are then divided by the rms of their
    right-hand sides; where x has no part in a gradient, and rounding alone is left of it, that is not blown up. Rows
    that depend on an entry of z or dz that is not known get weight 0.
    """
    zero = jnp.zeros(segment.input.shape, dz.dtype)
    origin, bias = segment_rows(segment, variables, dz, zero)
    damped = jnp.sqrt(preimage.slope**2 + slope_floor**2) if slope_floor else 1.0
    forward_weight = jnp.where(preimage.known & ("forward" in blocks), preimage.slope / damped, 0.0)
    # Bilinear in dz and x: what depends on a hidden entry of dz is 0 for no random pair, but with probability 0.
    anywhere, weights = (
        jax.random.uniform(jax.random.key(k), a.shape, dz.dtype, 0.5, 1.5) for k, a in ((1, zero), (2, dz))
    )
    hidden = jnp.where(preimage.slope_known, 0.0, weights)
    touched = segment_rows(segment, variables, hidden, anywhere)[1]
    scale = _safe_inverse(jnp.linalg.norm(jnp.ravel(dz))) * ("gradient" in blocks)
    gradient_weight = {path: jnp.where(touched[path] == 0, scale, 0.0) for path in segment.paths}
    forward = forward_weight * (preimage.value - origin)
    grads = {path: gradient_weight[path] * (gradient[path] - bias[path]) for path in segment.paths}
    over_forward = _inverse_or_one(_rms([forward]))
    whole = _rms([gradient_weight[path] * gradient[path] for path in segment.paths])
    over_grads = _inverse_or_one(jnp.maximum(_rms(list(grads.values())), _CONSTANT_SHARE * whole))

    def rows(x: Float[Array, "..."]) -> Rows:
        z, g = segment_rows(segment, variables, dz, x)
        return (
            over_forward * forward_weight * (z - origin),
            {path: over_grads * gradient_weight[path] * (g[path] - bias[path]) for path in segment.paths},
        )

    _, linear = jax.linearize(rows, zero)
    operator = lx.FunctionLinearOperator(linear, jax.eval_shape(lambda: zero))
    vector = (over_forward * forward, {p: over_grads * grads[p] for p in segment.paths})
    return LayerSystem(operator, vector, over_forward * forward_weight)


def over_gradients(gradients: Mapping[str, Float[Array, "..."]], paths: Sequence[str]) -> dict[str, Float[Array, ""]]:
    """1 / rms of every gradient of `paths`; one that is nothing beside the others, as that of a bias before a batch
    norm, is rounding, and is not blown up."""
    sizes = {p: _rms([gradients[p]]) for p in paths}
    least = _NOTHING * jnp.max(jnp.stack([*sizes.values(), jnp.asarray(0.0)]))
    return {p: _inverse_or_one(jnp.maximum(size, least)) for p, size in sizes.items()}


def _rms(arrays: list[Float[Array, "..."]]) -> Float[Array, ""]:
    size = sum(a.size for a in arrays)
    return jnp.sqrt(sum(jnp.sum(a**2) for a in arrays) / max(size, 1))


def _inverse_or_one(a: Float[Array, ""]) -> Float[Array, ""]:
    """1 / a; 1 where all right-hand sides are 0: the rows of a black image say that it is black."""
    return jnp.where(a > 0, 1.0 / jnp.where(a > 0, a, 1.0), 1.0)


def _safe_inverse(a: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(a > 0, 1.0 / jnp.where(a > 0, a, 1.0), 0.0)


def loss_pull(
    segment: Segment, variables: Arrays, loss: LossSpec, z: Float[Array, "*z"], labels: Labels
) -> Float[Array, "*z"]:
    """dL/dz at the last segment's pre-activation z (B, K), L the mean loss of B examples, and their labels (B, ...)."""

    def of_z(z: Float[Array, "*z"]) -> Float[Array, ""]:
        logits = segment.activation.function(variables, z).reshape(len(labels), -1)
        return jnp.mean(jax.vmap(read_loss(loss))(logits, labels))

    return jax.grad(of_z)(z)
