"""Fewer numbers, or fewer bits of each: pruning, signs and stochastic quantization."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from leakjax.client.defenses.noise import randomized


def top_k(pruned: float) -> optax.GradientTransformation:
    """Of every parameter's gradient the entries of largest magnitude, all others 0.

    ceil((1 - pruned) n) of n entries are kept, one at least.

    Reference: Lin et al., "Deep gradient compression", ICLR 2018, arXiv 1712.01887, algorithm 1 (its threshold is a
    parameter's own); as a defense, Zhu et al., "Deep leakage from gradients", NeurIPS 2019, arXiv 1906.08935.
    """

    def keep(g: Array) -> Array:
        count = max(1, math.ceil((1.0 - pruned) * g.size - 1e-9))
        largest = jax.lax.top_k(jnp.abs(jnp.ravel(g)), count)[1]
        kept = jnp.zeros(g.size, bool).at[largest].set(True)
        return jnp.where(kept.reshape(g.shape), g, jnp.zeros_like(g))

    return optax.stateless(lambda updates, params: jax.tree.map(keep, updates))


def sign() -> optax.GradientTransformation:
    """sign(g), entry by entry: `optax.scale_by_sign`.

    Reference: Bernstein et al., "signSGD", ICML 2018, arXiv 1802.04434, algorithm 1.
    """
    return optax.scale_by_sign()


def qsgd(key: Array, levels: float) -> optax.GradientTransformation:
    """||g_p|| sign(g) q / levels, q one of the two integers about levels |g| / ||g_p||, at random so that E[q] is it.

    Unbiased; ||g_p|| is that of the parameter's whole gradient.

    Reference: Alistarh et al., "QSGD", NeurIPS 2017, arXiv 1610.02132, equation 4 of section 3.1.
    """

    def quantize(k: Array, g: Float[Array, "..."]) -> Array:
        norm = jnp.linalg.norm(g)
        steps = levels * jnp.abs(g) / jnp.where(norm > 0, norm, 1.0)
        low = jnp.floor(steps)
        up = jax.random.uniform(k, g.shape, g.dtype) < steps - low
        return (norm / levels * jnp.sign(g) * (low + up.astype(g.dtype))).astype(g.dtype)

    return randomized(key, quantize)


def masked(mask: Any) -> optax.GradientTransformation:
    """g times `mask`, a dict of arrays by parameter that broadcast against it; a parameter without one stays."""

    def update(updates: Any, params: Any) -> Any:
        del params
        return {p: g * mask[p].astype(g.dtype) if p in mask else g for p, g in updates.items()}

    return optax.stateless(update)
