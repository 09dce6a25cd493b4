"""From finished paths to an `Outcome` an example: which candidates stand, judged by the gradient alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.candidates import kept, split
from leakjax.attacks.layerwise.path import Path
from leakjax.attacks.problem import DeviceLabels, Outcome, Problem
from leakjax.constraints.layer import loss_pull
from leakjax.constraints.pull_back import pull_gradients, push_forward
from leakjax.models.losses import LossSpec
from leakjax.models.reader import Arrays
from leakjax.reconstruction import Proof
from leakjax.runtime.arrays import to_device
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment


def outcomes(problem: Problem, paths: list[Path]) -> list[Outcome]:
    """Every example's candidates inside the input range, best match first, victim by victim."""
    residuals = _gradient_residuals(problem, paths)
    found = []
    for victim in range(problem.victims):
        mine = [(r, p) for r, p in zip(residuals, paths, strict=True) if p.victim == victim]
        best = min((r for r, _ in mine), default=np.inf)
        most = max(10 * best, problem.tolerances.matched)
        mine = sorted((pair for pair in mine if pair[0] <= most), key=lambda pair: pair[0])
        whole = all(p.layers[0].status != "deficient" for _, p in mine)
        mine = kept(problem, mine, lambda pair: pair[1].x, whole=whole)
        layers = mine[0][1].layers if mine else ()
        images = split([(p.x, p.labels, float(r)) for r, p in mine]) if mine else [()] * problem.examples
        seen = _seen(mine[0][1]) if mine else None
        proof = _proof(problem, mine[0][1]) if mine else None
        scales = np.ones(problem.examples) if not mine or mine[0][1].weights is None else mine[0][1].weights
        found += [
            Outcome(c, layers, None if seen is None else seen[b], proof, scale=float(scales[b]))
            for b, c in enumerate(images)
        ]
    return found


def _proof(problem: Problem, path: Path) -> Proof | None:
    """ "global" where every layer is one linear system in its input alone, and all but the first determine theirs.

    Then, from the head backward, each layer's input is the only one there is for the candidate of the head: the image
    is the only one, or the first layer's null space holds all the others. A walk that came in at a layer whose dL/dz
    a gradient shows needs nothing of the later ones. A batch's head is separated by a search, a
    pulled-back or nonlinear layer solved by one: these prove less.
    """
    used = problem.segments if path.entry is None else problem.segments[: path.entry + 1]
    linear = all(segment.linear for segment in used)
    first, *later = path.layers
    own = all(info.pull_back_depth == 0 for info in path.layers)
    determined = all(info.status == "determined" for info in later) and first.rank is not None
    return "global" if problem.examples == 1 and linear and own and determined else None


def _seen(path: Path) -> Float[np.ndarray, "B ..."] | None:
    later = [info.status for info in path.layers[1:]]
    whole = all(status in ("determined", "pulled_back") for status in later) and path.layers[0].status != "failed"
    return path.seen if whole and path.seen is not None else None


def _gradient_residuals(problem: Problem, paths: list[Path]) -> list[float]:
    """||g(x) - g|| / ||g|| of every path, through the chain of segments, `chunk` of them in one program."""
    residual, dtype = _residual_of(problem.segments, problem.loss), problem.dtype
    size, variables, residuals = min(problem.chunk, len(paths)), dict(problem.variables), []
    for first in range(0, len(paths), max(size, 1)):
        part = [paths[min(k, len(paths) - 1)] for k in range(first, first + size)]
        weights = [np.ones(problem.examples) if path.weights is None else path.weights for path in part]
        asked = (np.stack([p.x for p in part]), np.stack([p.labels for p in part]), np.stack(weights))
        given = {p: to_device(g[[path.victim for path in part]], dtype) for p, g in problem.gradients.items()}
        found = residual(variables, to_device(asked[0], dtype), to_device(asked[1]), to_device(asked[2], dtype), given)
        residuals += [float(r) for r in np.asarray(found)]
    return residuals[: len(paths)]


@keep(32)
def _residual_of(segments: tuple[Segment, ...], loss: LossSpec) -> Callable[..., Float[Array, " P"]]:
    """(variables, x, labels, weights (P, B), {path: dL/dtheta as sent}) -> relative misfits, by the segments that the
    layers are solved with; of P paths."""

    def residual(
        variables: Arrays, x: Float[Array, "B ..."], labels: DeviceLabels, weights: Float[Array, " B"], given: Arrays
    ) -> Float[Array, ""]:
        xs, zs, slopes = push_forward(segments, variables, x)
        dz = loss_pull(segments[-1], variables, loss, zs[-1], labels)
        dz = dz * weights.reshape(-1, *[1] * (dz.ndim - 1))
        found = pull_gradients(segments, variables, xs, slopes, dz)[0]
        error = sum(jnp.sum((found[p] - given[p]) ** 2) for p in found)
        return jnp.sqrt(error / sum(jnp.sum(g**2) for g in given.values()))

    return jax.jit(vmap_several(residual, (None, 0, 0, 0, 0)))
