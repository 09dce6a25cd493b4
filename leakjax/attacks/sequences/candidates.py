"""Which ids can stand where: those whose tokens lie in the span of a gradient's columns.

    d(v, t) = ||(I - Q Q^T) u(v, t)|| / ||u(v, t)||,      span(Q) = columns of dL/dK

for the first matrix K that reads tokens before they have met each other. Rank and candidates are split off where
consecutive numbers break off most: singular values for the rank, distances of all ids at all positions for candidates.

Reference: DAGER, Petrov et al., NeurIPS 2024, arXiv 2405.15586, which sets both thresholds by hand.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from leakjax.attacks.sequences.reading import TOGETHER, Reads, TextModel, in_blocks
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep

GAP = 30.0  # the least break that counts: noise of a defense leaves breaks of 2 to 3, rounding those of 1e3 and more
_ABOVE = 3.0  # singular values that are rounding end below 0.3 of it
_FLOOR = 1e-15  # below it numbers differ by nothing: the rounding of float64
_CONTRAST = 512  # ids with rows of zeros that are tried besides, so that a break is seen where all others belong


class Span(NamedTuple):
    """The orthonormal `basis` Q of read `read`, the break behind its columns, and the `rows` of the read whose tokens
    lie in it whatever they are; () as it is read, before that is known."""

    read: int
    basis: Float[np.ndarray, "width rank"]
    gap: float
    rows: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """The columns of Q."""
        return self.basis.shape[1]


class Candidates(NamedTuple):
    """`allowed`: the ids that may stand at each position; `bound`: the distance that splits them from others; `gap`
    around it; `touched`: the ids whose rows have a gradient, None where all have."""

    allowed: tuple[Int[np.ndarray, " ids"], ...]
    bound: float
    gap: float
    touched: Int[np.ndarray, " ids"] | None


def read_span(model: TextModel, gradient: Mapping[str, Any], read: int, most: int, rounding: float) -> Span | None:
    """None where no gradient of the read was sent, or its columns fill their space without a break after `most`.

    The last break above the client's relative `rounding` is taken: an earlier one may stand between examples that the
    loss weighs much and others that it weighs little.
    """
    entry = model.tokens.reads[read]
    parts = [np.asarray(m, np.float64) for m in entry.matrices(gradient)]
    parts = [m / np.linalg.norm(m) for m in parts if np.any(m)]
    if not parts:
        return None
    left, values, _ = np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)
    values = np.append(values, 0.0) if len(values) < entry.width else values
    most = min(most, len(values) - 1)
    if most < 1:
        return None
    low = np.maximum(values, _FLOOR * values[0])
    ratios = low[:most] / low[1 : most + 1]
    breaks = np.flatnonzero((ratios >= GAP) & (low[:most] > _ABOVE * rounding * low[0]))
    if not len(breaks):
        return None
    rank = int(breaks[-1]) + 1
    return Span(read, left[:, :rank], float(ratios[rank - 1]))


def outside(u: Float[Array, "rows width"], basis: Float[Array, "width rank"]) -> Float[Array, "rows width"]:
    """(I - Q Q^T) u / ||u|| of every row."""
    unit = u / jnp.maximum(jnp.linalg.norm(u, axis=-1, keepdims=True), jnp.finfo(u.dtype).tiny)
    return unit - (unit @ basis) @ basis.T


def distances(
    model: TextModel, variables: Arrays, spans: Sequence[Span], ids: Int[np.ndarray, "n T"]
) -> list[Float[np.ndarray, "n rows"]]:
    """d of every row of sequences, one array a span."""
    program = _distance_program(model, tuple(span.read for span in spans))
    arrays, bases = dict(variables), tuple(to_device(span.basis) for span in spans)
    return in_blocks(lambda block: program(arrays, bases, block), ids)


@keep(16)
def _distance_program(model: TextModel, reads: tuple[int, ...]) -> Any:
    """Compiled: (variables, bases, ids (BLOCK, T)) -> the distances of each read, (BLOCK, rows) each."""

    def one(variables: Arrays, bases: Sequence[Array], ids: Array) -> list[Array]:
        values = model.tokens.values(variables, ids[None], max(reads) + 1)
        return [jnp.linalg.norm(outside(values[k], q), axis=-1) for k, q in zip(reads, bases, strict=True)]

    def block(variables: Arrays, bases: Sequence[Array], ids: Array) -> list[Array]:
        return jax.lax.map(lambda each: one(variables, bases, each), ids, batch_size=TOGETHER)

    return jax.jit(block)


def touched_rows(model: TextModel, gradient: Mapping[str, Any], vocabulary: int) -> Int[np.ndarray, " ids"] | None:
    """The ids whose rows have a gradient in every table that is used for nothing else; None without such a table."""
    touched = None
    for table in model.lookups.tables:
        if table.alone and table.path in gradient:
            rows = np.asarray(gradient[table.path]).reshape(table.rows, -1)
            here = np.any(rows != 0, axis=1)[:vocabulary]
            touched = here if touched is None else touched & here
    return None if touched is None else np.flatnonzero(touched)


def find_candidates(
    model: TextModel,
    variables: Arrays,
    gradient: Mapping[str, Any],
    reads: Reads,
    spans: Sequence[Span],
    vocabulary: int,
    rounding: float,
) -> Candidates | None:
    """By the local reads `spans`; None where distances do not break off above the client's `rounding`."""
    touched = touched_rows(model, gradient, vocabulary)
    tried = np.arange(vocabulary) if touched is None else touched
    rest = np.setdiff1d(np.arange(vocabulary), tried)
    generator = np.random.default_rng(0)
    contrast = generator.choice(rest, min(_CONTRAST, len(rest)), replace=False)
    ids = np.concatenate([tried, contrast])
    whole = np.repeat(ids[:, None], model.length, axis=1)
    found = np.full((len(ids), model.length), np.nan)
    for span, each in zip(spans, distances(model, variables, spans, whole), strict=True):
        own = reads.own(span.read)
        for row in (r for r in span.rows if own[r] >= 0):
            there = np.where(each[:, row] > 0, each[:, row], np.nan)  # a token of size 0 lies in every span
            found[:, own[row]] = np.fmax(found[:, own[row]], there)
    known = np.sort(np.maximum(found[np.isfinite(found)], max(_FLOOR, rounding)))
    ratios = known[1:] / known[:-1]
    split = int(np.argmax(ratios)) + 1 if len(ratios) else 0
    if not split or not ratios[split - 1] >= GAP:
        return None
    bound = float(np.sqrt(known[split - 1] * known[split]))
    inside = np.where(np.isfinite(found), found, np.inf)[: len(tried)] <= bound
    allowed = tuple(tried[inside[:, t]] for t in range(model.length))
    return Candidates(allowed=allowed, bound=bound, gap=float(ratios[split - 1]), touched=touched)
