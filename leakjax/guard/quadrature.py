"""Lanczos quadrature: what error noise leaves an attacker, from a few products with the update's derivative."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from leakjax.guard.derivative import Derivative, each
from leakjax.solvers.lapack import eigh


def errors_at_least(
    j: Derivative, starts: Float[Array, "k n"], ridge: float, steps: int, blocks: int
) -> Float[Array, " blocks"]:
    """Stochastic Lanczos quadrature of (b/n) tr_i t (J^T J + t)^-1, t = `ridge`, tr_i over the pixels of the i-th of b
    `blocks` of the batch (its images, or the whole as one): mean over k of a m-point Gauss rule for
    v^T t (J^T J + t)^-1 v / ||v||^2, v of random signs on the block and 0 outside.

    A Gauss rule never exceeds its integral here, whatever the number m of `steps`, so but for the sampling the error is
    a lower bound and the PSNR an upper one; relative standard deviation of a block's sampling at most
    sqrt(2 b / (k n e)), e its result. b k m forward and reverse passes of the whole batch, 16 of them together.
    Reference: Golub & Meurant, Matrices, Moments and Quadrature, 2010, theorem 6.2 and chapter 11.
    """
    count, size = starts.shape

    def rule(which: Array) -> Array:
        block = jnp.arange(size) // (size // blocks)
        v = jnp.where(block == which % blocks, starts[which // blocks], 0.0)
        values, vectors = eigh(_lanczos(lambda d: j.adjoint(j.forward(d)), v, steps))
        return jnp.sum(vectors[0] ** 2 * ridge / (jnp.maximum(values, 0.0) + ridge))

    return jnp.mean(each(rule, jnp.arange(count * blocks), steps).reshape(count, blocks), axis=0)


def _lanczos(apply: Callable[[Array], Array], v: Array, steps: int) -> Float[Array, "m m"]:
    """The tridiagonal matrix of m = `steps` Lanczos steps from v, each orthogonalized twice; 0 after a breakdown.

    Not matfree's, which divides by the length that a breakdown makes 0: an update that does not depend on a block of
    the batch would score NaN, and the guard would block what leaks nothing.
    """
    eps = jnp.finfo(v.dtype).eps
    basis, diagonal, beside = [v / jnp.linalg.norm(v)], [], []
    for _ in range(steps):
        image, before = apply(basis[-1]), jnp.stack(basis)
        diagonal.append(basis[-1] @ image)
        rest = image - (before @ image) @ before
        rest = rest - (before @ rest) @ before
        size = jnp.linalg.norm(rest)
        size = jnp.where(size > 10 * eps * jnp.linalg.norm(image), size, 0.0)
        basis.append(jnp.where(size > 0, rest / jnp.where(size > 0, size, 1.0), 0.0))
        beside.append(size)
    off = jnp.diag(jnp.stack(beside)[:-1], 1) if steps > 1 else jnp.zeros((1, 1), v.dtype)
    return jnp.diag(jnp.stack(diagonal)) + off + off.T
