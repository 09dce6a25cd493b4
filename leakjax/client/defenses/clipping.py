"""Clipping, alone and with the noise that makes it differentially private."""

import optax
from jaxtyping import Array


def clip(norm: float) -> optax.GradientTransformation:
    """g min(1, norm / ||g||), ||g|| over all parameters: `optax.clip_by_global_norm`."""
    return optax.clip_by_global_norm(norm)


def dp_sgd(key: Array, clip: float, noise_multiplier: float) -> optax.GradientTransformation:
    """(1/B) (sum_b g_b min(1, clip / ||g_b||) + noise_multiplier clip n), of the gradients g_b of B examples.

    Optax's own: it takes gradients with a leading axis of examples and returns their mean.

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, arXiv 1607.00133, algorithm 1.
    """
    return optax.contrib.differentially_private_aggregate(clip, noise_multiplier, key=key)
