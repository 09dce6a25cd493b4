"""Attacks by name: each turns a `Problem` into an `Outcome` an example. Adding one adds a line to `ATTACKS`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from leakjax.attacks.copa import copa
from leakjax.attacks.layerwise.rconv import rconv
from leakjax.attacks.layerwise.rgap import rgap
from leakjax.attacks.matching.dlg import dlg
from leakjax.attacks.matching.hybrid import hybrid
from leakjax.attacks.matching.idlg import idlg
from leakjax.attacks.matching.inverting_gradients import inverting_gradients
from leakjax.attacks.matching.match import match
from leakjax.attacks.problem import Monitor, Outcome, Problem


class Attack(NamedTuple):
    """An attack, what `leakjax list attacks` says of it, and what it takes.

    - `run` returns an `Outcome` an example, gradient after gradient;
    - `layerwise`: it needs the model as a chain of segments;
    - `polished`: its answer to a noisy gradient is moved to the best fit, which has an error estimate; the baselines'
      answers stay what their papers find.
    """

    run: Callable[[Problem, Monitor], list[Outcome]]
    summary: str
    layerwise: bool
    polished: bool = False


ATTACKS: Mapping[str, Attack] = {
    "copa": Attack(
        copa, "rgap, with deficient layers pulled back through the ones before (COPA, arXiv 2111.10178)", True, True
    ),
    "dlg": Attack(dlg, "baseline: image and soft label matched by L-BFGS (DLG, arXiv 1906.08935)", False),
    "hybrid": Attack(
        hybrid, "rgap, then gradient matching with the first layer's system and a prior (arXiv 2210.13231)", True
    ),
    "idlg": Attack(idlg, "baseline: the label from the head, then DLG on the image (iDLG, arXiv 2001.02610)", False),
    "inverting_gradients": Attack(
        inverting_gradients, "baseline: cosine distance and total variation, signed Adam (arXiv 2003.14053)", False
    ),
    "match": Attack(
        match, "whole gradients matched from noise by Levenberg-Marquardt; any batch, any model", False, True
    ),
    "rconv": Attack(rconv, "baseline: gradient constraints, but at the first layer (R-CONV, arXiv 2406.04227)", True),
    "rgap": Attack(rgap, "layer-wise linear systems, last layer to first (R-GAP, arXiv 2010.07733)", True),
}
"""Attacks by name."""

DEFAULT_ATTACK = "copa"
