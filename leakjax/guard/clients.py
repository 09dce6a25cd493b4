"""What a client takes the gradient of, and what it sends, of any model that `read_model` takes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from leakjax.errors import InputError
from leakjax.models.calls import Path
from leakjax.models.losses import LossSpec, known_loss
from leakjax.models.reader import Model, read_model

LossFunction = Callable[[Any, Any, Any], Any]
UpdateFunction = Callable[[Any, Any, Any], Any]


def loss_of(
    model: Any,
    loss: LossSpec = "softmax_cross_entropy",
    *,
    call: Mapping[str, Any] | None = None,
    rngs: Mapping[str, int] | int | None = None,
    output: Path | None = None,
    layout: str = "NHWC",
    train: bool | None = None,
) -> LossFunction:
    """(params, images, labels) -> the mean of `loss` over the batch, for whatever `leakjax.read_model` takes.

    `call`, `rngs`, `output`, `layout` and `train` say how it is called and which output counts; see
    `leakjax.read_model`.
    `params` are those of the optimizer: `leakjax.read_model(model).params`, arrays by path; buffers stay as they are.
    """
    function = known_loss(loss)
    read = read_model(model, call=call, rngs=rngs, output=output, layout=layout, train=train)
    return _mean_loss(read, function)


def update_of(
    model: Any,
    loss: LossSpec = "softmax_cross_entropy",
    *,
    call: Mapping[str, Any] | None = None,
    rngs: Mapping[str, int] | int | None = None,
    output: Path | None = None,
    layout: str = "NHWC",
    train: bool | None = None,
) -> UpdateFunction:
    """(params, images, labels) -> what a client sends that shares its new running statistics with its gradient:

        {"gradient": {path: dL/dparam}, "buffers": {path: the buffer after one step}}

    for `guard(update_fn=...)`. Arguments as of `loss_of`; floating buffers alone are sent, in the dtype of the images.

    Raises `InputError` for a model without floating buffers: `loss_of` says all that it sends.
    """
    function = known_loss(loss)
    read = read_model(model, call=call, rngs=rngs, output=output, layout=layout, train=train)
    sent = [path for path, a in read.buffers.items() if jnp.issubdtype(a.dtype, jnp.floating)]
    step, mean_loss = read.step, _mean_loss(read, function)
    if step is None or not sent:
        raise InputError(
            "the model has no running statistics to send: give it in training mode (train=True), or guard its loss "
            "(guard(loss_of(model), ...))"
        )

    def update(params: Any, images: Any, labels: Any) -> dict[str, Any]:
        after = step({**_held(read, images), **params}, images)[1]
        gradient = jax.grad(mean_loss)(params, images, labels)
        return {"gradient": gradient, "buffers": {path: after[path] for path in sent}}

    return update


def _mean_loss(read: Model, function: Callable[[Any, Any], Any]) -> LossFunction:

    def mean_loss(params: Any, images: Any, labels: Any) -> Any:
        logits = read.apply({**_held(read, images), **params}, images)
        return jnp.mean(jax.vmap(function)(logits, labels))

    return mean_loss


def _held(read: Model, images: Any) -> dict[str, Any]:
    """The model's buffers, floating ones in the dtype of the images."""
    floating = {path: jnp.issubdtype(a.dtype, jnp.floating) for path, a in read.buffers.items()}
    return {path: a.astype(images.dtype) if floating[path] else a for path, a in read.buffers.items()}
