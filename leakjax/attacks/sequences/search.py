"""From candidates to sequences: what stands together behind one gradient.

Behind a causal attention the tokens up to t do not depend on later ones, so that prefixes are extended by every
candidate and kept where their tokens lie in the spans of the later reads: all sequences that pass are found. Where
every token sees every other, one sequence is a root of

    r(w) = ((I - Q_k Q_k^T) u_k(sum_c w_tc e_c) / ||u_k||)_k = 0,      w_t on the candidates of position t

in real weights w, from random ones; a root has one candidate a position, and is tried as it is. Few sequences are tried
all.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from leakjax.attacks.sequences.candidates import Candidates, Span, distances, outside
from leakjax.attacks.sequences.reading import Reads, TextModel, tokens_of
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.solvers.gauss_newton import levenberg_marquardt

MOST_PREFIXES = 4096  # that pass at one position: more say that the spans tell nothing
MOST_TRIED = 4096  # sequences that are tried all, in seconds
TRIALS = 24  # starts for each sequence: of four at sixteen positions one start in two ended at one
_USED = 0.1  # of a start's weights, for candidates that stand in other sequences
_OUTER, _INNER = 60, 200
_GENERIC = 1e-9  # of the largest singular value: those of different tokens are far above, of equal ones rounding
_REPAIRS = 4  # single ids exchanged in a rounded minimum: those that missed were wrong at one or two positions


class Sequences(NamedTuple):
    """`ids` (n, T), -1 where nothing tells; whether they are `all` that pass."""

    ids: Int[np.ndarray, "n T"]
    all: bool


class Search(NamedTuple):
    """What a search works with."""

    model: TextModel
    variables: Arrays
    reads: Reads
    spans: tuple[Span, ...]
    candidates: Candidates

    @property
    def open(self) -> list[int]:
        """The positions that have candidates."""
        return [t for t, ids in enumerate(self.candidates.allowed) if len(ids)]

    def passing(self, ids: Int[np.ndarray, "n T"], upto: int | None = None) -> np.ndarray:
        """Whether sequences are of candidates and lie in every span, in the rows of the ids before `upto` or in all."""
        return np.all(self.worst(ids, upto) <= self.candidates.bound, axis=1)

    def worst(self, ids: Int[np.ndarray, "n T"], upto: int | None = None) -> Float[np.ndarray, "n T"]:
        """The largest distance of the rows that end at each position, 0 for those that have no candidates."""
        found = np.zeros((len(ids), self.model.length))
        known = set(self.open)
        for span, each in zip(self.spans, distances(self.model, self.variables, self.spans, ids), strict=True):
            own = self.reads.own(span.read)
            for row in span.rows:
                t = int(own[row])
                if t in known and (upto is None or t < upto):
                    found[:, t] = np.maximum(found[:, t], each[:, row])
        return found


def find_sequences(search: Search, examples: int, seed: int, tell: Callable[[str], None]) -> Sequences:
    """At most so many as pass; `all` of them where the search left none out."""
    allowed = [search.candidates.allowed[t] for t in search.open]
    if all(len(ids) == 1 for ids in allowed) or math.prod(map(len, allowed)) <= MOST_TRIED:
        return _each(search, allowed)
    later = [span.read for span in search.spans if not search.reads.local(span.read)]
    if later and all(_follows(search.reads, span.read) for span in search.spans):
        return _prefixes(search, tell)
    if not search.model.lookups.tables:
        return Sequences(np.zeros((0, search.model.length), int), False)  # nothing to mix
    return _relaxed(search, examples, np.random.default_rng(seed), tell)


def _follows(reads: Reads, read: int) -> bool:
    """Whether rows see nothing behind their own position, and every position has a row."""
    own = reads.own(read)
    return len(set(own.tolist()) - {-1}) == reads.depends[read].shape[1]


def _each(search: Search, allowed: Sequence[np.ndarray]) -> Sequences:
    ids = np.full((math.prod(map(len, allowed)), search.model.length), -1)
    ids[:, search.open] = list(itertools.product(*allowed))
    return Sequences(ids[search.passing(_filled(ids))], True)


def _filled(ids: Int[np.ndarray, "n T"]) -> Int[np.ndarray, "n T"]:
    """With 0 where nothing tells: what stands there has no gradient."""
    return np.where(ids < 0, 0, ids)


def _prefixes(search: Search, tell: Callable[[str], None]) -> Sequences:
    ids = np.full((1, search.model.length), -1)
    for t in search.open:
        allowed = search.candidates.allowed[t]
        ids = np.repeat(ids, len(allowed), axis=0)
        ids[:, t] = np.tile(allowed, len(ids) // len(allowed))
        ids = ids[search.passing(_filled(ids), upto=t + 1)]
        tell(f"position {t}: {len(ids)} beginnings")
        if not 0 < len(ids) <= MOST_PREFIXES:
            return Sequences(ids[:0], False)
    return Sequences(ids, True)


def _relaxed(search: Search, examples: int, generator: np.random.Generator, tell: Callable[[str], None]) -> Sequences:
    table, mask = _table(search)
    variables = dict(search.variables)
    solve = _solver(search.model, tuple(span.read for span in search.spans))
    bases = tuple(to_device(span.basis) for span in search.spans)
    found: list[tuple[int, ...]] = []
    for trial in range(TRIALS * examples):
        weights = np.where(mask, generator.exponential(size=mask.shape), 0)
        if trial % 2:  # what no sequence has taken yet stands in the others
            weights = np.where(_taken(table, found), _USED * weights, weights)
        weights /= weights.sum(1, keepdims=True)
        end = solve(variables, bases, to_device(table), to_device(mask), to_device(weights))
        best = np.asarray(jnp.where(mask, end, -jnp.inf)).argmax(1)
        sequence = _repaired(search, table[best, np.arange(search.model.length)])
        if sequence is not None and sequence not in found:
            found.append(sequence)
        tell(f"start {trial}: {len(found)} of {examples} sequences")
        if len(found) == examples:
            break
    ids = np.array(found, int).reshape(-1, search.model.length)
    closed = [t for t in range(search.model.length) if t not in search.open]
    ids[:, closed] = -1
    return Sequences(ids, False)


def _table(search: Search) -> tuple[np.ndarray, np.ndarray]:
    """(candidates (n, T), mask (T, n)), the first candidate again where a position has fewer, id 0 where none."""
    allowed = [ids if len(ids) else np.zeros(1, int) for ids in search.candidates.allowed]
    most = max(map(len, allowed))
    table = np.stack([np.pad(ids, (0, most - len(ids)), mode="edge") for ids in allowed], axis=1)
    mask = np.stack([np.arange(most) < len(ids) for ids in allowed])
    return table.astype(np.int32), mask


def _taken(table: np.ndarray, found: Sequence[Sequence[int]]) -> np.ndarray:
    """(T, n): the candidates that stand in a sequence that was found."""
    return np.any([table == np.array(one) for one in found] or [np.zeros(table.shape, bool)], axis=0).T


def _repaired(search: Search, ids: np.ndarray) -> tuple[int, ...] | None:
    """A sequence that passes, at most a few ids from `ids`; None where there is none on the steepest way."""
    for _ in range(_REPAIRS):
        here = search.worst(ids[None])[0]
        if np.all(here <= search.candidates.bound):
            return tuple(int(v) for v in ids)
        moves = list(_exchanged(search, ids))
        if not moves:
            return None
        totals = np.sum(search.worst(np.stack(moves)), axis=1)
        if not np.min(totals) < np.sum(here):
            return None
        ids = moves[int(np.argmin(totals))]
    return tuple(int(v) for v in ids) if search.passing(ids[None])[0] else None


def _exchanged(search: Search, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Every sequence of candidates that differs from `ids` at one position."""
    for t in search.open:
        for v in search.candidates.allowed[t]:
            if v != ids[t]:
                yield np.where(np.arange(len(ids)) == t, v, ids)


def batches(search: Search, ids: Int[np.ndarray, "n T"], examples: int) -> list[Int[np.ndarray, "B T"]] | None:
    """The choices of `examples` among sequences that pass whose tokens have the rank of the first span, which those of
    the client have; None where there are too many. Sequences of one token over and over pass where the model knows no
    positions, and tokens of two sequences may stand together in others: such have less."""
    if len(ids) <= examples:
        return [ids] if len(ids) else []
    if math.comb(len(ids), examples) > MOST_TRIED:
        return None
    span = search.spans[0]
    own = search.reads.own(span.read)
    rows = [r for r in range(len(own)) if own[r] < 0 or own[r] in search.open]
    tokens = tokens_of(search.model, search.variables, _filled(ids), span.read + 1)[span.read][:, rows]
    found = []
    for chosen in itertools.combinations(range(len(ids)), examples):
        values = np.linalg.svd(np.concatenate(tokens[list(chosen)]), compute_uv=False)
        if int(np.sum(values > _GENERIC * values[0])) == span.rank:
            found.append(ids[list(chosen)])
    return found


def alone(search: Search, ids: Int[np.ndarray, "n T"]) -> bool:
    """Whether no sequence that differs from one of `ids` at one position, in the order of two, or is one of them
    reversed or rotated, passes, but for these themselves: of a model without positions every order does."""
    known = _filled(ids)
    for one in known:
        moves = [*_exchanged(search, one), *_reordered(search, one)]
        if moves:
            passing = np.stack(moves)[search.passing(np.stack(moves))]
            if any(not np.any(np.all(known == other, axis=1)) for other in passing):
                return False
    return True


def _reordered(search: Search, ids: np.ndarray) -> Iterator[np.ndarray]:
    """The open ids with two exchanged, reversed, and rotated."""
    places = np.array(search.open)
    for a, b in itertools.combinations(range(len(places)), 2):
        order = places.copy()
        order[[a, b]] = order[[b, a]]
        yield _placed(ids, places, order)
    yield _placed(ids, places, places[::-1])
    for shift in range(1, len(places)):
        yield _placed(ids, places, np.roll(places, shift))


def _placed(ids: np.ndarray, places: np.ndarray, order: np.ndarray) -> np.ndarray:
    moved = ids.copy()
    moved[places] = ids[order]
    return moved


@keep(16)
def _solver(model: TextModel, used: tuple[int, ...]) -> Callable[..., Float[Array, "T n"]]:
    """Compiled: (variables, bases, candidates (n, T), mask (T, n), weights (T, n)) -> weights at a minimum."""
    tables = [table.value for table in model.lookups.tables]

    def rows(variables: Arrays, bases: Sequence[Array], table: Array, mask: Array, weights: Array) -> Any:
        kept = jnp.where(mask, weights, 0.0)
        shares = kept / jnp.sum(kept, axis=1, keepdims=True)
        each = jax.lax.map(lambda ids: model.lookups.embedded(variables, ids[None]), table)
        mixed = [jnp.einsum("tn,notw->otw", shares, e) for e in each]
        given = dict(zip(tables, mixed, strict=True))
        values = model.tokens.values(variables, table[:1], max(used) + 1, given)
        found = [outside(values[k], q) for k, q in zip(used, bases, strict=True)]
        return [*found, jnp.where(mask, 0.0, weights)]

    def solve(variables: Arrays, bases: Sequence[Array], table: Array, mask: Array, weights: Array) -> Array:
        function = functools.partial(rows, variables, bases, table, mask)
        tolerance = 4 * float(jnp.finfo(weights.dtype).eps)
        return levenberg_marquardt(
            function,
            weights,
            size=jnp.ones((), weights.dtype),
            tolerance=tolerance,
            max_steps=_OUTER,
            max_inner=_INNER,
        ).x

    return jax.jit(solve)
