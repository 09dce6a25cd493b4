"""Counts over a whole network: Chen & Campbell's index c(M), and the leaked dimensions that its shapes allow."""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from leakjax.leakage.structural.counts import gradient_entries, live_positions, structural_count
from leakjax.leakage.structural.normalized import Known, batched, normalized_count
from leakjax.segments.geometry import Geometry, Normalization

MOST_SUBSETS = 4096


class LayerCount(NamedTuple):
    """`rank` of a layer's constraints as shapes allow it, entries of its input that are `live`, whether the rank is
    `exact`, and the `constants` that may be added to its input without a trace (`NormalizedCount`)."""

    rank: int
    live: int
    exact: bool
    constants: int


def layer_weights(layers: int) -> list[float]:
    """(d - 1 - i) / (d - 1) for each of d layers, the dense head (0) included; 1 where it is the only one."""
    return [1.0] if layers == 1 else [(layers - 1 - i) / (layers - 1) for i in range(layers)]


def copa_index(deficiencies: Sequence[int]) -> tuple[float, int]:
    """(c(M), the same rounded term by term) from rank - unknowns of all layers, the head's included.

        c(M) = sum_i (d - 1 - i) / (d - 1) * (rank(U_i) - n_i),  i = 0 .. d - 2

    Chen & Campbell, "Understanding training-data leakage from gradients in neural networks" (arXiv 2111.10178), section
    4; their code rounds each term, half to even, before it sums. Whether a layer's padding counts as known unknowns
    does not matter: it adds as much to the rank as to the unknowns.
    """
    terms = [w * d for w, d in zip(layer_weights(len(deficiencies)), deficiencies, strict=True)]
    return float(sum(terms)), sum(round(term) for term in terms)


def layer_counts(geometries: Sequence[Geometry]) -> list[LayerCount]:
    """The rank that shapes allow every layer, of one example: that of its own rows, or where a train-mode norm follows
    at once, of its rows and the norm's together."""
    found = []
    for i, geometry in enumerate(geometries):
        norm = _norm_behind(geometries, i)
        if norm is None:
            count = structural_count(geometry)
            alone = _norm_at(geometries, i + 1) is None  # else dL/dz has relations that the count knows nothing of
            found.append(LayerCount(count.rank, count.live, count.exact and alone, 0))
        else:
            joint = normalized_count(geometry, norm, known=_known(norm))
            found.append(LayerCount(joint.rank, joint.live, joint.exact, joint.constants))
    return found


def structural_leaked(
    geometries: Sequence[Geometry],
    *,
    shares: Sequence[float] | None = None,
    withheld: Collection[int] = (),
    examples: int = 1,
) -> int:
    """An upper bound, generically met, on how many numbers about `examples` images a gradient holds.

    From the last layer to the first: what is known of a layer's input is all that both of its blocks see where all it
    needs of its output is known, and else at most what is known of its output and the entries of its own gradient,

        K_i = min(live_i, min(K_(i+1), share_i rows_i) + entries_i),

    over those outputs that the layers behind it read at all. `shares`: of each layer's outputs those whose activation
    passes a change on. Of the layers `withheld` no gradient is sent. A train-mode norm hides one number, the mean, of
    all that share one, or adds two where means and variances are `told`; where all is known behind it, the layer before
    tells what `normalized_count` says of both. Examples that share no statistics are counted one by one.
    """
    together = any(g.normalization is not None and g.normalization.over_examples for g in geometries)
    if examples == 1 or not together:
        return examples * _leaked(geometries, geometries, shares, withheld, 1)
    return _leaked(geometries, [batched(g, examples) for g in geometries], shares, withheld, examples)


def _leaked(
    each: Sequence[Geometry],
    counted: Sequence[Geometry],
    shares: Sequence[float] | None,
    withheld: Collection[int],
    examples: int,
) -> int:
    """Of layers `counted` for all examples at once; `each` for one."""
    known, used, whole = 0, None, False
    for i in reversed(range(len(counted))):
        geometry, share = counted[i], 1.0 if shares is None else shares[i]
        used = used if used is not None and _same_axes(geometry, used) else None
        count = structural_count(geometry, used)
        own = 0 if i in withheld else gradient_entries(geometry)
        norm, behind = geometry.normalization, _norm_behind(each, i, examples)
        rows = geometry.rows if used is None else geometry.features * math.prod(int(np.sum(u)) for u in used)
        through = min(known, math.floor(share * rows)) + own
        means = 0 if norm is None else geometry.unknowns // (norm.entries * (examples if norm.over_examples else 1))
        if i == len(counted) - 1:
            known = min(own + (2 * means if norm is not None and norm.told else 0), count.live)
        elif norm is not None:
            known = min(count.live, through + 2 * means) if norm.told else min(count.live - means, through)
            used = None
            whole = whole and share == 1.0
            continue
        elif behind is not None and share == 1.0:
            joint = normalized_count(each[i], behind, examples, _known(behind))
            complete = whole and i not in withheld
            known = joint.rank if complete else min(joint.live - joint.constants, through)
        else:
            complete = whole and share == 1.0 and i not in withheld and _norm_at(each, i + 1) is None
            known = count.rank if complete else min(count.live, through)
        whole = known >= count.live
        used = live_positions(geometry, used) if geometry.simple and geometry.axes else None
    return known


def _known(norm: Normalization) -> Known:
    """Which statistics of a norm are known: all that are sent, else, by epsilon, the deviations alone."""
    return "all" if norm.told else "sigma"


def _norm_at(geometries: Sequence[Geometry], i: int) -> Normalization | None:
    return geometries[i].normalization if i < len(geometries) else None


def _norm_behind(geometries: Sequence[Geometry], i: int, examples: int = 1) -> Normalization | None:
    """The normalization of the very outputs of layer i, where it takes its statistics over three numbers or more: of
    two epsilon alone leaves something, which `normalized_count` leaves out."""
    norm = _norm_at(geometries, i + 1)
    if norm is None or not norm.direct or not geometries[i].simple:
        return None
    return norm if norm.entries * (examples if norm.over_examples else 1) > 2 else None


def smallest_withheld(geometries: Sequence[Geometry], others: int = 0) -> tuple[tuple[int, ...], int] | None:
    """(layers, leaked dimensions without their gradients): the fewest that leave the image open, and of these sets the
    one that leaves least; None where it is open anyway, and where `others`, numbers that are sent beside all gradients,
    can tell everything by themselves. Sets of consecutive layers alone where there are very many."""
    n, layers = geometries[0].unknowns, range(len(geometries))
    if structural_leaked(geometries) + others < n:
        return None
    for size in range(1, len(geometries) + 1):
        sets = itertools.combinations(layers, size)
        if math.comb(len(geometries), size) > MOST_SUBSETS:
            sets = (tuple(range(k, k + size)) for k in range(len(geometries) - size + 1))
        leaked, best = min((structural_leaked(geometries, withheld=chosen) + others, chosen) for chosen in sets)
        if leaked < n:
            return best, leaked
    return None


def _same_axes(geometry: Geometry, used: Sequence[np.ndarray]) -> bool:
    """Whether the outputs of a map are laid out as what the next one reads."""
    return [len(u) for u in used] == [(axis.after or axis.kernel).outputs for axis in geometry.axes]
