"""How each segment is solved: through its channels, by the factor of its weights, else by LSMR."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from leakjax.attacks.layerwise.factors import factor_of
from leakjax.attacks.layerwise.system import slope_floor
from leakjax.attacks.problem import Problem
from leakjax.constraints.channel_reading import read_channels
from leakjax.constraints.channels import Channels
from leakjax.runtime.memory import fits_in_memory
from leakjax.segments.chain import Segment
from leakjax.solvers.normal_factor import NormalFactor

MOST_POSITIONS = 512
"""Positions up to which K1's spectrum is found: 9 n^3 operations, 1.2 GFLOP, about as many as 600 steps of LSMR."""


class Kind(NamedTuple):
    """A segment that is solved through its `channels`; whether their K1 has `full` column rank by itself."""

    channels: Channels
    full: bool


class Route(NamedTuple):
    """How a segment is solved: through its channels, or by the `factor` of its weights."""

    kind: Kind | None
    factor: NormalFactor | None


def routes(problem: Problem, segments: Sequence[Segment], size: int) -> dict[Segment, Route]:
    """The segments that are solved directly, `size` clients at once, and how.

    Only float64, for clients of that precision: the noise of others is weighed by a least-squares solution of all rows
    at once, which a solution block by block is not.
    """
    if problem.solver != "auto" or not slope_floor(problem):
        return {}
    linear = [s for s in segments if s.linear and s.paths]
    found = {}
    readings = read_channels(linear, problem.variables, MOST_POSITIONS) if linear else []
    for segment, reading in zip(linear, readings, strict=True):
        if "gradient" not in problem.blocks(segment):
            continue
        if reading is not None and reading.channels.sizes(segment.input.shape)[0] <= MOST_POSITIONS:
            found[segment] = Route(Kind(reading.channels, bool(reading.full)), None)
        elif "forward" in problem.blocks(segment):
            factor = factor_of(problem, segment)
            if factor is not None and fits_in_memory(size * _closing_bytes(problem, segment, factor)):
                found[segment] = Route(None, factor)
    return found


def _closing_bytes(problem: Problem, segment: Segment, factor: NormalFactor) -> int:
    """Memory in which one client's weak directions are closed: what the layer's rows see of each, twice."""
    rows = math.prod(segment.output.shape) + sum(problem.gradients[p][0].size for p in segment.paths)
    return 2 * 8 * factor.weak.shape[1] * segment.input.shape[0] * (rows + math.prod(segment.input.shape))
