"""The Jacobian of a gradient with respect to the images behind it, as a dense Gram matrix where that is small."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


def inverse_norms(gradients: Any) -> Any:
    """1 / ||g_p|| of every parameter; one whose gradient is rounding beside the others' counts as rounding."""
    floor = 1e4 * jnp.finfo(jax.tree.leaves(gradients)[0].dtype).eps * optax.tree.norm(gradients)
    return jax.tree.map(lambda g: 1.0 / jnp.maximum(jnp.linalg.norm(g), floor), gradients)


@functools.lru_cache(maxsize=16)
def jacobian_gram(gradient: Any) -> Any:
    """(variables, x, labels) -> J^T J (n, n), J the Jacobian of the gradient's parameters, each divided by its norm."""

    def build(variables: Any, x: Any, labels: Any) -> Array:
        at_x, tangent = jax.linearize(lambda x: gradient(variables, x, labels), x)
        over = inverse_norms(at_x)

        def weighted(d: Array) -> Any:
            return jax.tree.map(jnp.multiply, over, tangent(d))

        adjoint = jax.linear_transpose(weighted, x)
        columns = jnp.eye(x.size, dtype=x.dtype)
        return jax.lax.map(lambda e: jnp.ravel(adjoint(weighted(e.reshape(x.shape)))[0]), columns, batch_size=16)

    return jax.jit(build)
