"""What a layer's constraints say of the input of an earlier segment: one residual, with a pull-back depth.

For segments j..i and dL/dz_i the unknown is u = x_j. Pushed forward through j..i it must meet layer i's forward and
gradient constraints and, with dL/dz pulled back through the very same u, the gradient blocks of j..i-1 (the pull-back
constraint of Chen & Campbell, arXiv 2111.10178, section 3):

    x_j = u,  z_k = f_k(theta_k, x_k),  x_{k+1} = act_k(z_k)
    dz_{k-1} = act'_{k-1}(z_{k-1}) * (df_k/dx)^T dz_k
    z_i = z,  d/dtheta_k <dz_k, f_k(theta, x_k)> = g_k   (k = j..i)

Depth i - j = 0 is R-GAP's layer system.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from leakjax.constraints.layer import Rows, over_gradients, segment_rows
from leakjax.models.activations import Activation, Preimage
from leakjax.models.reader import Arrays
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.smoothing import gaussian_mean, rms


class Residual(NamedTuple):
    """`function(u, smoothing)`: weighted rows, 0 at the truth where `smoothing` is None; `size`: norm of the weighted
    right-hand sides, so that ||function(u, None)|| / size is the relative residual.

    A smoothing s > 0 replaces every activation act between u and z_i by the mean of act(z + s rms(z) n) over standard
    normal n, its slope by that mean's, and nonlinear maps likewise: kinks become smooth, and sharpen again as s falls.
    """

    function: Callable[[Float[Array, "..."], float | Float[Array, ""] | None], Rows]
    size: Float[Array, ""]


def push_forward(
    segments: Sequence[Segment],
    variables: Arrays,
    u: Float[Array, "..."],
    smoothing: float | Float[Array, ""] | None = None,
) -> tuple[list[Float[Array, "..."]], list[Float[Array, "..."]], list[Float[Array, "..."]]]:
    """(x_k), (z_k) of all segments, and act'_k(z_k) of all but the last, from the first segment's input."""
    xs, zs, slopes = [u], [], []
    for segment in segments:
        zs.append(segment.function(variables, xs[-1], smoothing))
        if len(zs) == len(segments):
            break
        value, slope = _activate(segment.activation, variables, zs[-1], smoothing)
        xs.append(value)
        slopes.append(slope)
    return xs, zs, slopes


def pull_gradients(
    segments: Sequence[Segment],
    variables: Arrays,
    xs: Sequence[Float[Array, "..."]],
    slopes: Sequence[Float[Array, "..."]],
    dz: Float[Array, "..."],
    smoothing: float | Float[Array, ""] | None = None,
) -> tuple[dict[str, Float[Array, "..."]], Float[Array, "..."]]:
    """({path: d/dtheta <dz_k, f_k(theta, x_k)>} of all segments, dL/dx of the first), from dL/dz of the last one."""
    rows: dict[str, Float[Array, "..."]] = {}
    dx = dz
    for k in reversed(range(len(segments))):
        rows.update(segment_rows(segments[k], variables, dz, xs[k], smoothing)[1])
        dx = segments[k].cotangent(variables, xs[k], dz, smoothing)
        if k:
            dz = slopes[k - 1] * dx.reshape(slopes[k - 1].shape)
    return rows, dx


def pulled_back(
    segments: Sequence[Segment],
    variables: Arrays,
    preimage: Preimage,
    dz: Float[Array, "..."],
    gradients: Mapping[str, Float[Array, "..."]],
) -> Residual:
    """The residual on the input of `segments[0]`, from `preimage` and `dz` at the last one's output.

    Every block is divided by the rms of its right-hand side; entries of z that are not known get weight 0, and so do
    all gradient blocks where a slope at z_i, and with it dL/dz, is not known. Statistics of the data that are among
    the `gradients` are rows as well.
    """
    known = jnp.where(preimage.known, 1.0, 0.0).astype(dz.dtype)
    over_z = known / rms(known * preimage.value)
    trusted = jnp.all(preimage.slope_known).astype(dz.dtype)
    over = {p: trusted * a for p, a in over_gradients(gradients, [p for s in segments for p in s.paths]).items()}
    told = {k: [n for n in s.statistics.names if n in gradients] for k, s in enumerate(segments) if s.statistics}
    for names in told.values():
        over |= over_gradients(gradients, names)

    def function(u: Float[Array, "..."], smoothing: float | Float[Array, ""] | None) -> Rows:
        xs, zs, slopes = push_forward(segments, variables, u, smoothing)
        rows, _ = pull_gradients(segments, variables, xs, slopes, dz, smoothing)
        for k, names in told.items():
            measured = segments[k].statistics.measure(variables, xs[k])  # type: ignore[union-attr]
            rows |= {name: measured[name] for name in names}
        return over_z * (zs[-1] - preimage.value), {p: over[p] * (g - gradients[p]) for p, g in rows.items()}

    target = (over_z * preimage.value, {p: over[p] * gradients[p] for p in over})
    return Residual(function, optax.tree.norm(target))


def _activate(
    activation: Activation, variables: Arrays, z: Float[Array, "*z"], smoothing: float | Float[Array, ""] | None
) -> tuple[Float[Array, "*z"], Float[Array, "*z"]]:
    """act(z) and act'(z), or both averaged over normal perturbations of z of relative size `smoothing`."""
    if smoothing is None:
        return activation.function(variables, z), activation.slope(variables, z)
    return gaussian_mean(functools.partial(activation.function, variables), z, smoothing)
