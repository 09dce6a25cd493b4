"""What a lifted map shows of its input, once the values behind the activations inside it are known: linear rows.

For a map in stages e_k = f_k(theta, x, y_1 ... y_{k-1}) (see `lifting`), with e_k and dL/de_k at hand,

    forward    f_k(theta, x, y) = e_k
    gradient   d/dtheta <dL/de_k, f_k(theta, x, y)> = g_k

are affine in x and all y. Between them dL/dy_k = sum_{j>k} (df_j/dy_k)^T dL/de_j, dL/de_k = act_k'(e_k) * dL/dy_k.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from leakjax.constraints.layer import over_gradients
from leakjax.models.activations import Preimage
from leakjax.models.reader import Arrays
from leakjax.segments.chain import Segment
from leakjax.segments.stages import Stage
from leakjax.segments.tracing.smoothing import rms

_NOISE = 1e-7  # of the size of y: what linear solves leave of its exact zeros


class Reached(NamedTuple):
    """What is known at the output of one stage: e, and dL/de."""

    preimage: Preimage
    de: Float[Array, "..."]


class Inside(NamedTuple):
    """The last stages of a map, last first, the values y behind the activations between them (one less), and dL/dx,
    dL/dy_1, ... as far as these stages say."""

    reached: tuple[Reached, ...]
    values: tuple[Float[Array, "..."], ...]
    cotangents: tuple[Float[Array, "..."], ...]


def stages_of(segment: Segment) -> tuple[Stage, ...]:
    """The stages of a segment; an affine one is its own only stage."""
    if segment.linear:
        return (
            Stage(lambda variables, values: segment.function(variables, *values), segment.paths, segment.output, None),
        )
    return segment.stages


def look_inside(
    segment: Segment,
    variables: Arrays,
    preimage: Preimage,
    dz: Float[Array, "..."],
    values: Sequence[Float[Array, "..."]],
) -> Inside:
    """From what is known behind a segment, and `values`: y of its last activations, last first."""
    stages = stages_of(segment)
    inner = [stage.output for stage in stages[:-1]]
    zeros = [jnp.zeros(s.shape, dz.dtype) for s in (segment.input, *inner)]
    cotangents, reached = list(zeros), [Reached(preimage, dz)]
    for k in reversed(range(len(stages) - 1 - len(values), len(stages))):
        stage, de = stages[k], reached[-1].de
        _, pull = jax.vjp(lambda *a, stage=stage: stage.function(variables, a), *zeros[: k + 1])
        cotangents = [c + p for c, p in zip(cotangents, pull(de), strict=False)] + cotangents[k + 1 :]
        if len(reached) <= len(values):
            y = values[len(reached) - 1]
            activation = stages[k - 1].activation
            assert activation is not None
            before = activation.preimage(variables, y, _NOISE * rms(y))
            reached.append(Reached(before, before.slope * cotangents[k]))
    return Inside(tuple(reached), tuple(values), tuple(cotangents[: len(stages) - len(values)]))


def lifted_rows(
    segment: Segment, variables: Arrays, inside: Inside, gradients: Mapping[str, Float[Array, "..."]]
) -> tuple[Callable[[Sequence[Float[Array, "..."]]], PyTree[Float[Array, "..."]]], Float[Array, ""]]:
    """(rows, size): rows((x, y_1, ...)), the values that `inside` leaves open, 0 at the truth; and the norm of the
    right-hand sides.

    Every block is divided by the rms of its right-hand side; entries of e that are not known get weight 0, and so does
    a gradient block where a slope at its stage or behind it, and with it dL/de, is not known.
    """
    stages = stages_of(segment)
    certain = jnp.stack([jnp.all(r.preimage.slope_known) for r in inside.reached])
    trusted = jnp.cumprod(certain.astype(inside.reached[0].de.dtype))
    over = over_gradients(gradients, [path for stage in stages for path in stage.paths])
    blocks = list(zip(reversed(stages), inside.reached, trusted, strict=False))

    def weight(preimage: Preimage) -> Float[Array, "..."]:
        known = jnp.where(preimage.known, 1.0, 0.0).astype(preimage.value.dtype)
        return known / rms(known * preimage.value)

    def rows(values: Sequence[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        every = (*values, *reversed(inside.values))
        found = []
        for j, (stage, (preimage, de), trust) in enumerate(blocks):
            weights = {path: variables[path] for path in stage.paths}
            given = every[: len(stages) - j]
            e, pull = jax.vjp(lambda w, stage=stage, given=given: stage.function({**variables, **w}, given), weights)
            grads = {p: trust * over[p] * (g - gradients[p]) for p, g in pull(de)[0].items()}
            found.append((weight(preimage) * (e - preimage.value), grads))
        return found

    target = [
        (weight(r.preimage) * r.preimage.value, {p: trust * over[p] * gradients[p] for p in stage.paths})
        for stage, r, trust in blocks
    ]
    return rows, optax.tree.norm(target)
