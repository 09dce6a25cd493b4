"""LSMR with a record of its bidiagonalization.

Fong & Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", SIAM J. Sci. Comput. 33 (2011).
Written here, over a `lineax` operator, for one reason: the bidiagonal matrix that the algorithm builds holds the
operator's extreme singular values, and library versions throw it away.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from scipy.linalg import eigh_tridiagonal


class Lsmr(NamedTuple):
    """x = A^+ b, the number of steps, ||A x - b|| / ||b|| as estimated, and the bidiagonal (alpha_k, beta_k+1)."""

    x: Float[Array, "..."]
    steps: Int[Array, ""]
    residual: Float[Array, ""]
    alphas: Float[Array, " max_steps"]
    betas: Float[Array, " max_steps"]


class _State(NamedTuple):
    k: Int[Array, ""]
    x: Float[Array, "..."]
    u: PyTree[Float[Array, "..."]]
    v: Float[Array, "..."]
    h: Float[Array, "..."]
    hbar: Float[Array, "..."]
    scalars: tuple[Float[Array, ""], ...]
    norm_a2: Float[Array, ""]
    norm_r: Float[Array, ""]
    done: Bool[Array, ""]
    alphas: Float[Array, " max_steps"]
    betas: Float[Array, " max_steps"]


def lsmr(
    operator: lx.AbstractLinearOperator,
    b: PyTree[Float[Array, "..."]],
    *,
    tolerance: float | Float[Array, ""],
    max_steps: int,
    enough: Callable[[Float[Array, "..."]], Bool[Array, ""]] = lambda x: jnp.zeros((), bool),
) -> Lsmr:
    """Minimum-norm least-squares solution of A x = b, from x = 0.

    Stops when ||r|| <= tol (||A|| ||x|| + ||b||) or ||A^T r|| <= tol ||A|| ||r||, when `enough(x)`, or after
    `max_steps`.
    """
    norm = optax.tree.norm
    adjoint = operator.transpose().mv
    dtype = operator.in_structure().dtype
    one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)

    def normalized(a: PyTree[Float[Array, "..."]]) -> tuple[PyTree[Float[Array, "..."]], Float[Array, ""]]:
        size = norm(a)
        return optax.tree.scale(1.0 / jnp.where(size > 0, size, 1.0), a), size

    u, beta = normalized(b)
    norm_b = beta
    v, alpha = normalized(adjoint(u))
    # (alpha, alphabar, rho, rhobar, cbar, sbar, zeta, zetabar) and the recurrence of ||r||:
    # (betadd, betad, rhodold, tautildeold, thetatilde)
    scalars = (alpha, alpha, one, one, one, zero, zero, alpha * beta, beta, zero, one, zero, zero)
    record = jnp.zeros(max_steps + 1, dtype)
    start = _State(
        k=jnp.zeros((), jnp.int32),
        x=jax.tree.map(jnp.zeros_like, v),
        u=u,
        v=v,
        h=v,
        hbar=jax.tree.map(jnp.zeros_like, v),
        scalars=scalars,
        norm_a2=alpha**2,
        norm_r=beta,
        done=(alpha * beta) == 0,
        alphas=record.at[0].set(alpha),
        betas=record,
    )

    def step(s: _State) -> _State:
        alpha, alphabar, rho, rhobar, cbar, sbar, zeta, zetabar, betadd, betad, rhodold, tautildeold, thetatilde = (
            s.scalars
        )
        u, beta = normalized(jax.tree.map(lambda a, u: a - alpha * u, operator.mv(s.v), s.u))
        v, alpha = normalized(jax.tree.map(lambda a, v: a - beta * v, adjoint(u), s.v))
        rho_old, rhobar_old, zeta_old, thetatilde_old = rho, rhobar, zeta, thetatilde
        c, sn, rho = _rotation(alphabar, beta)
        theta, alphabar = sn * alpha, c * alpha
        thetabar = sbar * rho
        cbar, sbar, rhobar = _rotation(cbar * rho, theta)
        zeta, zetabar = cbar * zetabar, -sbar * zetabar
        hbar = jax.tree.map(lambda h, g: h - (thetabar * rho / (rho_old * rhobar_old)) * g, s.h, s.hbar)
        x = jax.tree.map(lambda x, g: x + (zeta / _nonzero(rho * rhobar)) * g, s.x, hbar)
        h = jax.tree.map(lambda v, h: v - (theta / _nonzero(rho)) * h, v, s.h)
        betahat, betadd = c * betadd, -sn * betadd
        ctilde, stilde, rhotilde = _rotation(rhodold, thetabar)
        thetatilde, rhodold = stilde * rhobar, ctilde * rhobar
        betad = -stilde * betad + ctilde * betahat
        tautildeold = (zeta_old - thetatilde_old * tautildeold) / _nonzero(rhotilde)
        tau = (zeta - thetatilde * tautildeold) / _nonzero(rhodold)
        norm_r = jnp.sqrt((betad - tau) ** 2 + betadd**2)
        norm_a2 = s.norm_a2 + beta**2
        norm_a = jnp.sqrt(norm_a2)
        solved = norm_r <= tolerance * (norm_a * norm(x) + norm_b)
        least = jnp.abs(zetabar) <= tolerance * norm_a * norm_r
        k = s.k + 1
        scalars = (
            alpha, alphabar, rho, rhobar, cbar, sbar, zeta, zetabar, betadd, betad, rhodold, tautildeold, thetatilde,
        )  # fmt: skip
        done = solved | least | enough(x) | (alpha == 0) | (beta == 0) | (k >= max_steps)
        return _State(
            k=k, x=x, u=u, v=v, h=h, hbar=hbar, scalars=scalars, norm_a2=norm_a2 + alpha**2, norm_r=norm_r, done=done,
            alphas=s.alphas.at[k].set(alpha), betas=s.betas.at[k - 1].set(beta),
        )  # fmt: skip

    end = jax.lax.while_loop(lambda s: ~s.done, step, start)
    return Lsmr(x=end.x, steps=end.k, residual=end.norm_r / _nonzero(norm_b), alphas=end.alphas, betas=end.betas)


def extreme_singular_values(
    alphas: Float[np.ndarray, " max_steps"], betas: Float[np.ndarray, " max_steps"], steps: int
) -> tuple[float, float]:
    """(smallest, largest) singular value of the bidiagonal that `steps` steps of LSMR recorded.

    The largest approaches the operator's own from below, the smallest its smallest non-zero one from above.
    """
    if steps < 1:
        return float(alphas[0]), float(alphas[0])
    a, b = np.asarray(alphas[:steps], float), np.asarray(betas[:steps], float)
    diagonal, off = a**2 + b**2, a[1:] * b[:-1]
    low = eigh_tridiagonal(diagonal, off, eigvals_only=True, select="i", select_range=(0, 0))[0]
    high = eigh_tridiagonal(diagonal, off, eigvals_only=True, select="i", select_range=(steps - 1, steps - 1))[0]
    return float(np.sqrt(max(low, 0.0))), float(np.sqrt(high))


def _rotation(a: Float[Array, ""], b: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    r = jnp.hypot(a, b)
    safe = _nonzero(r)
    return jnp.where(r > 0, a / safe, 1.0), b / safe, r


def _nonzero(a: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(a == 0, jnp.ones_like(a), a)
