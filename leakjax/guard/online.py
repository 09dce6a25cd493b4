"""A guard for federated training: it scores an update before a client sends it, and blocks it above a limit."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from leakjax.errors import InputError, unknown_name
from leakjax.guard import scoring
from leakjax.guard.clients import LossFunction, UpdateFunction
from leakjax.guard.derivative import Derivative, linearize_update
from leakjax.guard.scoring import Score
from leakjax.runtime.memory import fits_in_memory
from leakjax.segments.tracing.blindness import blind_spots, depends, seen_through

METHODS = ("sketch", "exact")
LIMITED = ("image", "batch")
EXACT_LIMIT = 4096
"""Pixels of a batch up to which "exact" is allowed."""

EDGE = 1e-6  # of the range: how far rounding may carry a pixel outside of it


class GuardState(NamedTuple):
    """The last score (0 and allowed before the first), and how many updates were sent and blocked."""

    score: Score
    sent: Any
    blocked: Any


class Guard(NamedTuple):
    """What `guard` returns.

    - `score(params, images, labels) -> Score`: jitted and pure;
    - `explain(score) -> str`: why its update was not allowed, in words;
    - `transformation`: an `optax.GradientTransformationExtraArgs`; its
      `update(updates, state, params, *, images, labels)` returns the updates where they are allowed, else zeros.
    """

    score: Callable[[Any, Any, Any], Score]
    transformation: optax.GradientTransformationExtraArgs
    explain: Callable[[Score], str]


def guard(
    loss_fn: LossFunction | None = None,
    *,
    update_fn: UpdateFunction | None = None,
    max_leaked_fraction: float | None = None,
    max_psnr: float | None = None,
    noise: float | None = None,
    method: str = "sketch",
    per: str = "image",
    probes: int = 2,
    steps: int = 4,
    prior: float = 0.25,
    seed: int = 0,
    input_range: tuple[float, float] = (0.0, 1.0),
) -> Guard:
    """Make a guard that scores what a client is about to send, u(x), by its Jacobian J = du/dx at the client's batch.

    An update is allowed where worst_leaked_fraction <= max_leaked_fraction and worst_psnr <= max_psnr, with

        worst_leaked_fraction = max_i mean_p (J^+ J)_pp,
        worst_psnr = max_i -10 log10 mean_p ((J^T J / noise^2 + 1 / prior^2)^-1)_pp,

    p over the pixels of image i. The first is what bounds every attack on an update without noise; the second the error
    that noise leaves an attacker whose prior is Gaussian: a local estimate, exact for a linear u. leaked_fraction =
    rank(J) / n and predicted_psnr are the same means over all n pixels of the batch, and limited where per="batch".

    Arguments:
    - `loss_fn(params, images, labels)`: the scalar that the client takes the gradient of; u is that gradient, and
      `params` any pytree (an nnx state, linen's "params", plain arrays). `loss_of(model)` makes one of a model;
    - `update_fn(params, images, labels)`: in its place, what the client sends where that is something else (clipped,
      several local steps, some layers withheld): any pytree;
    - `max_leaked_fraction` in (0, 1], `max_psnr` in dB with pixels in [0, 1]; at least one;
    - `noise`: standard deviation of the noise that will be added to every entry of u; None for none;
    - `method`: "exact" (n up to 4096): the projector and the inverse themselves, by `scoring.exact`; or "sketch": upper
      bounds, the PSNR's up to the sampling of `probes` random directions: the parameters that see data are counted (the
      rank itself, where it is below `probes`), and `steps` Lanczos steps bound the error: `scoring.sketch`;
    - `per`: what the limits are on, the worst "image" or the mean of the "batch". Of an image's share the sketch knows
      only that it is not above the count: on narrow networks alone is that below 1. Of its PSNR it knows more, where
      there is `noise`, at probes x steps forward and reverse passes of the batch an image ("batch": in all);
    - `prior`: standard deviation of a pixel to an attacker who sees nothing; `seed`: of the random directions.

    - `input_range`: the values (low, high) that a pixel of `images` can have; noise, prior and PSNR are those of
      pixels (x - low) / (high - low). Whatever normalizes them further belongs into `loss_fn`.

    `images` (B, ...) are floating point in `input_range`. The guard fails closed. It raises `InputError` for images
    outside of it; under `jit`, where their values cannot be looked at, it blocks. It blocks, too, where its derivative
    says nothing of the update: behind an operation of which the derivative is 0 everywhere (`round`, a threshold, a
    cast to integers; through `stop_gradient` and custom derivatives it sees the values themselves), where the
    derivative vanishes though the update depends on the images, and where anything is not finite. `Score.reason` and
    `Guard.explain` say which, and the numbers of such a score are the worst that there are.

    The transformation comes first in an `optax.chain`: after one with a memory, such as momentum, a blocked gradient
    would be kept there and leave later.

    Raises `InputError` for limits out of range, and when called on images outside `input_range`, an empty batch or one
    too large.
    """
    sent = _sent(loss_fn, update_fn)
    _check_limits(max_leaked_fraction, max_psnr, prior)
    _check_method(noise, method, per, probes, steps)
    fraction_limit = math.inf if max_leaked_fraction is None else max_leaked_fraction
    psnr_limit = math.inf if max_psnr is None else max_psnr
    low, high = _check_range(input_range)
    ridge = (noise or 0.0) ** 2 / prior**2
    spots: list[str] = []

    @jax.jit
    def compiled(params: Any, images: Any, labels: Any) -> Score:
        def update(parts: Any, x: Any) -> Any:
            return sent(parts[0], low + (high - low) * x, parts[1])

        pixels, parts = (images - low) / (high - low), (params, labels)
        blind = blind_spots(update, parts, pixels)
        spots[:] = dict.fromkeys([*spots, *map(str, blind)])
        j, key = linearize_update(lambda x: seen_through(update)(parts, x), pixels), jax.random.key(seed)
        moves = bool(blind) or depends(update, parts, pixels)
        faults = _faults(bool(blind), moves, pixels, j, update(parts, pixels))
        if method == "exact":
            leak = scoring.exact(j, key, ridge)
        else:
            leak = scoring.sketch(j, key, ridge, probes, steps, j.examples if per == "image" else 1)
        return scoring.score_of(leak, images.size, prior, fraction_limit, psnr_limit, per == "image", faults)

    def score(params: Any, images: Any, labels: Any) -> Score:
        images, labels = _batch(images, labels, method, (low, high))
        with jax.default_matmul_precision("highest"):
            return compiled(params, images, labels)

    return Guard(score, _transformation(score), lambda found: scoring.explain(found, spots))


def _transformation(score: Callable[[Any, Any, Any], Score]) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> GuardState:
        del params
        none, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return GuardState(
            Score(
                leaked_dimensions=none,
                leaked_fraction=none,
                predicted_psnr=none,
                worst_leaked_fraction=none,
                worst_psnr=none,
                allowed=jnp.ones((), bool),
                reason=count,
            ),
            count,
            count,
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, images: Any, labels: Any, **extra_args: Any
    ) -> tuple[Any, GuardState]:
        del extra_args
        if params is None:
            raise InputError("params is missing: call update(updates, state, params, images=images, labels=labels)")
        found = score(params, images, labels)
        updates = jax.tree.map(lambda u: jnp.where(found.allowed, u, jnp.zeros_like(u)), updates)
        allowed = found.allowed.astype(jnp.int32)
        return updates, GuardState(found, state.sent + allowed, state.blocked + (1 - allowed))

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))  # its images and labels are required


def _sent(loss_fn: LossFunction | None, update_fn: UpdateFunction | None) -> UpdateFunction:
    if loss_fn is not None and update_fn is None:
        return jax.grad(loss_fn)
    if update_fn is not None and loss_fn is None:
        return update_fn
    raise InputError("pass either loss_fn or update_fn: loss_fn(params, images, labels), a scalar, or what is sent")


def _check_limits(fraction: float | None, psnr: float | None, prior: float) -> None:
    if fraction is None and psnr is None:
        raise InputError("give max_leaked_fraction, max_psnr or both: without a limit nothing would be blocked")
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(f"max_leaked_fraction must be in (0, 1], got {fraction}")
    if not 0 < prior < math.inf:
        raise InputError(f"prior must be a standard deviation > 0, in pixels of [0, 1], got {prior}")
    floor = -20 * math.log10(prior)
    if psnr is not None and not floor < psnr < math.inf:
        raise InputError(f"max_psnr must be above the {floor:.2f} dB that the prior of {prior} alone gives, got {psnr}")


def _check_method(noise: float | None, method: str, per: str, probes: int, steps: int) -> None:
    if noise is not None and not 0 <= noise < math.inf:
        raise InputError(f"noise must be a standard deviation >= 0, or None for no noise, got {noise}")
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if per not in LIMITED:
        raise unknown_name("per", per, LIMITED)
    for name, value in (("probes", probes), ("steps", steps)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}")


def _check_range(input_range: Any) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in input_range)
    except (TypeError, ValueError):
        raise InputError(f"input_range must be two numbers (low, high), got {input_range!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"input_range must be (low, high) with low below high, got {input_range}")
    return low, high


def _faults(blind: bool, moves: bool, pixels: Any, j: Derivative, update: Any) -> Any:
    """The sum of what keeps a score from being one; `moves`: whether the update depends on the images at all."""
    inside = jnp.all((pixels >= -EDGE) & (pixels <= 1 + EDGE))
    finite = jnp.asarray(True)
    for array in jax.tree.leaves(update):
        finite &= jnp.all(jnp.isfinite(array))
    signs = jax.random.rademacher(jax.random.key(1), j.start.shape, j.start.dtype)
    along = j.forward(signs)
    finite &= jnp.all(jnp.isfinite(along))
    still = jnp.all(along == 0) if moves else jnp.asarray(False)
    flags = (
        (scoring.BLIND, blind),
        (scoring.OUTSIDE, ~inside),
        (scoring.STILL, still & (not blind)),
        (scoring.NOT_FINITE, ~finite),
    )
    return sum((jnp.where(flag, bit, 0).astype(jnp.int32) for bit, flag in flags), jnp.zeros((), jnp.int32))


def _batch(images: Any, labels: Any, method: str, limits: tuple[float, float]) -> tuple[Any, Any]:
    """The batch as arrays, once its shapes, dtypes and, where they can be looked at, values are known to be good."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be floating point in input_range {limits}, got {images.dtype}: divide by 255")
    if images.ndim < 2 or not images.size:
        raise InputError(f"images must be a batch (B, ...) of one or more, got shape {images.shape}")
    if not labels.ndim or labels.shape[0] != images.shape[0]:
        raise InputError(f"labels must be one for each of {images.shape[0]} images, got shape {labels.shape}")
    _check_values(images, limits)
    if method == "exact" and images.size > EXACT_LIMIT:
        raise InputError(
            f"images have {images.size} pixels in all, more than the {EXACT_LIMIT} that method 'exact' takes; "
            "take method 'sketch' or a smaller batch"
        )
    if method == "exact" and not fits_in_memory(8 * images.size**2 * images.dtype.itemsize):
        raise InputError(f"images have {images.size} pixels in all, too many for memory; take method 'sketch'")
    return images, labels


def _check_values(images: Any, limits: tuple[float, float]) -> None:
    try:
        values = np.asarray(images)
    except jax.errors.TracerArrayConversionError:
        return  # under jit or scan: the score blocks
    (low, high), least, most = limits, float(values.min()), float(values.max())
    edge = EDGE * (high - low)
    if not (low - edge <= least and most <= high + edge):
        raise InputError(
            f"images lie in {least:g} to {most:g}, outside input_range {limits}: noise and PSNR are in its unit. Pass "
            "the range that they have"
        )
