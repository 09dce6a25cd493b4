"""Factors of the maps of a model's segments: made once for its weights, shared by all clients."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.problem import Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.memory import available_bytes, working_device
from leakjax.runtime.programs import Shelf, keep
from leakjax.segments.chain import Segment
from leakjax.solvers.normal_factor import MOST_WEAK, NormalFactor, factor_map

_PRODUCTS = 32  # inputs that F and F^T are applied to at once
_KEPT = 8  # factors: a model has two or three layers that take one
_SHARE = 4 * _KEPT
"""Of the free memory, of this machine and of the device that computes, what one factor may take: a quarter for all of
them. While one is made, its matrix stands beside it, and copies that move to the device."""

_FACTORS: Shelf[tuple[NormalFactor | None]] = Shelf(_KEPT)


def factor_of(problem: Problem, segment: Segment) -> NormalFactor | None:
    """The factor of a segment's map on one example; None where it has none, or where its activation hides outputs."""
    shape, one = segment.input.shape, segment.input.shape[1:]
    if len(shape) < 3 or np.prod(segment.output.shape) < np.prod(shape) - MOST_WEAK:
        return None
    if segment.activation.is_flat(dict(problem.variables), problem.dtype):
        return None
    key = (segment, _digest(problem))
    known = _FACTORS.get(key)
    if known is not None:
        return known[0]
    program = _gram(segment)

    def gram(v: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
        padded = np.concatenate([v, np.zeros((-len(v) % _PRODUCTS, v.shape[1]))])
        parts = [program(dict(problem.variables), part) for part in padded.reshape(-1, _PRODUCTS, *one)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(v)]

    try:
        found = factor_map(gram, one, min(available_bytes(), available_bytes(working_device())) // _SHARE)
    except MemoryError:  # there may be more of it next time
        return None
    return _FACTORS.put(key, (found,))[0]


def _digest(problem: Problem) -> bytes:
    """Of all variables: the same for the same weights."""
    if "digest" not in problem.shared:
        found = hashlib.blake2b()
        for path in sorted(problem.variables):
            found.update(path.encode())
            found.update(np.ascontiguousarray(_numbers(problem.variables[path])).tobytes())
        problem.shared["digest"] = found.digest()
    return problem.shared["digest"]


def _numbers(a: Any) -> Any:
    """An array, or the numbers of random keys."""
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


@keep(32)
def _gram(segment: Segment) -> Any:
    """F^T F v, flat, of several inputs v of the first example; the others are alike."""

    def gram(variables: Arrays, v: Float[Array, "k ..."]) -> Float[Array, "k n"]:
        def of_one(v: Float[Array, "..."]) -> Float[Array, " n"]:
            zero = jnp.zeros(segment.input.shape, v.dtype)
            _, tangent = jax.linearize(lambda x: segment.function(variables, x), zero)
            return jnp.ravel(jax.linear_transpose(tangent, zero)(tangent(zero.at[0].set(v)))[0][0])

        return jax.vmap(of_one)(v)

    return jax.jit(gram)
