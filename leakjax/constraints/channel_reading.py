"""Whether a segment's gradient treats its input channels alike, read from what it computes.

A gradient that does so turns x M into the gradient of x, mixed by the same M, for every matrix M on the channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from leakjax.constraints.channels import Channels, columns, impulses
from leakjax.constraints.layer import segment_rows
from leakjax.models.reader import Arrays
from leakjax.runtime.programs import Shelf, keep
from leakjax.segments.chain import Segment

_SAME = 1e-9  # of the size of a gradient: rounding of float64 in sums of up to millions of terms


class Reading(NamedTuple):
    """The channels of a segment; whether K1 has full column rank at a random dL/dz, None where that is not known."""

    channels: Channels
    full: bool | None


_READ: Shelf[list[Reading | None]] = Shelf(64)


def read_channels(segments: Sequence[Segment], variables: Arrays, most: int) -> list[Reading | None]:
    """The channels of linear segments with parameters; None for one whose gradient does not treat them alike.

    Random inputs and cotangents decide: two maps that agree on them differ with probability 0. One program evaluates
    all segments, once for all models of an architecture. `most`: positions up to which ranks are found.
    """
    key = (tuple(segments), most)
    known = _READ.get(key)
    if known is not None:
        return known
    rng = np.random.default_rng(0)
    questions = [_Question.of(segment, rng, most) for segment in segments]
    asked = [
        (q.inputs.astype(s.input.dtype), q.dz.astype(s.output.dtype)) for s, q in zip(segments, questions, strict=True)
    ]
    answers = _gradients(key[0])(dict(variables), asked)
    return _READ.put(key, [question.read(answer) for question, answer in zip(questions, answers, strict=True)])


class _Mixing(NamedTuple):
    """M = I + v u^T on the channels of an `axis`."""

    axis: int | None
    u: Float[np.ndarray, " c"]
    v: Float[np.ndarray, " c"]

    def of_input(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """x M."""
        if self.axis is None:
            return self.along(x.reshape(len(x), -1), 1).reshape(x.shape)
        return self.along(x, self.axis)

    def along(self, x: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
        """x with `axis` mixed."""
        last = np.moveaxis(x, axis, -1)
        return np.moveaxis(last + (last @ self.v)[..., None] * self.u, -1, axis)

    def axis_of(self, plain: Float[np.ndarray, "..."], mixed: Float[np.ndarray, "..."]) -> int | None:
        """Along which axis a gradient is mixed as its input is; None where it is not, or does not see its input."""
        size = float(np.linalg.norm(mixed))
        for axis in [k for k in range(plain.ndim) if plain.shape[k] == len(self.v)] if size > 0 else []:
            if float(np.linalg.norm(mixed - self.along(plain, axis))) <= _SAME * size:
                return axis
        return None


class _Question(NamedTuple):
    """Inputs of a segment, whose gradients say what it is: 0, x, x mixed along each candidate, and the impulses of the
    first candidate; of which positions there are `places`."""

    inputs: Float[np.ndarray, "k ..."]
    dz: Float[np.ndarray, "..."]
    mixings: list[_Mixing]
    places: int

    @classmethod
    def of(cls, segment: Segment, rng: np.random.Generator, most: int) -> "_Question":
        shape = segment.input.shape
        axes = [k for k in range(1, len(shape)) if shape[k] > 1] or [len(shape) - 1]
        x, mixings = rng.normal(size=shape), []
        for axis in [*reversed(axes), *([None] if len(axes) > 1 else [])]:
            u, v = rng.normal(size=(2, Channels(axis).sizes(shape)[1]))
            mixings.append(_Mixing(axis, u / len(u), v))
        likely = Channels(mixings[0].axis)
        places, count = likely.sizes(shape)
        places = places if places <= most else 0
        combs = [likely.join(parts, shape) for parts in impulses(places, count)]
        inputs = np.stack([np.zeros(shape), x, *(mixing.of_input(x) for mixing in mixings), *combs])
        return cls(inputs, rng.normal(size=segment.output.shape), mixings, places)

    def read(self, answer: Arrays) -> Reading | None:
        shown = {path: np.asarray(g) - np.asarray(g[0]) for path, g in answer.items()}
        for k, mixing in enumerate(self.mixings):
            axes = {path: mixing.axis_of(g[1], g[k + 2]) for path, g in shown.items()}
            rows = tuple((path, axis) for path, axis in axes.items() if axis is not None)
            if rows:
                channels = Channels(mixing.axis, rows)
                return Reading(channels, self._full(channels, shown) if k == 0 and self.places else None)
        return None

    def _full(self, channels: Channels, shown: dict[str, Float[np.ndarray, "k ..."]]) -> bool:
        first = len(self.mixings) + 2
        answers = [channels.gather({p: g[k] for p, g in shown.items()}) for k in range(first, len(self.inputs))]
        return bool(np.linalg.matrix_rank(columns(np.stack(answers), self.places)) == self.places)


@keep(16)
def _gradients(segments: tuple[Segment, ...]) -> Any:
    def gradients(variables: Arrays, asked: Sequence[tuple[Any, Any]]) -> list[Arrays]:
        return [
            jax.vmap(lambda x, s=s, dz=dz: segment_rows(s, variables, dz, x)[1])(inputs)
            for s, (inputs, dz) in zip(segments, asked, strict=True)
        ]

    return jax.jit(gradients)
