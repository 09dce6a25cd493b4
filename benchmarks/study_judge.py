"""Whether a certificate is wrong, against the truth and independently of the attacks' own checks."""

import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from leakjax import Certificate, Observation, Reconstruction, undetermined_directions
from leakjax.models.losses import LOSSES

EXACT = 60.0  # dB below which `exact` is wrong
OFF = 3.0  # dB by which an estimate may be off
OUTSIDE = 1e-6  # of the squared error that may lie outside what is said to be open


class Verdict(NamedTuple):
    """Of one example: its PSNR, and what is wrong with its certificate ("exact", "ambiguous", "approximate", "label"),
    None where nothing is."""

    psnr: float
    wrong: str | None


def entries(verdict: Verdict, certificate: Certificate, source: str) -> dict[str, Any]:
    """What a record says of one example: its certificate, where its label is from, and the verdict."""
    estimate = certificate.psnr_estimate
    return {
        "status": certificate.status,
        "proof": certificate.proof,
        "symmetry": certificate.symmetry,
        "psnr": round(verdict.psnr, 1),
        "estimate": None if estimate is None else round(estimate, 1),
        "label": source,
        "wrong": verdict.wrong,
        "layer": certificate.layer,
    }


def decibel(a: np.ndarray, b: np.ndarray, width: float) -> float:
    """10 log10(width^2 / mean squared difference), at most 350."""
    return float(-10 * np.log10(max(float(np.mean((a - b) ** 2)) / width**2, 1e-35)))


def judge(observation: Observation, answer: Reconstruction, images: np.ndarray, labels: np.ndarray) -> list[Verdict]:
    """A verdict an example; a gradient's examples are paired with the truth by least error."""
    size, width = observation.examples, observation.input_range[1] - observation.input_range[0]
    verdicts: list[Verdict] = []
    for v in range(observation.victims):
        rows = slice(v * size, (v + 1) * size)
        truth, tags, order = _paired(answer.images[rows], images[rows], labels[rows])
        del order
        for b in range(size):
            k = v * size + b
            certificate, source = answer.certificates[k], answer.label_sources[k]
            quality = decibel(answer.images[k], truth[b], width)
            wrong = None
            if certificate.status == "exact" and quality < EXACT:
                wrong = "exact"
            elif certificate.status == "approximate" and abs(certificate.psnr_estimate - quality) > OFF:
                wrong = "approximate"
            elif certificate.status == "ambiguous" and not _covered(observation, answer, v, b, images[rows], truth[b]):
                wrong = "ambiguous"
            elif source == "recovered" and answer.labels[k] != tags[b]:
                wrong = "label"
            verdicts.append(Verdict(quality, wrong))
    return verdicts


def solvable(apply: Any, params: Any, loss: str, image: np.ndarray, label: int) -> bool:
    """Whether the gradient's own Jacobian at the truth has full rank, and a condition below 1e8, in float64."""
    with jax.enable_x64(True):
        given = {p: jnp.asarray(a) for p, a in params.items()}, jnp.asarray(image), jnp.asarray(label)
        matrix = np.asarray(_jacobian(apply, loss)(*given)).reshape(-1, image.size)
    if len(matrix) < image.size or not np.all(np.isfinite(matrix)):
        return False
    s = np.linalg.svd(matrix, compute_uv=False)
    return bool(s[-1] > 1e-8 * s[0])


@functools.lru_cache(maxsize=4)
def _jacobian(apply: Any, loss: str) -> Any:
    """(params, x, label) -> dg/dx, the gradient of every parameter divided by its norm."""

    def gradient(params: Any, x: Any, label: Any) -> Any:
        g = jax.grad(lambda p: LOSSES[loss](apply(p, x[None])[0], label))(params)
        sizes = {p: jnp.maximum(jax.lax.stop_gradient(jnp.linalg.norm(a)), 1e-30) for p, a in g.items()}
        return jnp.concatenate([jnp.ravel(a) / sizes[p] for p, a in g.items()])

    return jax.jit(jax.jacfwd(gradient, argnums=1))


def _paired(found: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    distance = np.sum((found[:, None] - images[None]) ** 2, axis=tuple(range(2, images.ndim + 1)))
    _, order = linear_sum_assignment(np.nan_to_num(distance, nan=1e30))
    return images[order], labels[order], order


def _covered(
    observation: Observation, answer: Reconstruction, victim: int, example: int, images: np.ndarray, truth: np.ndarray
) -> bool:
    """Whether the truth is a candidate, the answer moved by the named symmetry, or differs in open directions alone."""
    size, width = observation.examples, observation.input_range[1] - observation.input_range[0]
    k = victim * size + example
    if any(decibel(c.image, t, width) >= EXACT for c in answer.candidates[k] for t in images):
        return True
    symmetry = answer.certificates[k].symmetry or ""
    if any(decibel(_reordered(answer.images[k], t, symmetry), t, width) >= EXACT for t in images):
        return True
    basis = undetermined_directions(observation, answer, victim)
    flat = basis.reshape(-1, images.size)
    groups = itertools.product(*answer.candidates[victim * size : (victim + 1) * size])
    for group in itertools.islice(groups, 256):
        for order in itertools.permutations(range(size)):
            error = (np.stack([c.image for c in group]) - images[list(order)]).ravel()
            if np.sum((error - flat.T @ (flat @ error)) ** 2) <= OUTSIDE * np.sum(error**2):
                return True
    return False


def _reordered(image: np.ndarray, truth: np.ndarray, symmetry: str) -> np.ndarray:
    """The image with its patches in the truth's order, where the symmetry is their order."""
    best = image
    sizes = [tuple(map(int, found)) for found in re.findall(r"order of patches \((\d+)x(\d+)\)", symmetry)]
    sizes += [(1, 1)] if "order of positions" in symmetry else []
    for rows, columns in sizes:
        cells = image.shape[0] // rows, image.shape[1] // columns

        def patches(x: np.ndarray, rows: int = rows, columns: int = columns, cells: Any = cells) -> np.ndarray:
            split = x.reshape(cells[0], rows, cells[1], columns, -1).swapaxes(1, 2)
            return split.reshape(cells[0] * cells[1], -1)

        mine, goal = patches(image), patches(truth)
        order = linear_sum_assignment(np.sum((goal[:, None] - mine[None]) ** 2, axis=2))[1]
        back = mine[order].reshape(*cells, rows, columns, -1).swapaxes(1, 2).reshape(image.shape)
        if np.sum((back - truth) ** 2) < np.sum((best - truth) ** 2):
            best = back
    return best
