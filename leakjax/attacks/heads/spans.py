"""What a gradient says of the tokens behind it: the span of each read, and how many images it holds.

    span(Q_k) = columns of dL/dK_k,      rank Q_k = rank of the tokens of B images

No rank is guessed: that of the tokens is computed from random images, and a read is used where the singular values of
the gradient break off exactly there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.problem import Problem
from leakjax.runtime.arrays import to_device
from leakjax.segments.tracing.network import Network
from leakjax.segments.tracing.tokens import Tokens

READS = 4
"""A block of a transformer reads its tokens as often: for queries, keys and values, behind the attention, and before
and behind its hidden layer. Later reads cost more and bring no more rows than these."""
GAP = 30.0  # between the last singular value of the tokens and the first of what is rounding
_GENERIC = 1e-9  # of the largest: singular values of random images' tokens, which fall to 1e-6 or are zeros to 1e-15
_ALIKE = 1e-3  # of the logits: those of one example alone, and in a batch that it does not depend on


class Spans(NamedTuple):
    """The network of one example, its reads that are `used`, ranks[b - 1][k] of the tokens of read k of b examples, and
    the rank whole[k] that those of any number come to: a norm without bias leaves out one direction."""

    network: Network
    tokens: Tokens
    used: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    whole: tuple[int, ...]


def read_spans(problem: Problem) -> Spans | None:
    """None where the reads leave fewer dimensions of their spaces than an image has, all tokens together, or where the
    examples of a batch depend on each other."""
    if "token spans" not in problem.shared:
        problem.shared["token spans"] = _read(problem)
    return problem.shared["token spans"]


def _read(problem: Problem) -> Spans | None:
    network = None if problem.single is None else problem.single()
    tokens = None if network is None else network.tokens
    if network is None or tokens is None or not any(read.tokens > 1 for read in tokens.reads):
        return None
    if problem.examples > 1 and not _by_themselves(problem, network):
        return None
    reads, examples = tokens.reads, problem.examples
    known = [k for k, r in enumerate(reads) if any(p in problem.gradients for p in r.paths) and r.tokens > 1]
    count = max([examples, *(-(-reads[k].width // reads[k].tokens) + 1 for k in known)])
    each = [tokens.values(dict(problem.variables), x, len(reads)) for x in _random(problem, count)]
    ranks = tuple(tuple(_rank(read) for read in zip(*each[: b + 1], strict=True)) for b in range(examples))
    whole = tuple(_rank(read) for read in zip(*each, strict=True))

    def open_reads(examples: int) -> list[int]:
        return [k for k in known if ranks[examples - 1][k] < whole[k]][:READS]

    rows = sum(reads[k].tokens * (whole[k] - ranks[-1][k]) for k in open_reads(examples))
    if rows < math.prod(problem.input_shape):
        return None
    used = tuple(sorted({*open_reads(examples), *open_reads(1)}))
    return Spans(network=network, tokens=tokens, used=used, ranks=ranks, whole=whole)


def _by_themselves(problem: Problem, network: Network) -> bool:
    """Whether the logits of an example in a batch are those that it has alone."""
    variables, parts = dict(problem.variables), _random(problem, problem.examples)
    together = np.asarray(problem.network.logits(variables, to_device(np.concatenate(parts))))
    alone = np.concatenate([np.asarray(network.logits(variables, x)) for x in parts])
    return bool(np.allclose(together, alone, rtol=0, atol=_ALIKE * np.max(np.abs(alone))))


def _random(problem: Problem, count: int) -> list[Float[Array, "1 ..."]]:
    images = np.random.default_rng(0).uniform(*problem.input_range, (count, 1, *problem.input_shape))
    return list(to_device(images, problem.dtype))


def _rank(parts: Sequence[Any]) -> int:
    values = np.linalg.svd(np.concatenate([np.asarray(part, np.float64) for part in parts]), compute_uv=False)
    return int(np.sum(values > _GENERIC * values[0]))


def matrix_of(spans: Spans, read: int, gradient: Mapping[str, Any]) -> Float[np.ndarray, "width outputs"]:
    """The gradients of a read's matrices, each of its own size, side by side: they have the same tokens."""
    parts = [np.asarray(part, np.float64) for part in spans.tokens.reads[read].matrices(gradient)]
    return np.concatenate([m / (np.linalg.norm(m) or 1.0) for m in parts], axis=1)


def complements(
    spans: Spans, gradient: Mapping[str, Any], examples: int
) -> tuple[Float[np.ndarray, "width width"], ...] | None:
    """I - Q Q^T of the used reads, zeros for one whose columns do not span the tokens; None where all are zeros."""
    found = []
    for k in spans.used:
        width, rank = spans.tokens.reads[k].width, spans.ranks[examples - 1][k]
        left, values, _ = np.linalg.svd(matrix_of(spans, k, gradient), full_matrices=False)
        after = values[rank] if rank < len(values) else 0.0
        good = rank < spans.whole[k] and rank <= len(values) and values[rank - 1] > GAP * max(after, 1e-15 * values[0])
        basis = left[:, :rank]
        found.append(np.eye(width) - basis @ basis.T if good else np.zeros((width, width)))
    return tuple(found) if any(np.any(a) for a in found) else None


def telling_read(spans: Spans, gradient: Mapping[str, Any], examples: int) -> int | None:
    """The read whose gradient tells best that there is one image less: whose last singular value is the largest share
    of its first; None where no rank falls with the images."""
    shares = {}
    for k, whole in enumerate(spans.whole):
        rank, fewer = spans.ranks[examples - 1][k], spans.ranks[examples - 2][k] if examples > 1 else 0
        if not fewer < rank < whole or not any(p in gradient for p in spans.tokens.reads[k].paths):
            continue
        values = np.linalg.svd(matrix_of(spans, k, gradient), compute_uv=False)
        if rank <= len(values):
            shares[k] = values[rank - 1] / values[0]
    return max(shares, key=lambda k: shares[k], default=None)


def beyond(spans: Spans, read: int, gradient: Mapping[str, Any], examples: int) -> float:
    """The share of a read's gradient that `examples` images do not account for; its size where there are none."""
    if examples == 0:
        parts = spans.tokens.reads[read].matrices(gradient)
        return float(np.sqrt(sum(np.sum(np.square(np.asarray(m, np.float64))) for m in parts)))
    values = np.linalg.svd(matrix_of(spans, read, gradient), compute_uv=False)
    rank = spans.ranks[examples - 1][read]
    return float(values[rank] / values[0]) if rank < len(values) else 0.0
