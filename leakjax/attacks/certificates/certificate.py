"""What an outcome proves: its certificate, from residuals, ranks and other images alone. No truth is used."""

import dataclasses

import numpy as np
from jaxtyping import Float

from leakjax.attacks.certificates.constants import hidden_constants
from leakjax.attacks.certificates.multiples import MULTIPLES
from leakjax.attacks.problem import Outcome, Problem
from leakjax.models.losses import UNKNOWN
from leakjax.reconstruction import Certificate, LayerInfo

SOLVED = ("determined", "pulled_back")
OWN = 1 - 1e-6
"""Share of every entry that a gradient of several examples must determine for one of them to stand by itself."""

_HEAD = "no explanation of the last layer's gradient stands: check the loss, the labels given and the weights"
_LAYER = (
    "the equations of {layer} contradict each other: check that the gradient is of these weights, of this loss, of one "
    "step and in this order of layers, or tell the noise (gradient_noise, --gradient-noise)"
)
_UNMATCHED = (
    "the gradient of the answer is not the one that was sent: check the loss, the weights and the number of examples, "
    "or try attack='match' (--attack match) with other starts"
)
_STALLED = "the search from {layer} ended far from the gradient that was sent: try more starts or another seed"
_OUTSIDE = "the only answer leaves the input range: check input_range (--input-range) and the loss"
_APPROXIMATE = (
    "the gradient is matched up to {left:.1e} of its size, which is noise or rounding: the estimate is what that "
    "does to the image, give or take {spread:.1f} dB"
)
_COARSE = "the gradient was rounded to half precision, and what that does to the image could not be estimated"
_CURVED = (
    "{free} directions are open at this answer, and the images that match the gradient form a curved set: nothing that "
    "holds far from this answer is known of any entry"
)
_KINK = "the answer lies on a kink of the network, and what its derivative says holds on neither side of it"
_FLAT = "{free} directions leave no trace in the gradient"
_SEVERAL = "{count} images have this gradient"
_FOUND = "at least {count} images have this gradient, and nothing says that there are no others"
_SYMMETRIC = "another {group} has the same gradient: at least {count} images have it, and there may be others"
_RAY = (
    "every multiple of this image has this gradient, times a factor that the last layer does not show: tell the "
    "factor, 1 where there is none (gradient_scale, --gradient-scale)"
)
_FREE = (
    "every multiple of this image has this gradient, with another target or times a factor: give the targets "
    "(labels=..., what the loss compares the outputs with), or the factor of an autoencoder's gradient (gradient_scale)"
)
_TIED = (
    "the image and a factor of the gradient are known together only: tell the factor, 1 where there is none "
    "(gradient_scale, --gradient-scale)"
)
_LABELS = "the label and the factor of the gradient are known together only"
_VAGUE = (
    "{layer} is too ill-conditioned for what its equations leave over (condition times residual above 1e-3): a "
    "gradient with more digits, other starts, or the noise told (gradient_noise, --gradient-noise) may help"
)


def certify(problem: Problem, outcome: Outcome, unknowns: int) -> Certificate:
    """The certificate of one outcome, for `unknowns` or what its first layer says; see `Certificate`.

    A layer's relative error is estimated by its condition times its residual; where that exceeds
    `Tolerances.error` at any layer nothing is certified, nor where the only answer leaves the input range.
    """
    if not outcome.candidates:
        return Certificate.failure(unknowns, None, "head", outcome.reason or _HEAD)
    layers = outcome.layers
    unknowns = layers[0].unknowns
    condition = layers[0].condition
    if outcome.multiples and (outcome.psnr_estimate is not None or problem.tolerances.coarse):
        return Certificate(
            status="ambiguous",
            leaked_dimensions=0,
            unknowns=unknowns,
            condition=condition,
            layer=None,
            proof="local",
            symmetry=outcome.symmetry,
            reason=_ray(problem),
        )
    if outcome.refuted:
        return Certificate.failure(unknowns, condition, "network", outcome.reason)
    if outcome.psnr_estimate is not None and not _within(problem, outcome):
        return Certificate.failure(unknowns, condition, layers[0].name, _OUTSIDE)
    if outcome.psnr_estimate is not None and outcome.open_map is None:
        words = _APPROXIMATE.format(left=outcome.candidates[0].gradient_residual, spread=outcome.psnr_spread)
        estimate = outcome.psnr_estimate
        return Certificate("approximate", unknowns, unknowns, condition, psnr_estimate=estimate, reason=words)
    found = _flaw(problem, outcome) if outcome.psnr_estimate is None else None
    if found is not None:
        layer, reason = found
        return Certificate.failure(unknowns, condition, layer, outcome.reason or reason)
    whole = layers[0].status in SOLVED
    several = len(outcome.candidates) > 1 or outcome.symmetry is not None or outcome.curved
    several = several or outcome.open_map is not None
    proof = outcome.proof or "local"
    if problem.tolerances.coarse:
        return Certificate.failure(unknowns, condition, layers[0].name, _COARSE)
    if whole and not several:
        if not problem.in_range(next(iter(outcome.candidates)).image):  # no image
            return Certificate.failure(unknowns, condition, layers[0].name, _OUTSIDE)
        return Certificate("exact", layers[0].rank, unknowns, condition, proof=proof)
    rank = 0 if outcome.curved or (several and proof == "local") else layers[0].rank
    rank = rank - 1 if rank and outcome.multiples else rank
    reason = _open_words(problem, outcome, whole)
    return Certificate(
        status="ambiguous",
        leaked_dimensions=rank,
        unknowns=unknowns,
        condition=condition,
        layer=None,
        proof=proof,
        symmetry=outcome.symmetry,
        reason=reason,
    )


def _within(problem: Problem, outcome: Outcome) -> bool:
    """Whether a noisy answer is no farther outside the range than three times its error, as norms."""
    low, high = problem.limits
    x = np.asarray(outcome.candidates[0].image)
    beyond = np.sqrt(np.mean(((x - np.clip(x, low, high)) / (high - low)) ** 2))
    return bool(beyond <= 3 * 10 ** (-(outcome.psnr_estimate or 0.0) / 20) + problem.tolerances.slack)


def certify_together(certificates: list[Certificate], outcomes: list[Outcome], examples: int) -> list[Certificate]:
    """The examples of a gradient explain it together: where one is no image, none is trusted.

    Where the gradient leaves directions open, an example that has no part in any of them is `exact` all the same.
    """
    found = []
    for k in range(0, len(certificates), examples):
        group, mine = certificates[k : k + examples], outcomes[k : k + examples]
        failed = next((c for c in group if c.status == "failed"), None)
        found += [failed] * len(group) if failed else map(_by_itself, group, mine)
    return found


def _by_itself(certificate: Certificate, outcome: Outcome) -> Certificate:
    """`exact` for an example of an `ambiguous` gradient that all open directions leave alone."""
    seen, alone = outcome.seen, len(outcome.candidates) == 1 and outcome.symmetry is None and outcome.open_map is None
    if certificate.status != "ambiguous" or outcome.curved or seen is None or not alone or seen.min() < OWN:
        return certificate
    return dataclasses.replace(certificate, status="exact", proof="local", reason=None)


def agreed(outcome: Outcome, gap: float) -> Float[np.ndarray, "*image"] | None:
    """The share of every entry that is determined: `seen`, but 0 where all candidates that there are differ, on curved
    sets, and where candidates were found by a search that may have missed others.

    `gap`: the difference up to which two entries are one.
    """
    if outcome.seen is None or outcome.curved or outcome.open_map is not None:
        return None
    if outcome.proof != "global" and (len(outcome.candidates) > 1 or outcome.symmetry is not None):
        return None  # some of the images with this gradient: others may differ anywhere
    if outcome.multiples and outcome.psnr_estimate is not None:
        return None
    images = [candidate.image for candidate in outcome.candidates]
    same = np.ones(images[0].shape, bool)
    for other in images[1:]:
        same &= np.abs(other - images[0]) <= gap
    if outcome.moved is not None:
        same &= ~outcome.moved
    ray = images[0] / np.linalg.norm(images[0]) if outcome.multiples else 0.0
    return np.where(same, np.maximum(outcome.seen - ray**2, 0.0), 0.0)


def _flaw(problem: Problem, outcome: Outcome) -> tuple[str, str] | None:
    """(layer, reason) of what is not matched; None where all is."""
    layers = outcome.layers
    backwards = list(reversed(layers))
    failed = next((info for info in backwards if info.status == "failed"), None)
    vague = next((info for info in backwards if not relative_error(info) <= problem.tolerances.error), None)
    if failed is None and vague is not None:
        return vague.name, _VAGUE.format(layer=vague.name)
    if failed is not None:
        words = _STALLED if failed.name == "network" or failed.pull_back_depth else _LAYER
        return failed.name, words.format(layer=failed.name)
    if not outcome.candidates[0].gradient_residual <= problem.tolerances.matched:
        unsolved = next((info for info in backwards if info.status not in SOLVED), layers[0])
        return unsolved.name, _UNMATCHED
    unsolved = next((info for info in reversed(layers[1:]) if info.status not in SOLVED), None)
    return None if unsolved is None else (unsolved.name, _STALLED.format(layer=unsolved.name))


def _ray(problem: Problem) -> str:
    return _FREE if problem.loss == UNKNOWN else _RAY


def _open_words(problem: Problem, outcome: Outcome, whole: bool) -> str:
    info, count = outcome.layers[0], max(len(outcome.candidates), outcome.count)
    free = "some" if info.rank is None else str(info.unknowns - info.rank)
    parts = [] if outcome.open_map is None else [outcome.open_map]
    if outcome.multiples:
        parts.append(_ray(problem) if MULTIPLES in (outcome.symmetry or "") else _TIED)
    if not whole:
        parts.append((_CURVED if outcome.curved else _FLAT).format(free=free))
        parts += filter(None, [hidden_constants(problem)])
    elif outcome.curved and not outcome.multiples:
        parts.append(_KINK)
    if outcome.symmetry not in (None, MULTIPLES):
        parts.append(_SYMMETRIC.format(group=outcome.symmetry, count=count))
    elif len({candidate.image.tobytes() for candidate in outcome.candidates}) == 1 < len(outcome.candidates):
        parts.append(_LABELS)
    elif len(outcome.candidates) > 1:
        parts.append((_SEVERAL if outcome.proof == "global" else _FOUND).format(count=count))
    return "; ".join(parts)


def relative_error(info: LayerInfo) -> float:
    """What a layer's residual may do to its unknowns, relatively: its condition times its residual."""
    condition = np.inf if info.condition is None else info.condition
    return 0.0 if info.residual == 0 else float(condition * info.residual)
