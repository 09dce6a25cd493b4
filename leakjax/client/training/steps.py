"""The compiled parts of training: steps in a scan, clients side by side, and accuracy."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from leakjax.client.defenses import Client, Setting
from leakjax.client.training.examples import Examples
from leakjax.client.update import example_losses, mean_loss
from leakjax.models.losses import LossSpec
from leakjax.models.reader import Arrays, Model

BYTES_AT_ONCE = 2**30
_TEST_BATCH = 256


Defense = Setting | optax.GradientTransformation | None


class State(NamedTuple):
    """What a step takes to the next: parameters, the optimizer's state, and the defense's of each client (a random key
    for one of the table, which is built anew in every step)."""

    params: Arrays
    optimizer: Any
    defense: Any


def start(
    model: Model,
    optimizer: optax.GradientTransformation,
    defense: Defense,
    clients: int,
    seed: int,
    images: Any,
) -> State:
    """The state before the first step; where the defense's holds a random key, each client has one of its own.

    `images` (B, H, W, C) of one client, in the input range: what cannot be defended is found out before anything runs.
    """
    params = {path: jnp.asarray(a) for path, a in model.params.items()}
    if isinstance(defense, Setting):
        key = jax.random.key(seed)
        defense.transformation(key, Client(model, images))
        return State(params, optimizer.init(params), jax.random.split(key, clients))
    one = None if defense is None else defense.init(params)
    return State(params, optimizer.init(params), jax.tree.map(lambda leaf: _for_each(leaf, clients), one))


def make_steps(
    model: Model,
    loss: LossSpec,
    optimizer: optax.GradientTransformation,
    defense: Defense,
    examples: Examples,
    dtype: Any,
) -> Callable[[State, Any, Any], tuple[State, Any]]:
    """(state, images (S, K, B, H, W, C), labels (S, K, B)) -> the state after S steps of K clients, and S losses."""
    client = _client(model, loss, defense)

    def step(state: State, batch: Any) -> tuple[State, Any]:
        images, labels = examples.scaled(batch[0], dtype), batch[1]
        all_clients = jax.vmap(client, in_axes=(None, 0, 0, 0))
        values, gradients, states = all_clients(state.params, state.defense, images, labels)
        gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
        updates, following = optimizer.update(gradient, state.optimizer, state.params)
        params = cast(Arrays, optax.apply_updates(state.params, updates))
        return State(params, following, states), jnp.mean(values)

    return jax.jit(lambda state, images, labels: jax.lax.scan(step, state, (images, labels)))


def _client(model: Model, loss: LossSpec, defense: Defense) -> Callable[..., Any]:
    """(params, state, images (B, H, W, C), labels (B,)) -> the loss, what a client sends, and its next state."""
    of_batch = mean_loss(model, loss)
    if isinstance(defense, Setting):
        return _of_the_table(model, loss, defense)
    defended = None if defense is None else optax.with_extra_args_support(defense)

    def client(params: Any, state: Any, images: Any, labels: Any) -> Any:
        value, gradient = jax.value_and_grad(of_batch)(params, model.buffers, images, labels)
        if defended is not None:
            gradient, state = defended.update(gradient, state, params, images=images, labels=labels)
        return value, gradient, state

    return client


def _of_the_table(model: Model, loss: LossSpec, setting: Setting) -> Callable[..., Any]:
    """As `_client`; the defense may look at the images and the weights of the step, as in `observe`."""
    of_batch, of_each = mean_loss(model, loss), example_losses(model, loss)

    def client(params: Any, key: Any, images: Any, labels: Any) -> Any:
        key, drawn = jax.random.split(key)
        if setting.defense.per_example:
            value = of_batch(params, model.buffers, images, labels)
            gradient = jax.jacrev(of_each)(params, model.buffers, images, labels)
        else:
            value, gradient = jax.value_and_grad(of_batch)(params, model.buffers, images, labels)
        transformation = setting.transformation(drawn, Client(model.with_arrays(params, model.buffers), images))
        return value, transformation.update(gradient, transformation.init(params), params)[0], key

    return client


def steps_at_once(steps: Int[np.ndarray, "S K B"], examples: Examples) -> Iterator[Int[np.ndarray, "s K B"]]:
    """The steps of an epoch, as indices of examples, in runs whose images take at most `BYTES_AT_ONCE`."""
    step_bytes = steps[0].size * examples.images[0].nbytes
    count = max(1, BYTES_AT_ONCE // step_bytes)
    for first in range(0, len(steps), count):
        yield steps[first : first + count]


def make_accuracy(model: Model, examples: Examples, loss: LossSpec, dtype: Any) -> Callable[[Arrays], float]:
    """params -> the share of `examples` whose label the logits name: the largest, or of one logit the side it is on."""
    boundary = 0.5 if loss == "squared_error" else 0.0
    places = [slice(first, first + _TEST_BATCH) for first in range(0, len(examples.labels), _TEST_BATCH)]

    @jax.jit
    def right(params: Arrays, images: Any, labels: Any) -> Any:
        logits = model.apply({**model.buffers, **params}, examples.scaled(images, dtype))
        found = logits[:, 0] > boundary if logits.shape[1] == 1 else jnp.argmax(logits, axis=1)
        return jnp.sum(found.astype(jnp.int32) == labels)

    def accuracy(params: Arrays) -> float:
        return sum(int(right(params, examples.images[p], examples.labels[p])) for p in places) / len(examples.labels)

    return accuracy


def _for_each(leaf: Any, clients: int) -> Any:
    leaf = jnp.asarray(leaf)
    raw_key = leaf.dtype == jnp.uint32 and leaf.shape == (2,)
    if clients > 1 and (raw_key or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
        return jax.random.split(leaf, clients)
    return jnp.broadcast_to(leaf, (clients, *leaf.shape))
