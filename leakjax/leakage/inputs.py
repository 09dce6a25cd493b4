"""What an audit is asked: checked, and drawn where it is not given."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.arguments import array, ids_of_tokens, interval, real, several, sizes, whole
from leakjax.constraints.priors import from_natural
from leakjax.errors import InputError
from leakjax.leakage.dense import PRIOR_DEVIATION
from leakjax.models.differentiable import check_differentiable, check_trainable
from leakjax.models.losses import LossSpec, check_loss, known_loss, labels_of
from leakjax.models.reader import Model, output_shape
from leakjax.models.targets import read_targets
from leakjax.segments.tracing.blindness import depends

LARGEST_NOISE = 1e30
INPUT = "input"  # in place of labels: an autoencoder's images


def check_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """Positive sizes of one example."""
    return sizes("input_shape", input_shape)


def check_options(loss: LossSpec, input_range: Any, noise: Any) -> tuple[tuple[float, float], tuple[float, ...]]:
    """The input range and the noise levels, once they and the loss are known to be good."""
    known_loss(loss)
    between = interval("input_range", input_range)
    wanted = "a sequence of numbers, () for none"
    sigmas = tuple(real("noise", sigma, wanted) for sigma in several("noise", noise, wanted))
    for sigma in sigmas:
        if not sigma > 0:
            raise InputError(f"noise must hold positive standard deviations, got {sigma}; leave out 0, it is no noise")
        check_size("noise", sigma)
    return between, sigmas


def check_size(named: str, sigma: float) -> None:
    """Refuse noise whose square, or its inverse, is no number that could be computed with."""
    if not 1 / LARGEST_NOISE <= sigma <= LARGEST_NOISE:
        raise InputError(
            f"{named}: a standard deviation of {sigma:g} is absurd; expected {1 / LARGEST_NOISE:g} to {LARGEST_NOISE:g}"
        )


def check_runs(model: Model, shape: tuple[int, ...]) -> None:
    """Refuse a model that cannot run on such images, returns anything but logits, or does not look at them."""
    output_shape(model, shape)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.result_type(*(a.dtype for a in model.params.values())))
    check_trainable(model.apply, model.params, model.buffers, x)
    check_differentiable(model.apply, model.variables, x)
    if not depends(lambda variables, x: model.apply(variables, x), dict(model.variables), x):
        raise InputError("the logits do not depend on the input: the model ignores it, and its gradient says nothing")


def check_seed(seed: Any) -> int:
    """A seed that a generator takes."""
    return whole("seed", seed, 0, 2**32 - 1, f"in 0..{2**32 - 1}")


def batch_of(
    model: Model,
    shape: tuple[int, ...],
    images: Any,
    labels: Any,
    input_range: tuple[float, float],
    seed: int,
    loss: LossSpec,
) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, *shape) and their targets (B, ...), given or drawn; labels are drawn for losses of classes alone, the
    drawn image's own where "input" is given for them."""
    x, y = _given_or_drawn(model, shape, images, labels, input_range, seed)
    y = np.asarray(y, float) if y.dtype.kind == "f" else y
    outputs = jax.ShapeDtypeStruct(output_shape(model, shape), jnp.float64)
    try:
        check_loss(loss, outputs, jax.ShapeDtypeStruct(y.shape[1:], y.dtype))
    except InputError as error:
        if labels is not None:
            raise
        raise InputError(
            f"{error}; give images and labels, what the loss compares each example's outputs with"
        ) from None
    return x, y


def _given_or_drawn(
    model: Model, shape: tuple[int, ...], images: Any, labels: Any, input_range: tuple[float, float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    size = output_shape(model, shape)
    outputs = labels_of(int(np.prod(size)) if len(size) == 1 else size[-1] if size else 1)
    places = size[:-1] if len(size) > 1 else ()
    low, high = input_range
    key, other = jax.random.split(jax.random.key(seed))
    if images is None:
        if labels is not None and not (isinstance(labels, str) and labels == INPUT):
            raise InputError("labels go with images; without images both are drawn with seed")
        noise = jax.random.normal(key, (1, *shape))
        drawn = np.clip(0.5 + PRIOR_DEVIATION * np.asarray(jax.jit(from_natural)(noise)), 0.0, 1.0)
        x = low + (high - low) * drawn.astype(float)
        return x, x if labels is not None else np.asarray(jax.random.randint(other, (1, *places), 0, outputs))
    wanted = f"one array (B, {', '.join(map(str, shape))}) of numbers"
    x = array("images", images, "buif", wanted).astype(float)
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape or not len(x):
        raise InputError(f"images must have shape (B, {', '.join(map(str, shape))}) with B >= 1, got {x.shape}")
    if not np.all(np.isfinite(x)) or x.min() < low - 1e-9 or x.max() > high + 1e-9:
        raise InputError(
            f"images must lie in input_range {input_range}, got {x.min():g} to {x.max():g}{ids_of_tokens(images)}"
        )
    if labels is None:
        return x, np.asarray(jax.random.randint(other, (len(x), *places), 0, outputs))
    return x, x if isinstance(labels, str) and labels == INPUT else read_targets(labels, x, size).values
