"""What an attacker gets back from one gradient near an audited image: pictures, and how good they are.

With the natural prior x ~ N(1/2, S), S = R R^T, and noise of deviation s in every entry of the gradient, the estimate
of least mean squared error near the image x is, with R^T G R = W diag(l) W^T and x = 1/2 + R W a,

    a' = l / (l + s^2) a + s sqrt(l) / (l + s^2) e,    e ~ N(0, 1)

(linear in the gradient; e is one draw of the noise). Without noise the directions of the gradient's rank come back as
they are, and of the others the prior's mean alone. The mean over the prior of its error is `variance_with_prior`; an
image that is smoother than the prior's comes back better than that, and how much better is said here.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from leakjax.leakage.dense import Leakage, WithPrior
from leakjax.report.audit.record import Picture

MIDDLE = 0.5  # of pixels in [0, 1]: the prior's mean


def pictures(
    leakage: Leakage, prior: WithPrior, pixels: Float[np.ndarray, "B H W C"], noise: Sequence[float], seed: int
) -> tuple[Picture, ...]:
    """What comes back of `pixels` in [0, 1]: without noise, then at each level of `noise`.

    The `psnr` of each is that of the best of the B images, in dB: expected over the noise, or what this draw gives, cut
    to [0, 1], where that is more.
    """
    along = np.linalg.solve(prior.basis, (pixels - MIDDLE).ravel())
    draw = np.random.default_rng(seed).normal(size=along.size)

    def seen(sigma: float | None, kept: np.ndarray, spread: np.ndarray | float) -> Picture:
        image = np.clip(MIDDLE + (prior.basis @ (kept * along + spread * draw)).reshape(pixels.shape), 0.0, 1.0)
        bias, deviations = prior.basis @ ((kept - 1.0) * along), spread * np.ones(along.size)
        expected = bias**2 + prior.basis**2 @ deviations**2
        errors = [s.reshape(len(pixels), -1).mean(axis=1).min() for s in (expected, (image - pixels) ** 2)]
        return Picture(sigma=sigma, image=image, psnr=-10 * np.log10(max(float(min(errors)), 1e-35)))

    # ascending: the last `rank` directions are those that the gradient sees
    ranked = (np.arange(along.size) >= along.size - leakage.rank).astype(float)
    found = [seen(None, ranked, 0.0)]
    for sigma in noise:
        total = prior.values + sigma**2
        found.append(seen(sigma, prior.values / total, sigma * np.sqrt(prior.values) / total) if sigma else found[0])
    return tuple(found)
