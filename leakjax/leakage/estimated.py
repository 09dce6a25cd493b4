"""The numeric part of an audit where the Jacobian is too large to write down."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from leakjax.leakage.dense import PRIOR_DEVIATION
from leakjax.leakage.layers import LayerLeakage
from leakjax.leakage.matrix_free import SpectrumEstimate, estimate_map, estimate_spectrum
from leakjax.leakage.request import Arrays, Asked, Measured
from leakjax.report.audit.record import NoisePoint
from leakjax.segments.tracing.network import Gradient

MAP_STEPS, MAP_PROBES, MAP_BLOCK = 60, 4, 8


def estimate(
    gradient: Gradient, clipped: Gradient | None, arrays: Arrays, layers: Sequence[LayerLeakage], asked: Asked
) -> Measured:
    """Effective dimensions by random probes, the largest singular values, and a map where noise makes one cheap.

    Arguments: `gradient` and, where DP-SGD is asked for, the `clipped` one; `layers`, what is known of them.
    """
    x, unit = arrays[1], PRIOR_DEVIATION * asked.scale
    remark = f"{x.size:,} unknowns are too many for dense matrices: "
    points: tuple[NoisePoint, ...] = ()
    asked.tell("estimating the spectrum")
    floors = [sigma / unit for sigma in asked.noise] or [math.inf]
    found = estimate_spectrum(gradient, *arrays, floor=floors, seed=asked.seed) if asked.noise else None
    if clipped is not None:
        sigmas = asked.private_sigmas(len(x))
        asked.tell("estimating the spectrum of clipped gradients")
        private = estimate_spectrum(clipped, *arrays, floor=[s / unit for s in sigmas], seed=asked.seed)
        points = asked.private(_points(sigmas, private))
    if found is None:
        remark += "no spectrum, map or bound without noise levels"
        return Measured(layers=layers, leakage=None, points=points, spectrum=None, map=None, remarks=(remark,))
    plain = (dataclasses.replace(point, asked=asked.asked) for point in _points(asked.noise, found))
    points = (*plain, *points)
    spectrum = tuple((asked.scale * found.singular_values).tolist())
    remark += "effective dimensions are estimated, the spectrum is its largest values, and there is no bound"
    reached = [f for f in floors if found.singular_values[:1].max(initial=0.0) <= MAP_STEPS * f]
    if not reached:
        remark += " and no map (name a higher noise level for one)"
        return Measured(layers=layers, leakage=None, points=points, spectrum=spectrum, map=None, remarks=(remark,))
    asked.tell("estimating the map")
    options = {"probes": MAP_PROBES, "steps": MAP_STEPS, "block": MAP_BLOCK, "seed": asked.seed}
    drawn = estimate_map(gradient, *arrays, floor=min(reached), **options)
    error = float(np.sqrt(np.mean(drawn.standard_error**2)))
    remark += f"; the map is of blocks of {MAP_BLOCK} at noise {min(reached) * unit:g}, standard error {error:.2f}"
    return Measured(layers=layers, leakage=None, points=points, spectrum=spectrum, map=drawn.map, remarks=(remark,))


def _points(sigmas: Sequence[float], found: SpectrumEstimate) -> tuple[NoisePoint, ...]:
    rows = zip(sigmas, found.counts.tolist(), found.counts_error.tolist(), strict=True)
    return tuple(
        NoisePoint(
            sigma=sigma,
            psnr_bound=None,
            psnr_estimate_prior=None,
            effective_dimensions=count,
            effective_dimensions_error=error,
        )
        for sigma, count, error in rows
    )
