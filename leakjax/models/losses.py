"""Losses of one example: by Optax's names, with parameters, or any function of (outputs, target)."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from leakjax.errors import InputError, first_line, unknown_name

Target = int | Int[Any, "..."] | Float[Any, "..."]
"""Of one example: a class, a class at every position, or numbers that the outputs are compared with."""

Loss = Callable[[Float[Array, "..."], Any], Float[Array, ""]]
"""(the model's outputs for one example, in their own shape; its target) -> one number."""

LossSpec = str | Loss
"""A name of `LOSSES`, with parameters or without ("softmax_cross_entropy:label_smoothing=0.1"), or a function."""

UNKNOWN = "unknown"
"""The loss of a client whose server does not know it: dL/dz at the last layer is then the target itself."""


def _compared(outputs: Float[Array, "..."], target: Target) -> tuple[Float[Array, "... K"], Float[Array, "... K"]]:
    """The outputs and what they are compared with, in one shape, classes along the last axis.

    A class is compared as its one-hot vector, with one output as 0 or 1; so are classes at every position.
    """
    target = jnp.asarray(target)
    if target.shape == outputs.shape and outputs.ndim:
        return outputs, target.astype(outputs.dtype)
    if not target.ndim:
        outputs = outputs.reshape(-1)
    if target.shape == outputs.shape[:-1]:
        classes = outputs.shape[-1]
        if classes == 1 or not jnp.issubdtype(target.dtype, jnp.integer):
            return outputs, jnp.broadcast_to(target[..., None].astype(outputs.dtype), outputs.shape)
        return outputs, jax.nn.one_hot(target, classes, dtype=outputs.dtype)
    if target.size == outputs.size:
        return outputs.reshape(-1), target.reshape(-1).astype(outputs.dtype)
    raise InputError(
        f"a target of shape {target.shape} cannot be compared with outputs of shape {outputs.shape}: give a class, "
        "classes in the shape of all axes but the last, or numbers in the outputs' own shape"
    )


def _smoothed(target: Float[Array, "... K"], smoothing: float) -> Float[Array, "... K"]:
    return (1.0 - smoothing) * target + smoothing / target.shape[-1] if smoothing else target


def _by_class(weights: Sequence[float] | None, outputs: Float[Array, "... K"], name: str) -> Float[Array, " K"] | float:
    if weights is None:
        return 1.0
    found = jnp.asarray(weights, outputs.dtype).reshape(-1)
    if found.size not in (1, outputs.shape[-1]):
        raise InputError(f"{name} must hold {outputs.shape[-1]} numbers, one an output, got {found.size}")
    return found


def softmax_cross_entropy(
    outputs: Float[Array, "..."],
    target: Target,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Float[Array, ""]:
    """-sum_k w_k y_k log softmax(z)_k, y = (1 - a) one_hot(target) + a / K, a the `label_smoothing`, w the
    `class_weights`; the mean over positions, where the outputs have them."""
    z, y = _compared(outputs, target)
    terms = _by_class(class_weights, z, "class_weights") * _smoothed(y, label_smoothing) * jax.nn.log_softmax(z)
    return -jnp.mean(jnp.sum(terms, axis=-1))


def sigmoid_binary_cross_entropy(
    outputs: Float[Array, "..."],
    target: Target,
    *,
    label_smoothing: float = 0.0,
    pos_weight: Sequence[float] | None = None,
) -> Float[Array, ""]:
    """sum_k -w_k y_k log s(z_k) - (1 - y_k) log(1 - s(z_k)), s the logistic function, w the `pos_weight`, y the target
    moved by `label_smoothing` toward 1/2; the mean over positions, where the outputs have them."""
    z, y = _compared(outputs, target)
    y = (1.0 - label_smoothing) * y + 0.5 * label_smoothing if label_smoothing else y
    terms = _by_class(pos_weight, z, "pos_weight") * y * jax.nn.log_sigmoid(z) + (1.0 - y) * jax.nn.log_sigmoid(-z)
    return -jnp.mean(jnp.sum(terms, axis=-1))


def sigmoid_focal_loss(
    outputs: Float[Array, "..."], target: Target, *, alpha: float | None = None, gamma: float = 2.0
) -> Float[Array, ""]:
    """sum_k of Optax's `sigmoid_focal_loss`; the mean over positions, where the outputs have them.

    Reference: Lin et al., "Focal loss for dense object detection", ICCV 2017, arXiv 1708.02002.
    """
    return jnp.mean(jnp.sum(optax.sigmoid_focal_loss(*_compared(outputs, target), alpha=alpha, gamma=gamma), axis=-1))


def poly_loss_cross_entropy(outputs: Float[Array, "..."], target: Target, *, epsilon: float = 2.0) -> Float[Array, ""]:
    """Optax's `poly_loss_cross_entropy`; the mean over positions, where the outputs have them."""
    return jnp.mean(optax.losses.poly_loss_cross_entropy(*_compared(outputs, target), epsilon=epsilon))


def hinge_loss(outputs: Float[Array, "..."], target: Target) -> Float[Array, ""]:
    """sum_k max(0, 1 - s_k z_k), s = 2 y - 1; the mean over positions, where the outputs have them."""
    z, y = _compared(outputs, target)
    return jnp.mean(jnp.sum(optax.hinge_loss(z, 2.0 * y - 1.0), axis=-1))


def multiclass_hinge_loss(outputs: Float[Array, "..."], target: Target) -> Float[Array, ""]:
    """max_k (z_k + [k is not the class]) - z_class (Crammer & Singer), Optax's `multiclass_hinge_loss`."""
    z, y = _compared(outputs, target)
    return jnp.mean(jnp.max(z + 1.0 - y, axis=-1) - jnp.sum(z * y, axis=-1))


def squared_error(outputs: Float[Array, "..."], target: Target) -> Float[Array, ""]:
    """mean_k (z_k - y_k)^2."""
    return jnp.mean(optax.squared_error(*_compared(outputs, target)))


def l2_loss(outputs: Float[Array, "..."], target: Target) -> Float[Array, ""]:
    """mean_k (z_k - y_k)^2 / 2."""
    return jnp.mean(optax.l2_loss(*_compared(outputs, target)))


def huber_loss(outputs: Float[Array, "..."], target: Target, *, delta: float = 1.0) -> Float[Array, ""]:
    """mean_k of Optax's `huber_loss`: quadratic up to |z - y| = delta, linear beyond."""
    return jnp.mean(optax.huber_loss(*_compared(outputs, target), delta=delta))


def log_cosh(outputs: Float[Array, "..."], target: Target) -> Float[Array, ""]:
    """mean_k log cosh(z_k - y_k)."""
    return jnp.mean(optax.log_cosh(*_compared(outputs, target)))


LOSSES: Mapping[str, Loss] = {
    function.__name__: function
    for function in (
        softmax_cross_entropy,
        sigmoid_binary_cross_entropy,
        squared_error,
        l2_loss,
        huber_loss,
        log_cosh,
        sigmoid_focal_loss,
        poly_loss_cross_entropy,
        hinge_loss,
        multiclass_hinge_loss,
    )
}
"""Losses by name; a gradient is that of the mean over the examples of a batch."""


def _linear(outputs: Float[Array, "..."], target: Target) -> Float[Array, ""]:
    """<z, t>, of which dL/dz is t: what a loss that nobody knows comes to."""
    return jnp.sum(outputs.reshape(-1) * jnp.asarray(target).reshape(-1))


def read_loss(loss: LossSpec) -> Loss:
    """The function that a name with its parameters, or a function, stands for; the same one for the same name.

    Raises `InputError` for what is no loss: an unknown name, a parameter that it does not take, or a wrong value.
    """
    if isinstance(loss, str):
        return _named(loss)
    if not _takes_two(loss):
        raise InputError(
            f"loss must be a name ({', '.join(LOSSES)}), a function (outputs, target) -> one number an example, or "
            f"{UNKNOWN!r}; got {loss_name(loss) if callable(loss) else 'a ' + type(loss).__name__}"
        )
    try:
        hash(loss)
    except TypeError:
        raise InputError(
            f"loss {loss_name(loss)} cannot be hashed, and programs are kept by it: pass a function, or give its class "
            "a __hash__"
        ) from None
    return loss


def _takes_two(loss: Any) -> bool:
    """Whether a caller's object can be called with outputs and a target."""
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError:
        return False
    except Exception:  # callables of other languages have no signature to read
        return callable(loss)
    return True


@functools.lru_cache(256)
def _named(spec: str) -> Loss:
    name, colon, rest = spec.partition(":")
    if name == UNKNOWN and not colon:
        return _linear
    if name == UNKNOWN:
        raise InputError(f"loss {UNKNOWN!r} takes no parameters, got {spec!r}")
    if name not in LOSSES:
        raise unknown_name("loss", name, (*LOSSES, UNKNOWN))
    if not colon:
        return LOSSES[name]
    known = {p.name: p.default for p in inspect.signature(LOSSES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    given: dict[str, Any] = {}
    for part in rest.split(","):
        key, equals, text = part.partition("=")
        if key in given:
            raise InputError(f"loss {spec!r}: {key} is given twice")
        if key not in known or not equals:
            takes = ", ".join(f"{k}=VALUE" for k in known) or "no parameters"
            raise InputError(f"loss {spec!r}: {name} takes {takes}, got {part!r}")
        numbers = [_number(spec, key, word) for word in text.split("/")]
        if len(numbers) > 1 and key not in _SEVERAL:
            raise InputError(f"loss {spec!r}: {key} is one number, got {text!r}")
        given[key] = tuple(numbers) if key in _SEVERAL else numbers[0]
    return functools.partial(LOSSES[name], **given)


_SEVERAL = ("class_weights", "pos_weight")
"""Parameters that hold a number for every output, written 1/2/0.5."""

_BELOW_ONE = ("label_smoothing", "alpha")


def _number(spec: str, key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    most = 1.0 if key in _BELOW_ONE else 1e30
    if not (0.0 <= number <= most) or (key == "label_smoothing" and number == 1.0):
        below = " below 1" if key == "label_smoothing" else " to 1"
        wanted = f"a number from 0{below}" if key in _BELOW_ONE else "a finite number from 0"
        raise InputError(f"loss {spec!r}: {key} must be {wanted}, got {text!r}")
    return number


def known_loss(loss: LossSpec) -> Loss:
    """`read_loss` for whoever computes a gradient, which needs more than `UNKNOWN`."""
    if isinstance(loss, str) and loss == UNKNOWN:
        raise InputError(
            f"loss {UNKNOWN!r} is what a server says that does not know it; the gradient of a client needs the loss "
            "that the client takes"
        )
    return read_loss(loss)


@functools.lru_cache(64)
def weighted(loss: LossSpec) -> Loss:
    """w loss(outputs, y) of a target (y, w)."""
    function = read_loss(loss)
    return lambda outputs, target: target[1] * function(outputs, target[0])


@functools.lru_cache(64)
def on_outputs(loss: LossSpec, shape: tuple[int, ...]) -> LossSpec:
    """The loss of outputs that may come flat, for a model whose outputs for one example have the `shape`."""
    if len(shape) == 1 or loss == UNKNOWN:
        return loss
    function = read_loss(loss)
    return lambda outputs, target: function(outputs.reshape(shape), target)


def loss_name(loss: LossSpec) -> str:
    """A name as it was given, or where a function is from."""
    if isinstance(loss, str):
        return loss
    return f"{getattr(loss, '__module__', '?')}.{getattr(loss, '__qualname__', type(loss).__name__)}"


def check_loss(loss: LossSpec, outputs: jax.ShapeDtypeStruct, target: jax.ShapeDtypeStruct) -> None:
    """Refuse a loss that gives no number for one example's outputs and target; nothing is computed."""
    function = read_loss(loss)
    name = loss.partition(":")[0] if isinstance(loss, str) else ""
    if not outputs.shape and name in _OF_CLASSES:
        raise InputError(f"the model returns one number an example, {name} needs logits of shape (examples, outputs)")
    try:
        found = jax.eval_shape(function, outputs, target)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the caller's own code
        raise InputError(
            f"loss {loss_name(loss)} cannot take outputs of shape {outputs.shape} and a target of shape {target.shape} "
            f"({target.dtype}), those of one example: {first_line(error)}"
        ) from error
    shape = getattr(found, "shape", None)
    if shape == () and not jnp.issubdtype(found.dtype, jnp.floating):
        raise InputError(f"loss {loss_name(loss)} must return a real number of floating point, got {found.dtype}")
    if name in _ONE_CLASS and (target.shape != outputs.shape[:-1] or not jnp.issubdtype(target.dtype, jnp.integer)):
        raise InputError(f"{name} compares with a class, got a target of shape {target.shape} ({target.dtype})")
    if shape != () or not jnp.issubdtype(getattr(found, "dtype", bool), jnp.floating):
        raise InputError(
            f"loss {loss_name(loss)} must return one real number an example, got "
            f"{'shape ' + str(shape) if shape is not None else type(found).__name__}; take its mean or sum"
        )


_ONE_CLASS = ("multiclass_hinge_loss",)
_OF_CLASSES = ("softmax_cross_entropy", "poly_loss_cross_entropy", "multiclass_hinge_loss")


def labels_of(outputs: int) -> int:
    """How many labels a model with so many outputs tells apart: two for one logit, else one an output."""
    return 2 if outputs == 1 else outputs
