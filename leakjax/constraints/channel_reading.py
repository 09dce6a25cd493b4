"""Whether a segment's gradient treats its input channels alike, read from what it computes.

A gradient that does so turns x M into the gradient of x, mixed by the same M, for every matrix M on the channels. Two
linear maps are the same where a random functional of their answers is, so that one gradient at a time is held.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.constraints.channels import Channels, channel_matrix
from leakjax.constraints.layer import segment_rows
from leakjax.models.reader import Arrays
from leakjax.runtime.programs import Shelf, keep, quickly
from leakjax.segments.chain import Segment

_SAME = 1e-9  # of the size of a gradient: rounding of float64 in sums of up to millions of terms


class Reading(NamedTuple):
    """The channels of a segment; whether K1 has full column rank at a random dL/dz, None where that is not known."""

    channels: Channels
    full: bool | None


_READ: Shelf[list[Reading | None]] = Shelf(64)


def read_channels(segments: Sequence[Segment], variables: Arrays, most: int) -> list[Reading | None]:
    """The channels of linear segments with parameters; None for one whose gradient does not treat them alike.

    Random weights (in the shapes of `variables`), inputs and cotangents decide, so that a reading belongs to an
    architecture: maps that agree on them differ with probability 0. Weights that happen to be special keep the
    structure; where they lower a rank, a solve says so. `most`: positions up to which ranks are found.
    """
    key = (tuple(segments), most)
    known = _READ.get(key)
    if known is not None:
        return known
    rng = np.random.default_rng(0)
    drawn = {path: _like(rng, a) for path, a in variables.items()}
    questions = [_Question.of(segment, rng) for segment in segments]
    asked = [
        (q.inputs.astype(s.input.dtype), q.dz.astype(s.output.dtype)) for s, q in zip(segments, questions, strict=True)
    ]
    answers = _functionals(key[0])(drawn, asked)
    channels = [q.channels(answer) for q, answer in zip(questions, answers, strict=True)]
    full = _full_ranks(drawn, segments, channels, questions, most)
    return _READ.put(key, [None if c is None else Reading(c, f) for c, f in zip(channels, full, strict=True)])


def _like(rng: np.random.Generator, a: Any) -> Any:
    """Random numbers in the place of weights, above 0, as the variances among them are; other arrays (keys, counts)
    as they are."""
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return a
    return rng.uniform(0.5, 1.5, a.shape).astype(a.dtype)


class _Mixing(NamedTuple):
    """M = I + v u^T on the channels of an `axis`."""

    axis: int | None
    u: Float[np.ndarray, " c"]
    v: Float[np.ndarray, " c"]

    def of_input(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """x M."""
        channels = Channels(self.axis)
        parts = channels.split(x)
        return channels.join(parts + np.outer(parts @ self.v, self.u), x.shape)

    def fits(self, plain: Float[np.ndarray, " c"], mixed: Float[np.ndarray, " c"]) -> bool:
        """Whether a functional of a gradient was mixed as its input is; False where it does not see its input."""
        size = float(np.linalg.norm(mixed))
        expected = plain + (plain @ self.v) * self.u
        return size > 0 and float(np.linalg.norm(mixed - expected)) <= _SAME * size


class _Question(NamedTuple):
    """Inputs of a segment, whose gradients say what it is: 0, x, and x mixed along each candidate axis."""

    inputs: Float[np.ndarray, "k ..."]
    dz: Float[np.ndarray, "..."]
    mixings: list[_Mixing]

    @classmethod
    def of(cls, segment: Segment, rng: np.random.Generator) -> "_Question":
        shape = segment.input.shape
        x, mixings = rng.normal(size=shape), []
        for axis in (*reversed(range(1, len(shape))), None):
            count = Channels(axis).sizes(shape)[1]
            u, v = rng.normal(size=(2, count))
            mixings.append(_Mixing(axis, u / len(u), v))
        inputs = np.stack([np.zeros(shape), x, *(mixing.of_input(x) for mixing in mixings)])
        return cls(inputs, rng.normal(size=segment.output.shape), mixings)

    def channels(self, functionals: dict[str, list[Any]]) -> Channels | None:
        """What the answers of `_functionals` say."""
        for k, mixing in enumerate(self.mixings):
            rows = []
            for path, along in functionals.items():
                shown = [np.asarray(f) - np.asarray(f[0]) for f in along]
                fitting = [
                    a for a, f in enumerate(shown) if f.shape[1] == len(mixing.u) and mixing.fits(f[1], f[k + 2])
                ]
                rows += [(path, fitting[0])] if fitting else []
            if rows:
                return Channels(mixing.axis, tuple(rows))
        return None


@keep(16)
def _functionals(segments: tuple[Segment, ...]) -> Any:
    """(weights, [(inputs, dz)]) -> {path: by axis, a random functional over the other axes of its gradient}, of every
    segment and input."""

    def of_one(
        segment: Segment, variables: Arrays, inputs: Float[Array, "k ..."], dz: Float[Array, "..."]
    ) -> dict[str, list[Float[Array, "k c"]]]:
        def functionals(x: Float[Array, "..."]) -> dict[str, list[Float[Array, " c"]]]:
            gradient = segment_rows(segment, variables, dz, x)[1]
            return {path: [_along(g, axis) for axis in range(g.ndim)] for path, g in gradient.items()}

        return jax.lax.map(functionals, inputs)

    def answers(variables: Arrays, asked: Sequence[tuple[Any, Any]]) -> list[dict[str, list[Any]]]:
        return [of_one(s, variables, *given) for s, given in zip(segments, asked, strict=True)]

    return jax.jit(answers, compiler_options=quickly())


def _along(g: Any, axis: int) -> Float[Array, " c"]:
    """A fixed random functional over all axes but one: a product of one vector for each."""
    rng = np.random.default_rng(0)
    for k in reversed(range(g.ndim)):
        if k != axis:
            g = jnp.tensordot(g, rng.normal(size=g.shape[k]).astype(g.dtype), ([k], [0]))
    return g


def _full_ranks(
    variables: Mapping[str, Any],
    segments: Sequence[Segment],
    channels: Sequence[Channels | None],
    questions: Sequence[_Question],
    most: int,
) -> list[bool | None]:
    """By segment, whether K1 has full column rank; None where it has no channels, or more than `most` positions."""
    places = [0 if c is None else c.sizes(s.input.shape)[0] for s, c in zip(segments, channels, strict=True)]
    wanted = [k for k, count in enumerate(places) if 1 < count <= most]
    found: list[bool | None] = [True if count == 1 else None for count in places]
    if wanted:
        pairs = tuple((segments[k], channels[k]) for k in wanted)
        matrices = _channel_matrices(pairs)(
            variables, [questions[k].dz.astype(segments[k].output.dtype) for k in wanted]
        )
        for k, matrix in zip(wanted, matrices, strict=True):
            found[k] = bool(np.linalg.matrix_rank(np.asarray(matrix)) == places[k])
    return found


@keep(16)
def _channel_matrices(pairs: tuple[tuple[Segment, Any], ...]) -> Any:
    """(weights, [dz]) -> K1 of every segment with its channels."""

    def of_one(segment: Segment, channels: Channels, variables: Arrays, dz: Float[Array, "..."]) -> Any:
        zero = jnp.zeros(segment.input.shape, dz.dtype)
        _, product = jax.linearize(lambda x: segment_rows(segment, variables, dz, x)[1], zero)
        return channel_matrix(channels, product, segment.input.shape, dz.dtype)

    def matrices(variables: Arrays, dzs: Sequence[Float[Array, "..."]]) -> list[Any]:
        return [of_one(*pair, variables, dz) for pair, dz in zip(pairs, dzs, strict=True)]

    return jax.jit(matrices, compiler_options=quickly())
