"""What a server sees: the model, its weights, and the gradients that clients send. Never an image."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Shaped

from leakjax.arguments import array, choice, ids_of_tokens, instance, interval, several, shown, sizes, whole
from leakjax.client.defenses import CUSTOM, build_defense
from leakjax.client.factors import check_known, factors_of
from leakjax.client.silent import SMALLEST, ZERO, largest_entries
from leakjax.client.update import Protection, buffers_program, check_decay, check_steps, client_program
from leakjax.errors import InputError
from leakjax.models.calls import Path
from leakjax.models.differentiable import check_trainable
from leakjax.models.losses import LossSpec, check_loss, known_loss, read_loss, weighted
from leakjax.models.normalization import Limits, channel_limits, check_normalization, hull, spread
from leakjax.models.reader import Model, output_shape, read_model
from leakjax.models.targets import KINDS, TargetKind, Targets, read_targets
from leakjax.runtime.arrays import to_device
from leakjax.runtime.precision import compute_in

REDUCTIONS = ("mean", "sum")

LARGEST_GRADIENT = 1e100
"""Of an entry: the squares of such, summed, stay far from the largest number."""


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """The gradients of V victims who share one model.

    - `model`: the architecture and its weights;
    - `gradients`: for each parameter path an array (V, *parameter shape): one gradient of the mean loss a victim;
    - `loss`: a name of `losses.LOSSES` with its parameters, a function (outputs, target) -> one number an example, or
      "unknown" where the server does not know it;
    - `input_shape`: (H, W, C) of one example; `input_range`: (lowest, highest) value that a pixel can have;
    - `examples`: how many examples each gradient averages over;
    - `precision`: the floating dtype in which the client computed;
    - `defense`: what a client did to its gradient, a specification of `defenses.DEFENSES` ("gaussian:0.001"),
      "custom" for a transformation that the server does not know, or None;
    - `local_steps`, `learning_rate`: the plain gradient steps that an update sums, and their rate (None for one step);
    - `weight_decay`: lambda, where what was sent is g + lambda theta;
    - `input_mean`, `input_std`: by channel, where the model sees (pixel - mean) / std of pixels in [0, 1];
      `input_range` is then the least and greatest value over all channels;
    - `interchangeable`: groups of layers of one kind and shape, which a capture from PyTorch may hold in another order
      than the model uses them; () elsewhere;
    - `factors`: of gradients whose factor c in c dL/dtheta, or c times what a defense made of it, is known, {checksum:
      c} by `factors.checksum`: `observe` knows that its own have none (c = 1), and says nothing of others that take
      their place;
    - `reduction`: "mean", or "sum" where the loss of a gradient is the sum over its examples;
    - `target`, `target_shape`: what the loss compares an example's outputs with, a kind of `targets.KINDS`, and its
      shape: () for a class;
    - `buffers`: new running statistics that the clients sent as well, with a leading victim axis; `model` has those
      that they began with. {} for none.
    """

    model: Model
    gradients: Mapping[str, Shaped[np.ndarray, "V ..."]]
    loss: LossSpec
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    examples: int = 1
    precision: str = "float64"
    defense: str | None = None
    local_steps: int = 1
    learning_rate: float | None = None
    weight_decay: float = 0.0
    input_mean: tuple[float, ...] | None = None
    input_std: tuple[float, ...] | None = None
    interchangeable: tuple[tuple[str, ...], ...] = ()
    factors: Mapping[int, float] = dataclasses.field(default_factory=dict)
    reduction: str = "mean"
    target: TargetKind = "class"
    target_shape: tuple[int, ...] = ()
    buffers: Mapping[str, Shaped[np.ndarray, "V ..."]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_observation(self)

    @property
    def victims(self) -> int:
        """How many gradients there are."""
        return len(next(iter(self.gradients.values())))

    @property
    def limits(self) -> Limits:
        """(lowest, highest) value of a pixel: two numbers, or (C,) each where channels differ."""
        if self.input_mean is None or self.input_std is None:
            return self.input_range
        return channel_limits(self.input_mean, self.input_std)


def observe(
    model: Any,
    batch: tuple[Shaped[Any, "N H W C"], Shaped[Any, "N ..."]],
    *,
    loss: LossSpec = "softmax_cross_entropy",
    params: Any = None,
    input_range: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 1,
    dtype: str = "float64",
    defense: str | optax.GradientTransformation | None = None,
    seed: int = 0,
    local_steps: int = 1,
    learning_rate: float | None = None,
    weight_decay: float = 0.0,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    reduction: str | Float[Any, " N"] = "mean",
    call: Mapping[str, Any] | None = None,
    rngs: Mapping[str, int] | int | None = None,
    output: Path | None = None,
    layout: str = "NHWC",
    train: bool | None = None,
    buffers: bool | None = None,
) -> Observation:
    """Compute what clients would send: g = d/dtheta (1/B) sum_b loss(model(x_b), y_b), one g every B examples.

    With k `local_steps` it is the update of FedAvg instead: from theta_0 the client takes k plain gradient steps, each
    on all of its B examples, and sends (theta_0 - theta_k) / learning_rate = sum_{j < k} g(theta_j), which for k = 1 is
    the gradient. A `defense` acts on each victim's own gradient or update; `weight_decay` adds lambda theta to that.

    Arguments:
    - `model`, `params`: an nnx module, (linen module, variables) or (apply_fn, params); see `read_model`;
    - `call`, `rngs`, `output`, `layout`: how the model is called and which output counts; see `read_model`;
    - `batch`: images (N, H, W, C) in `input_range` and their targets: integer labels (N,), 0 or 1 for a one-logit
      model; or whatever the loss compares an example's outputs with, (N, ...): soft labels, zeros and ones for several
      labels, numbers, classes at every position, or the images themselves for an autoencoder;
    - `loss`: a name of `losses.LOSSES`, with parameters or without ("softmax_cross_entropy:label_smoothing=0.1",
      "sigmoid_focal_loss:gamma=2,alpha=0.25", "softmax_cross_entropy:class_weights=1/2/0.5"), or any function
      (outputs, target) -> one number, of one example;
    - `batch_size`: B, examples in one gradient; the default 1 makes every image a victim of its own;
    - `dtype`: precision of the client's computation, "float64" or "float32";
    - `defense`: a specification `name[:value[,value..]]` of `defenses.DEFENSES`, as "gaussian:1e-3", or any
      `optax.GradientTransformation`, from its initial state for every victim; `optax.chain` composes several;
    - `seed`: of a defense's random numbers; every victim draws its own (a given transformation has its own key);
    - `local_steps`, `learning_rate`: k and the rate, which several steps need;
    - `weight_decay`: lambda of the penalty lambda / 2 ||theta||^2, with one local step only;
    - `input_mean`, `input_std`: in place of `input_range`, C numbers each (or one for all channels): `images` are
      (pixel - mean) / std of pixels in [0, 1];
    - `train`: whether the client called the model in training mode (batch norm by the batch's own statistics; see
      `read_model`); None takes the model as it is;
    - `buffers`: whether the client sends its new running statistics too, as frameworks of federated learning that
      average whole states do; None where `train` is True and the model leaves any;
    - `reduction`: "mean", "sum" over the examples of a gradient, or N weights w of the client's own, which the server
      is not told: the gradient is then that of (1/B) sum_b w_b loss(model(x_b), y_b).

    Returns the `Observation`; the images are not in it.
    Raises `InputError` for images of a wrong shape or range, labels out of range, a model that cannot run, an unknown
    defense, local steps without a rate, or weight decay with several.
    """
    known_loss(loss)
    seed = whole("seed", seed, 0, 2**63 - 1)
    between = interval("input_range", input_range)
    mean, std = check_normalization(input_mean, input_std)
    if mean is not None and between != (0.0, 1.0):
        raise InputError("input_mean and input_std say what a pixel can be; leave out input_range")
    read = read_model(model, params, call=call, rngs=rngs, output=output, layout=layout, train=train)
    sends = _check_buffers(read, train, buffers, local_steps)
    images, given, mean, std = _check_batch(batch, between, mean, std, batch_size)
    between = between if mean is None else hull(mean, std)
    steps = check_steps(local_steps, learning_rate)
    decay = check_decay(weight_decay, steps[0])
    protect = Protection.read(defense, seed, local_steps)
    weights = _check_reduction(reduction, len(images), batch_size, defense, local_steps)
    summed = isinstance(reduction, str) and reduction == "sum" and batch_size > 1
    with compute_in(dtype) as floating:
        read = read.astype(floating)
        targets = _targets(read, loss, given, images, floating)
        labels = targets.values
        taken = loss if weights is None else weighted(loss)
        groups = (
            a.reshape(-1, batch_size, *a.shape[1:]) for a in (images, labels, *([] if weights is None else [weights]))
        )
        update = client_program(read.apply, taken, tuple(read.params), *steps, protect.per_example)
        sent, left = [], []
        for victim, (x, y, *w) in enumerate(zip(*groups, strict=True)):
            inputs, y = to_device(x, floating), y.astype(floating) if y.dtype.kind == "f" else y
            try:
                g = update(read.variables, inputs, (y, w[0].astype(floating)) if w else y)
            except Exception:  # where the model is the reason, it is named
                check_trainable(read.apply, read.params, read.buffers, inputs)
                raise
            if sends:
                left.append(buffers_program(read.step)(read.variables, inputs))
            g = {p: batch_size * a for p, a in g.items()} if summed else g
            g = protect.apply(g, read, inputs, victim)
            sent.append({p: g[p] + decay * theta for p, theta in read.params.items()} if decay else g)
    stacked = {path: np.stack([np.asarray(g[path]) for g in sent]) for path in read.params}
    return Observation(
        model=read,
        gradients=stacked,
        loss=loss,
        input_shape=tuple(images.shape[1:]),
        input_range=between,
        examples=int(batch_size),
        precision=dtype,
        defense=protect.name,
        local_steps=steps[0],
        learning_rate=steps[1],
        weight_decay=decay,
        input_mean=mean,
        input_std=std,
        factors=factors_of(stacked, None if protect.name == CUSTOM or weights is not None else 1.0),
        reduction="sum" if summed else "mean",
        target=targets.kind,
        target_shape=targets.shape,
        buffers={path: np.stack([np.asarray(new[path]) for new in left]) for path in left[0]} if left else {},
    )


def _check_buffers(model: Model, train: bool | None, buffers: Any, local_steps: Any) -> bool:
    """Whether new buffers are sent."""
    if not (buffers is None or isinstance(buffers, bool | np.bool_)):
        raise InputError(f"buffers must be True, False, or None for what train says, got {shown(buffers)}")
    trained = bool(model.buffers) and model.step is not None
    if buffers and not trained:
        raise InputError("buffers: the model has none, hence no running statistics that a client could send")
    if buffers and local_steps != 1:
        raise InputError("buffers go with one local step: those of several are of weights that nobody sees")
    return bool(trained and local_steps == 1 and (train if buffers is None else buffers))


def _check_reduction(
    reduction: Any, count: int, examples: int, defense: Any, local_steps: int
) -> Float[np.ndarray, " N"] | None:
    """The weights of the examples, None for a mean or a sum."""
    if isinstance(reduction, str):
        choice("reduction", reduction, REDUCTIONS)
        if reduction == "sum" and examples > 1 and (defense is not None or local_steps > 1):
            raise InputError("reduction 'sum' goes with one local step and no defense; divide the loss by batch_size")
        return None
    found = array("reduction", reduction, "iuf", "'mean', 'sum' or a weight for every example").astype(float)
    if found.shape != (count,) or not np.all(np.isfinite(found)):
        raise InputError(f"reduction must be 'mean', 'sum' or {count} finite weights, got shape {found.shape}")
    return found


def _targets(model: Model, loss: LossSpec, given: Any, images: np.ndarray, floating: Any) -> Targets:
    """What the loss compares the outputs with, once it is known to take them."""
    outputs = output_shape(model, images.shape[1:])
    targets = read_targets(given, images, outputs)
    values = targets.values
    kind = floating if values.dtype.kind == "f" else values.dtype
    check_loss(loss, jax.ShapeDtypeStruct(outputs, floating), jax.ShapeDtypeStruct(targets.shape, kind))
    return targets


def check_observation(observation: Observation) -> None:
    """Refuse gradients that do not fit the model: missing, extra, misshapen, of the wrong dtype, or not finite."""
    instance("observation.model", observation.model, Model, "from read_model")
    instance("observation.gradients", observation.gradients, Mapping, "an array for each parameter path")
    params, gradients = observation.model.params, observation.gradients
    read_loss(observation.loss)
    choice("target", observation.target, KINDS)
    choice("reduction", observation.reduction, REDUCTIONS)
    if observation.reduction == "sum" and (observation.local_steps > 1 or observation.defense is not None):
        raise InputError("reduction 'sum' goes with one local step and no defense")
    for size in several("target_shape", observation.target_shape, "sizes like (10,), () for a class"):
        whole("target_shape: every size", size, 1)
    sizes("input_shape", observation.input_shape)
    between = interval("input_range", observation.input_range)
    _check_normalized(observation, between)
    whole("examples", observation.examples, 1)
    _check_precision(observation.precision)
    check_steps(observation.local_steps, observation.learning_rate)
    check_decay(observation.weight_decay, observation.local_steps)
    if observation.defense is not None and observation.defense != CUSTOM:
        build_defense(observation.defense)
    check_known(observation.factors)
    for path in params:
        if path not in gradients:
            raise InputError(f"gradient of {path!r} is missing; the model has {len(params)} parameters")
    for path, g in gradients.items():
        if not (hasattr(g, "dtype") and hasattr(g, "shape") and np.ndim(g) > 0):
            raise InputError(f"gradient of {path!r} must be an array (victims, *parameter shape), got {shown(g)}")
    for path, g in gradients.items():
        if path not in params:
            raise InputError(f"gradient {path!r} belongs to no parameter of the model")
        if len(g) != observation.victims or len(g) == 0:
            raise InputError(f"gradient of {path!r} has shape {g.shape}; {observation.victims} victims come first")
        if g.shape[1:] != tuple(params[path].shape):
            raise InputError(f"gradient of {path!r} has shape {g.shape[1:]}, its parameter {tuple(params[path].shape)}")
        if not np.issubdtype(g.dtype, np.floating):
            raise InputError(f"gradient of {path!r} has dtype {g.dtype}; floating point expected")
        if not np.all(np.isfinite(g)):
            raise InputError(f"gradient of {path!r} holds NaN or infinite entries; nothing can be inverted from it")
    _check_sent_buffers(observation)
    norms = largest_entries(gradients)
    if np.any(norms > LARGEST_GRADIENT):
        raise InputError(
            f"gradient of victim {int(np.argmax(norms))} holds entries of {np.max(norms):.1e}, whose squares "
            "overflow: it is no gradient of a finite loss, or was scaled; divide it"
        )
    if np.all(norms < SMALLEST):
        raise InputError(f"gradient of victim 0: {ZERO}")


def _check_sent_buffers(observation: Observation) -> None:
    """Refuse new buffers that do not fit the model's own, or are not finite."""
    instance(
        "observation.buffers", observation.buffers, Mapping, "arrays (victims, *buffer shape) by path, {} for none"
    )
    for path, new in observation.buffers.items():
        if path not in observation.model.buffers:
            raise InputError(f"buffers: {path!r} is no buffer of the model")
        shape = (observation.victims, *observation.model.buffers[path].shape)
        if tuple(np.shape(new)) != shape:
            raise InputError(f"buffers: {path!r} has shape {np.shape(new)}; {shape} expected, victims first")
        if np.asarray(new).dtype.kind == "f" and not np.all(np.isfinite(new)):
            raise InputError(f"buffers: {path!r} holds NaN or infinite entries")
    if observation.buffers and observation.local_steps > 1:
        raise InputError("buffers go with one local step: those of several are of weights that nobody sees")


def _check_normalized(observation: Observation, between: tuple[float, float]) -> None:
    mean, std = check_normalization(observation.input_mean, observation.input_std)
    if mean is None:
        return
    channels, given = observation.input_shape[-1], (observation.input_mean or (), observation.input_std or ())
    if {len(numbers) for numbers in given} != {channels}:
        raise InputError(f"input_mean and input_std must hold {channels} numbers each, one a channel")
    low, high = hull(mean, std)
    if not np.allclose(between, (low, high), rtol=0, atol=1e-3 * (high - low)):
        raise InputError(
            f"input_range [{between[0]:g}, {between[1]:g}] contradicts input_mean and input_std, with which pixels lie "
            f"in [{low:g}, {high:g}]; leave it out"
        )


def _check_precision(precision: Any) -> None:
    try:
        known = isinstance(precision, str) and jnp.issubdtype(jnp.dtype(precision), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise InputError(f"precision must be a floating dtype's name, such as 'float64', got {shown(precision)}")


def _check_batch(
    batch: Any, between: tuple[float, float], mean: Any, std: Any, batch_size: int
) -> tuple[np.ndarray, Any, Any, Any]:
    try:
        given, labels = batch
    except Exception:
        raise InputError("batch must be a pair (images, labels) of arrays") from None
    images = array("images", given, "buif", "real numbers").astype(float)
    if images.ndim < 2 or len(images) == 0:
        raise InputError(f"images must have shape (N, H, W, C) with N >= 1, got {images.shape}")
    if images[0].size == 0:
        raise InputError(f"images must hold pixels, got shape {images.shape}")
    if not np.all(np.isfinite(images)):
        raise InputError("images hold NaN or infinite values")
    if mean is not None:
        channels = images.shape[-1]
        mean, std = spread(mean, channels), spread(std, channels)
        _check_channels(images, mean, std)
    low, high = between if mean is None else hull(mean, std)
    if images.min() < low - 1e-9 or images.max() > high + 1e-9:
        raise InputError(
            f"images lie in [{images.min():.4g}, {images.max():.4g}], outside input_range [{low:g}, {high:g}]; rescale "
            f"them or pass input_range{ids_of_tokens(given)}"
        )
    whole("batch_size", batch_size, 1)
    if len(images) % batch_size:
        raise InputError(f"batch_size must divide the number of images, {len(images)}, got {batch_size}")
    return images, labels, mean, std


def _check_channels(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    pixels = images * np.asarray(std) + np.asarray(mean)
    for channel in range(len(mean)):
        least, most = pixels[..., channel].min(), pixels[..., channel].max()
        if least < -1e-6 or most > 1 + 1e-6:
            raise InputError(
                f"images must be normalized, (pixel - input_mean) / input_std of pixels in [0, 1]; those of channel "
                f"{channel} would be in [{least:.4g}, {most:.4g}]"
            )
