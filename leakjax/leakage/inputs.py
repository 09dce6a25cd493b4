"""What an audit is asked: checked, and drawn where it is not given."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.arguments import array, choice, interval, real, several, sizes, whole
from leakjax.constraints.priors import from_natural
from leakjax.errors import InputError
from leakjax.leakage.dense import PRIOR_DEVIATION
from leakjax.models.differentiable import check_differentiable, check_trainable
from leakjax.models.losses import LOSSES
from leakjax.models.reader import Model, output_count
from leakjax.segments.tracing.blindness import depends

LARGEST_NOISE = 1e30


def check_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """Positive sizes of one example."""
    return sizes("input_shape", input_shape)


def check_options(loss: str, input_range: Any, noise: Any) -> tuple[tuple[float, float], tuple[float, ...]]:
    """The input range and the noise levels, once they and the loss are known to be good."""
    choice("loss", loss, LOSSES)
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
    output_count(model, shape)
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
) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, *shape) and labels (B,), given or drawn."""
    outputs = max(output_count(model, shape), 2)
    low, high = input_range
    key, other = jax.random.split(jax.random.key(seed))
    if images is None:
        if labels is not None:
            raise InputError("labels go with images; without images both are drawn with seed")
        noise = jax.random.normal(key, (1, *shape))
        drawn = np.clip(0.5 + PRIOR_DEVIATION * np.asarray(from_natural(noise)), 0.0, 1.0)
        return low + (high - low) * drawn.astype(float), np.asarray(jax.random.randint(other, (1,), 0, outputs))
    wanted = f"one array (B, {', '.join(map(str, shape))}) of numbers"
    x = array("images", images, "buif", wanted).astype(float)
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape or not len(x):
        raise InputError(f"images must have shape (B, {', '.join(map(str, shape))}) with B >= 1, got {x.shape}")
    if not np.all(np.isfinite(x)) or x.min() < low - 1e-9 or x.max() > high + 1e-9:
        raise InputError(f"images must lie in input_range {input_range}, got {x.min():g} to {x.max():g}")
    if labels is None:
        return x, np.asarray(jax.random.randint(other, (len(x),), 0, outputs))
    y = array("labels", labels, "iu", f"{len(x)} integers in 0..{outputs - 1}")
    if y.shape != (len(x),) or y.min() < 0 or y.max() >= outputs:
        raise InputError(f"labels must be {len(x)} integers in 0..{outputs - 1}, got {y.tolist()}")
    return x, y
