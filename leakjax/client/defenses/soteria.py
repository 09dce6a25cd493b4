"""Soteria (Sun et al., CVPR 2021, arXiv 2012.06043): the gradient of the last dense layer, pruned where it tells most.

With r the representation, the input of the last dense layer z = W^T r + b, the features i of a share of all with the
least

    s_i = sum_b ||d r_bi / d x_b||_2 / |r_bi|

(the solution of their problem 9 with the zero norm: max ||x - x'|| is where |r_i| / ||d r_i / d x|| is largest) are
sent as if r_i were 0: row i of dL/dW is 0. All other parameters' gradients are sent as they are. (The authors' program
prunes in the same order but for a denominator of r_bi + 0.1, which guards against division by 0.)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from leakjax.client.defenses.rounding import masked
from leakjax.errors import InputError, UnreadableModelError
from leakjax.models.reader import Model
from leakjax.runtime.arrays import to_device
from leakjax.segments.chain import Chain, read_chain


def soteria(model: Model, x: Float[Any, "B H W C"], pruned: float) -> optax.GradientTransformation:
    """The pruning for a client with images `x`: floor(pruned n) of n features are hidden.

    Raises `InputError` for a model whose last layer is not dense, or that cannot be read as segments.
    """
    return masked(soteria_mask(model, x, pruned))


def soteria_mask(model: Model, x: Float[Any, "B H W C"], pruned: float) -> Mapping[str, Array]:
    """{path of W: 0 in the rows (n, 1) of the hidden features, 1 elsewhere}; where W is (K, n), columns (1, n)."""
    images = to_device(x)
    chain = _chain(model, images.shape, images.dtype)
    head, variables = chain.segments[-1], model.variables
    outputs = int(np.prod(head.output.shape)) // len(images)
    kernels = [p for p in head.paths if variables[p].ndim == 2 and outputs in variables[p].shape]
    if head.nonlinearity is not None or len(kernels) != 1:
        raise InputError(f"defense 'soteria' needs a dense last layer; {head.name!r} is none")
    (path,) = kernels
    tall = variables[path].shape[1] == outputs

    def representation(x: Array) -> Float[Array, "B n"]:
        """dz_b0 / dW_i0 = r_bi."""
        for segment in chain.segments[:-1]:
            x = segment.activation.function(variables, segment.function(variables, x.reshape(segment.input.shape)))
        x = x.reshape(head.input.shape)

        def first(kernel: Array) -> Array:
            return head.function({**variables, path: kernel}, x).reshape(len(images), outputs)[:, 0]

        rows = jax.jacrev(first)(variables[path])
        return rows[:, :, 0] if tall else rows[:, 0, :]

    values, pull = jax.vjp(representation, images)
    units = jnp.eye(values.shape[1], dtype=values.dtype)

    def sizes(unit: Array) -> Array:
        (slope,) = pull(jnp.broadcast_to(unit, values.shape))
        return jnp.sqrt(jnp.sum(slope.reshape(len(images), -1) ** 2, axis=1))

    slopes = jax.lax.map(sizes, units, batch_size=16).T
    tiny = jnp.finfo(values.dtype).tiny
    scores = jnp.sum(slopes / jnp.maximum(jnp.abs(values), tiny), axis=0)
    hidden = jnp.argsort(scores)[: int(pruned * len(scores))]
    mask = jnp.ones(len(scores), values.dtype).at[hidden].set(0.0)
    return {path: mask[:, None] if tall else mask[None]}


def _chain(model: Model, shape: tuple[int, ...], dtype: Any) -> Chain:
    """The model as segments: what is traced cannot be read, so it is read beforehand."""
    try:
        return read_chain(model, shape[1:], dtype, shape[0], checked=False)
    except UnreadableModelError as error:
        words = "defense 'soteria' must find the last dense layer; the model cannot be read"
        raise InputError(f"{words}: {error}") from None
