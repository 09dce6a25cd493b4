"""What counts as rounding: the tolerances that decide a certificate, each with the reason for its value.

u is the larger of the solver's and of the client's unit of rounding (`rounding`): 2e-16 in float64, 1e-7 where a client
computed in float32. An entry of a gradient is a sum of products over examples, positions and channels; m terms of
random rounding errors leave a relative error of sqrt(m) u (Higham, Accuracy and Stability of Numerical Algorithms,
section 2.8), and m is at most some 1e6 in the layers that are read: 1e3 u. Their exact values should not
matter: tests/test_tolerances.py moves each by a factor of three, either way.
"""

import dataclasses
from typing import Any

import numpy as np

from leakjax.solvers.linear import PROBE_LOSS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Tolerances of one problem; relative to the size of what they measure, where nothing else is said.

    - `solve`: 2 eps of the solver's dtype, where a residual no longer falls: that of the solver's own products.
    - `rounding`: u.
    - `summed`: 1e3 u, the rounding of a sum, no less than 1e-9: what is solved behind an ill-conditioned layer (1e6)
      has lost as many digits.
    - `matched`: residual under which a system or a gradient counts as matched: 1e3 u between 1e-6 and 1e-2. The floor
      is what a recursion through layers with conditions up to 1e9 leaves in float64; that such an answer is good is
      asked of condition times residual (`error`), not of this. At the ceiling a fit has two digits; nothing worse
      explains a gradient, however coarse its numbers.
    - `kinked`: residual from which on a piecewise-linear layer that was solved has an entry on the wrong side of a
      kink, 30 u or 1e-9: what is solved with the right sides is fitted to a few u, and one wrong entry of n leaves
      about n^(-1/2) of its own size.
    - `clean`: residual up to which a solve counts as undisturbed, 100 u or 1e-9: see `layerwise.chunks.run_chunks`.
    - `error`: estimated relative error (condition times residual) up to which a layer counts as solved: 60 dB.
    - `same_gradient`: difference of two gradients, parameter by parameter, that a symmetry of the network leaves: 30 u,
      no less than 1e-10 and no more than `same_at_most`, since half precision would call many images alike that an
      estimate tells apart.
    - `same_at_most`: 1e-5, which is also where `half` ends.
    - `symmetric`: the same of gradients at a noisy answer, both computed here in float64: some 1e6 eps.
    - `alike`: of the input range (of the size, for solutions of a layer): two images that differ by less are one. Each
      was solved to `error` at worst and to 1e-9 as a rule; two roots that are nearer than 1e-6 meet in a double root,
      where the rank is not full.
    - `open_step`, `open_answers`: change of the gradient, to first order, of a difference that lies in open directions:
      that of an image moved by a symmetry, exact but for rounding; that of two answers, each solved by itself.
    - `open_far`: change of the gradient a step of the input range along open directions that counts as none, a tenth
      of `matched` and no less than 1e-7: above it the set of images is curved.
    - `kink_step`, `kink_change`: how far from an answer, in units of the range, its derivative is looked at again, and
      by how much it may differ: a smooth one changes by about the step, one with a kink by a share of its size.
    - `probe`: share of a random probe that is lost up to which a system has no null space: `solvers.linear.PROBE_LOSS`.
    - `slack`: of the input range: how far beyond it an entry may lie. It is about one step of an 8-bit image (1/255).
    - `half`: client rounding above which no answer is exact: between float32 (1e-7) and half precision (5e-4).
    """

    solve: float
    rounding: float
    summed: float
    matched: float
    kinked: float
    clean: float
    same_gradient: float
    open_far: float
    error: float = 1e-3
    same_at_most: float = 1e-5
    symmetric: float = 1e-9
    alike: float = 1e-6
    open_step: float = 1e-8
    open_answers: float = 1e-6
    kink_step: float = 1e-9
    kink_change: float = 1e-3
    probe: float = PROBE_LOSS
    slack: float = 5e-3
    half: float = 1e-5

    @property
    def coarse(self) -> bool:
        """Whether the client rounds so much that no answer is exact."""
        return self.rounding > self.half

    @classmethod
    def of(cls, dtype: Any, client: float) -> "Tolerances":
        """Those of solves in `dtype` on gradients of relative rounding `client`."""
        eps = float(np.finfo(dtype).eps)
        u = max(client, eps)
        matched = float(np.clip(1e3 * u, 1e-6, 1e-2))
        return cls(
            solve=2 * eps,
            rounding=u,
            summed=max(1e-9, 1e3 * u),
            matched=matched,
            kinked=max(1e-9, 30 * u),
            clean=max(1e-9, 100 * u),
            same_gradient=float(np.clip(30 * u, 1e-10, cls.same_at_most)),
            open_far=max(1e-7, matched / 10),
        )
