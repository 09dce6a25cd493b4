"""What an affine layer and a train-mode normalization behind it tell together of the layer's input.

With z = W x, zh = (z - mu) / sigma known and q = dL/dz sigma, which the normalization makes of what is known behind it,

    W x - mu - sigma zh = -bias                          forward rows, x of B examples
    sum_o q_o x_(so + dk) - sigma g_k = 0                gradient rows, a row for each channel and offset

in the unknowns x, mu and sigma. A batch is one more axis, with a kernel of one position. q sums to zero wherever a mean
was taken and is orthogonal to zh: of N outputs a channel it spans O = min(C_out, N - 1) behind batch norm. In the
classes of `counts`,

    rank_q = C_in sum_{q, q'} min(O n_q n_q', L_q L_q' - e_q e_q')
    known statistics:   min(read, rank_q + C_out (N - O))
    known sigma alone:  min(read - D, rank_q + C_out (N - O - 1)),   D = C_in sum_{q, q'} e_q e_q'

are the directions of x that are determined, e_q being 1 where no window reaches over the border through class q. D is
a true ambiguity: whatever is added to x by input channel and position modulo the stride moves each channel of z by a
constant, and sum q = 0. Where sigma is told by nothing but epsilon, 1 - var(zh) = epsilon / sigma^2, a direction more
is weak, x's common size: relations <q_a, zh_b> of the two blocks tie all sigma of a layer to each other.

Instance norm takes each example by itself (B for each 1 above); norms that share statistics between channels leave no
constant, and their means are found from the relations of the two blocks. The count is never below the rank of random
layers, and equal to it where `exact` says so: where no window reaches over the border, and either windows do not
overlap or the count is all that is read (of several examples, if there are no more filters than channels).
"""

import itertools
import math
from typing import Literal, NamedTuple

from leakjax.leakage.structural.counts import is_plain, joined, live_outputs, live_positions, tap_classes
from leakjax.segments.geometry import Axis, Geometry, Normalization, Window

Known = Literal["all", "sigma", "none"]
"""Which statistics are: all, sigma alone (by epsilon), or none."""


class NormalizedCount(NamedTuple):
    """Directions of x that are determined (`rank`), entries that are `live`, and whether the rank is `exact`.

    `constants`: additions to x, constant along an input channel (or its positions of one residue modulo the stride),
    that leave no trace; `sizes`: how many parts of x have a common size that only epsilon tells.
    """

    rank: int
    live: int
    exact: bool
    constants: int
    sizes: int


def batched(geometry: Geometry, examples: int) -> Geometry:
    """The same map of a whole batch: the examples are one axis more, of a kernel of one position."""
    axis = Axis(examples, Window(1, 1, 0, examples))
    sizes = geometry._replace(unknowns=examples * geometry.unknowns, rows=examples * geometry.rows)
    return sizes._replace(axes=(*geometry.axes, axis)) if geometry.simple else sizes


def normalized_count(
    geometry: Geometry, normalization: Normalization, examples: int = 1, known: Known = "sigma"
) -> NormalizedCount:
    """The directions of the input of a simple map that its rows, and a normalization behind it, determine.

    Arguments: `geometry` of one example; `examples` B of the gradient; `known`, which statistics are.
    """
    groups = geometry.groups
    channels, features = geometry.channels // groups, geometry.features // groups
    spans, plain = _spans(geometry, normalization, examples), all(map(is_plain, geometry.axes))
    everything, gradient, constants = 0, 0, 0
    for combination in itertools.product(*map(tap_classes, geometry.axes)):
        taps = joined(combination)
        readings, lost = examples * taps.readings, spans.constants if taps.inside else 0
        gradient += channels * min(spans.q * taps.offsets, readings - lost)
        everything += channels * readings
        constants += channels * lost
    rows = gradient + features * (spans.outputs - spans.q)
    live = examples * geometry.channels * math.prod(int(p.sum()) for p in live_positions(geometry))
    pooled = any(axis.after for axis in geometry.axes)
    apart = all(axis.kernel.stride >= axis.kernel.size for axis in geometry.axes)
    sure = plain and spans.exact
    full = sure and (examples == 1 or features <= channels)  # else rows of W depend on each other, w_1 w_2 - w_2 w_1
    if known == "all":
        told = min(everything, everything - constants + features * spans.constants, rows)
        exact = (sure and apart) or (full and told < rows)
        return _count(min(groups * told, live), live, exact=exact)
    rank = min(everything - constants, rows - spans.means)
    exact = (sure and apart) or (full and rank < rows - spans.means)
    unseen = 0 if pooled else groups * constants
    rank = min(groups * rank, live - unseen)
    if known == "sigma":
        return _count(rank, live, exact=exact, constants=unseen)
    own = spans.gradients * channels * math.prod(axis.kernel.size for axis in geometry.axes)
    rank = min(rank - spans.sizes, groups * (own + features * spans.outputs) - spans.statistics)
    return _count(rank if spans.scaled else 0, live, exact=exact, constants=unseen, sizes=spans.sizes)


def _count(rank: int, live: int, *, exact: bool, constants: int = 0, sizes: int = 0) -> NormalizedCount:
    return NormalizedCount(rank=max(rank, 0), live=live, exact=exact, constants=constants, sizes=sizes)


class _Spans(NamedTuple):
    """For each group of channels of a map, N the outputs of a channel.

    `outputs`: those of N that read anything; `q`: dimensions that q spans among them; `constants`: how many q is
    orthogonal to; `means`, `sizes`: how many the relations of both blocks leave free; `statistics`: means and standard
    deviations to be eliminated, of all groups (0 where padding alone tells some); `gradients`: channels whose gradient
    rows differ; `scaled`: whether N is enough to tell anything but them; `exact`: whether all this is.
    """

    outputs: int
    q: int
    constants: int
    means: int
    sizes: int
    statistics: int
    gradients: int
    scaled: bool
    exact: bool


def _spans(geometry: Geometry, normalization: Normalization, examples: int) -> _Spans:
    each = math.prod((axis.after or axis.kernel).outputs for axis in geometry.axes)
    live = math.prod(live_outputs(axis) for axis in geometry.axes)
    together = normalization.over_positions and each > 1
    by_channel = normalization.channels == 1
    return (_by_channel if by_channel else _across)(geometry, normalization, examples, each, live, together=together)


def _by_channel(
    geometry: Geometry, normalization: Normalization, examples: int, each: int, live: int, *, together: bool
) -> _Spans:
    """Batch norm, and instance norm."""
    features, groups = geometry.features // geometry.groups, geometry.groups
    batches = 1 if normalization.over_examples else examples if together else examples * each
    size, seen = examples * each // batches, examples * live // batches
    patches = math.prod(axis.kernel.size for axis in geometry.axes) * (geometry.channels // groups)
    one = 1 if min(patches, seen) > 1 else 2  # where all channels are one pattern, q has no part in it
    whole = seen == size
    return _Spans(
        outputs=examples * live,
        q=0 if size < 3 else min(features, batches * min(size - one, seen)),
        constants=batches,
        means=features * batches if whole else 0,
        sizes=batches * groups,
        statistics=2 * batches * geometry.features if whole else 0,
        gradients=features,
        scaled=size > 2 and seen > 1,
        exact=size > 2,
    )


def _across(
    geometry: Geometry, normalization: Normalization, examples: int, each: int, live: int, *, together: bool
) -> _Spans:
    """Layer norm and group norm: channels share statistics."""
    features, shared = geometry.features // geometry.groups, normalization.channels
    parts = features // shared if features % shared == 0 else 0  # 0 where statistics reach over groups of the map
    size, whole, outputs = shared * (each if together else 1), live == each, examples * live
    sizes = 0 if geometry.biases else examples * (geometry.features // math.lcm(features, shared))
    apart = all(axis.kernel.stride >= axis.kernel.size for axis in geometry.axes)
    zero_sum = 0 if together else parts
    q = 0 if size < 3 else min(features - zero_sum, outputs)
    means = examples - min(features - parts, examples, q) if together else outputs - q
    statistics = 2 * examples * (1 if together else each) * (geometry.features // shared)
    return _Spans(
        outputs=outputs,
        q=q,
        constants=0,
        means=parts * means if whole or not together else 0,
        sizes=sizes * (live if apart and not together else 1),
        statistics=statistics if whole else 0,
        gradients=features - zero_sum,
        scaled=size > 2,
        exact=False,
    )
