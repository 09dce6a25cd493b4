"""What an attacker gets back from one gradient near an audited image: pictures of the numbers that an audit states.

With the natural prior x ~ N(1/2, S), S = R R^T, and noise of deviation s in every entry of the gradient, the estimate
of least mean squared error near the image x is, in coordinates x = 1/2 + R u and with R^T G R = W diag(l) W^T,

    u' = W diag(l / (l + s^2)) W^T u + W diag(s sqrt(l) / (l + s^2)) e,    e ~ N(0, 1)

(linear in the gradient; e is one draw of the noise). Without noise the directions of the gradient's rank come back as
they are, and of the others the prior's mean alone.
"""

import numpy as np
from jaxtyping import Float

from leakjax.leakage.dense import Leakage, WithPrior
from leakjax.report.audit.record import Picture

MIDDLE = 0.5  # of pixels in [0, 1]: the prior's mean


def picture(
    leakage: Leakage, prior: WithPrior, pixels: Float[np.ndarray, "B H W C"], sigma: float | None, seed: int
) -> Picture:
    """What comes back of `pixels` in [0, 1] at noise `sigma`, None or 0 for none."""
    inner = np.linalg.solve(prior.root, (pixels - MIDDLE).ravel())
    along = prior.vectors.T @ inner
    if sigma:
        gain = prior.values / (prior.values + sigma**2)
        noise = np.random.default_rng(seed).normal(size=gain.shape)
        along = gain * along + sigma * np.sqrt(prior.values) / (prior.values + sigma**2) * noise
    else:  # ascending: the last `rank` directions are those that the gradient sees
        along = np.where(np.arange(along.size) >= along.size - leakage.rank, along, 0.0)
    image = MIDDLE + (prior.root @ (prior.vectors @ along)).reshape(pixels.shape)
    return Picture(sigma=sigma or None, image=np.clip(image, 0.0, 1.0))
