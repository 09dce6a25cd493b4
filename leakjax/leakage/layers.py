"""Layer by layer: rank, conditioning and hidden entries of the constraints on its input, at images that are known.

The audit holds the images, so the systems are built at the truth: what they leave open, no attack determines.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from leakjax.constraints.pull_back import pull_gradients, pulled_back, push_forward
from leakjax.leakage.sent_buffers import measured
from leakjax.models.activations import Preimage
from leakjax.models.reader import Arrays
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.smoothing import rms
from leakjax.solvers.jacobian import in_lanes, in_one_shape, row_space
from leakjax.solvers.linear import PROBE_LOSS, LsmrSolution, lsmr_condition, solve_side

LARGEST = 6000
MOST_STEPS = 6000
QUICK = {"xla_backend_optimization_level": 1}
"""A span's program runs once, for less time than it takes to compile."""

_ROUNDING = 1e3
"""Units of the last place of the largest gradient of a span, up to which another one is rounding."""


class LayerLeakage(NamedTuple):
    """`rank` of a layer's own constraints and their `condition`, None where too large to count; `known_share` of its
    outputs that can be read back, `passing_share` of those whose activation passes a change on; `pull_back_depth`, None
    where all layers before it leave its input open."""

    rank: int | None
    condition: float | None
    known_share: float
    passing_share: float
    pull_back_depth: int | None


def layer_leakage(
    segments: Sequence[Segment], variables: Arrays, x: Float[Array, "B ..."], dz: Float[Array, "B K"]
) -> list[LayerLeakage]:
    """One for each segment, at images x and dL/dlogits `dz`; the head's has its gradient block alone.

    A layer with a train-mode normalization right behind it has the rows of both, its means and variances unknown; the
    normalization itself is then not counted once more. Statistics that are told are among the `variables`.
    """
    xs, zs, _ = push_forward(segments, variables, x)
    cotangents = _cotangents(segments, variables, xs, zs, dz)
    preimages = [_preimage(s, variables, z, head=s is segments[-1]) for s, z in zip(segments, zs, strict=True)]
    found = []
    for i, segment in enumerate(segments):
        known, passing = 1.0, 1.0
        if i < len(segments) - 1:
            known = float(np.mean(np.asarray(preimages[i].known)))
            passing = float(np.mean(np.asarray(segment.activation.slope(variables, zs[i])) != 0))
        depth, rank, condition = None, None, None
        last = i + 1 if i + 1 < len(segments) and _joins(segments[i + 1]) else i
        for back in () if _joins(segment) else range(i + 1):
            span = tuple(segments[i - back : last + 1])
            known_behind = preimages[last], cotangents[last]
            probe = _probe(span)(variables, *known_behind, xs[i - back])
            full = float(probe.lost) <= PROBE_LOSS
            if back == 0:
                condition = lsmr_condition(probe)
                rank = xs[i].size if full else _rank(span, variables, *known_behind, xs[i])
                full = rank == xs[i].size
            if full:
                depth = back
                break
        found.append(
            LayerLeakage(
                rank=rank, condition=condition, known_share=known, passing_share=passing, pull_back_depth=depth
            )
        )
    return found


def _joins(segment: Segment) -> bool:
    """Whether a segment is a train-mode normalization whose rows go with those of the layer before it."""
    return segment.geometry.normalization is not None and segment.geometry.normalization.direct


def _preimage(segment: Segment, variables: Arrays, z: Array, *, head: bool) -> Preimage:
    """What the activation gives back of z; nothing at the head, whose output nobody sends."""
    known = segment.activation.preimage(variables, segment.activation.function(variables, z), jnp.zeros((), z.dtype))
    return known._replace(known=jnp.zeros_like(known.known)) if head else known


def _cotangents(
    segments: Sequence[Segment], variables: Arrays, xs: Sequence[Array], zs: Sequence[Array], dz: Array
) -> list[Array]:
    """dL/dz of every segment; `dz` is the last one's."""
    found = [dz]
    for i in reversed(range(1, len(segments))):
        dx = segments[i].cotangent(variables, xs[i], found[0])
        found.insert(0, segments[i - 1].activation.slope(variables, zs[i - 1]) * dx.reshape(zs[i - 1].shape))
    return found


def _residual(span: Sequence[Segment], variables: Arrays, preimage: Preimage, dz: Array, x: Array) -> Any:
    """The pulled-back residual of `span` with what its own gradient blocks are at x, but for those that are 0: rounding
    of a bias before a norm, divided by the other gradients' sizes, would count as so many rows."""
    xs, _, slopes = push_forward(span, variables, x)
    gradients, _ = pull_gradients(span, variables, xs, slopes, dz)
    gradients |= measured(span, xs, variables)
    residual = pulled_back(span, variables, preimage, dz, gradients)
    sizes = {path: rms(g) for path, g in gradients.items()}
    least = _ROUNDING * jnp.finfo(x.dtype).eps * jnp.max(jnp.stack([jnp.zeros((), x.dtype), *sizes.values()]))

    def function(u: Array, smoothing: Any) -> Any:
        forward, rows = residual.function(u, smoothing)
        return forward, {path: jnp.where(sizes[path] > least, row, 0.0) for path, row in rows.items()}

    return residual._replace(function=function)


@keep(64)
def _probe(span: tuple[Segment, ...]) -> Any:
    def probe(variables: Arrays, preimage: Preimage, dz: Array, x: Array) -> LsmrSolution:
        residual = _residual(span, variables, preimage, dz, x)
        rows, tangent = jax.linearize(lambda u: residual.function(u, None), x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        steps = min(max(4 * x.size, 2000), MOST_STEPS)
        found = solve_side(operator, rows, jnp.asarray(True), tolerance=1e-15, max_steps=steps)
        return found._replace(residual=jnp.zeros((), x.dtype))  # nobody asks for it, and it takes a product to compile

    return jax.jit(probe, compiler_options=QUICK)


def _rank(span: tuple[Segment, ...], variables: Arrays, preimage: Preimage, dz: Array, x: Array) -> int | None:
    if x.size > LARGEST or not fits_in_memory(4 * 8 * x.size**2):
        return None
    program, forward = _gram_product(span), _product(span)
    rows = sum(int(a.size) for a in jax.tree.leaves(_rows(span, variables, preimage, dz, x)))

    def squared(v: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
        return in_one_shape(lambda v, count: program(variables, preimage, dz, x, v, count), v)

    def image(v: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k m"]:
        return in_one_shape(lambda v, count: forward(variables, preimage, dz, x, v, count), v)

    through = image if any(segment.normalizes for segment in span) else None
    return row_space(squared, rows, x.size, x.dtype, through).rank


def _rows(span: tuple[Segment, ...], variables: Arrays, preimage: Preimage, dz: Array, x: Array) -> Any:
    """Shapes of the residual's blocks."""
    return jax.eval_shape(lambda u: _residual(span, variables, preimage, dz, x).function(u, None), x)


@keep(64)
def _product(span: tuple[Segment, ...]) -> Any:
    """v -> J v of rows v, J the Jacobian of the residual's blocks."""

    def build(variables: Arrays, preimage: Preimage, dz: Array, x: Array, v: Array, count: Any) -> Array:
        residual = _residual(span, variables, preimage, dz, x)
        _, tangent = jax.linearize(lambda u: residual.function(u, None), x)
        return in_lanes(lambda e: ravel_pytree(tangent(e.reshape(x.shape)))[0], v.astype(x.dtype), count)

    return jax.jit(build)


@keep(64)
def _gram_product(span: tuple[Segment, ...]) -> Any:
    def build(variables: Arrays, preimage: Preimage, dz: Array, x: Array, v: Array, count: Any) -> Array:
        residual = _residual(span, variables, preimage, dz, x)
        _, tangent = jax.linearize(lambda u: residual.function(u, None), x)
        adjoint = jax.linear_transpose(tangent, x)

        def column(e: Array) -> Array:
            return jnp.ravel(adjoint(tangent(e.reshape(x.shape)))[0])

        return in_lanes(column, v.astype(x.dtype), count)

    return jax.jit(build)
