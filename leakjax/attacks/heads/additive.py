"""dL/dz where a parameter is added to it: position embeddings, a bias at every position.

    z = f(theta, x) + J p,   J J^T diagonal and positive      =>      dL/dz = (J J^T)^{-1} J g_p,   g_p = J^T dL/dz

whatever lies between z and the loss: attention, normalizations, a loss that nobody knows. Of B examples g_p holds the
sum of their dL/dz.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.models.reader import Arrays
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment

_ROUNDINGS = 1e3
"""Roundings by which a product with J J^T may differ from the diagonal's; J's entries are sums of few terms."""


def additive_path(segment: Segment, variables: Arrays) -> str | None:
    """The parameter p of a segment for which df/dp is constant and J J^T diagonal and positive, J = df/dp of one
    example; None where there is none.

    J J^T 1 is the diagonal of a diagonal matrix, and one random vector tells any other matrix from it, but with
    probability 0.
    """
    outputs = int(np.prod(segment.output.shape[1:]))
    for path in segment.paths:
        if outputs <= variables[path].size <= 4 * outputs and _is_additive(segment, path, variables):
            return path
    return None


def _is_additive(segment: Segment, path: str, variables: Arrays) -> bool:
    generator, eps = np.random.default_rng(0), float(jnp.finfo(segment.output.dtype).eps)
    x, other = (generator.normal(size=segment.input.shape).astype(segment.input.dtype) for _ in range(2))
    r = generator.normal(size=segment.output.shape[1:]).astype(segment.output.dtype)
    pulled, again, diagonal, product = (np.asarray(a) for a in _probe(segment, path)(dict(variables), x, other, r))
    if not np.array_equal(pulled, again) or not np.all(diagonal > 0):
        return False
    return bool(np.all(np.abs(product - diagonal * r) <= _ROUNDINGS * eps * np.max(diagonal) * np.max(np.abs(r))))


def read_sum(segment: Segment, path: str, variables: Arrays, gradient: Any) -> Float[np.ndarray, "..."]:
    """The sum of dL/dz over the examples of a gradient, of the shape of one example's z, from that of `path`."""
    return np.asarray(_reader(segment, path)(dict(variables), jnp.asarray(gradient)))


def _maps(segment: Segment, path: str, variables: Arrays, x: Float[Array, "..."]) -> tuple[Any, Any]:
    """(J^T, J) at x, of example 0."""

    def output(p: Array) -> Float[Array, "..."]:
        return segment.function({**variables, path: p}, x)[0]

    p = variables[path]
    return lambda u: jax.vjp(output, p)[1](u)[0], lambda q: jax.jvp(output, (p,), (q,))[1]


@keep(64)
def _probe(segment: Segment, path: str) -> Callable[..., tuple[Array, Array, Array, Array]]:
    def run(
        variables: Arrays, x: Float[Array, "..."], other: Float[Array, "..."], r: Float[Array, "..."]
    ) -> tuple[Array, Array, Array, Array]:
        """(J^T r at x and elsewhere, J J^T 1, J J^T r)."""
        transposed, forward = _maps(segment, path, variables, x)
        pulled = transposed(r)
        again = _maps(segment, path, variables, other)[0](r)
        return pulled, again, forward(transposed(jnp.ones_like(r))), forward(pulled)

    return jax.jit(run)


@keep(64)
def _reader(segment: Segment, path: str) -> Callable[[Arrays, Array], Array]:
    def read(variables: Arrays, gradient: Array) -> Array:
        zero = jnp.zeros(segment.input.shape, segment.input.dtype)
        transposed, forward = _maps(segment, path, variables, zero)
        diagonal = forward(transposed(jnp.ones(segment.output.shape[1:], segment.output.dtype)))
        return forward(gradient.reshape(variables[path].shape)) / diagonal

    return jax.jit(read)
