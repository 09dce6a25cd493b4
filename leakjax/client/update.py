"""What a client computes on its images before it sends: a gradient or several local steps, and a defense."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from leakjax.arguments import real, whole
from leakjax.client.defenses import CUSTOM, Client, Setting, build_defense
from leakjax.errors import InputError
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.reader import Model
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import client_update, example_gradients

MOST_STEPS = 1_000
"""No update sums more steps: each is traced."""


def mean_loss(model: Model, loss: LossSpec) -> Any:
    """(params, buffers, x, y) -> (1/B) sum_b loss(model(x_b), y_b)."""
    losses = example_losses(model, loss)
    return lambda params, buffers, x, y: jnp.mean(losses(params, buffers, x, y))


def example_losses(model: Model, loss: LossSpec) -> Any:
    """(params, buffers, x, y) -> loss(model(x_b), y_b), (B,)."""

    def losses(params: Any, buffers: Any, x: Any, y: Any) -> Any:
        return jax.vmap(read_loss(loss))(model.apply({**params, **buffers}, x), y)

    return losses


@keep(32)
def client_program(
    apply: Any, loss: LossSpec, paths: tuple[str, ...], local_steps: int, rate: float | None, per_example: bool
) -> Any:
    """Compiled: (variables, x, y) -> `client_update`, or, `per_example`, (B, ...) gradients of each example's loss;
    one program for all models of one architecture, whose `apply` this is."""
    if per_example:
        return jax.jit(example_gradients(apply, loss, paths))
    return jax.jit(client_update(apply, loss, paths, local_steps, rate))


@keep(32)
def buffers_program(step: Any) -> Any:
    """Compiled: (variables, x) -> the floating buffers that a call of the model leaves, by path."""

    def left(variables: Any, x: Any) -> Any:
        after = step(variables, x)[1]
        return {path: a for path, a in after.items() if jnp.issubdtype(a.dtype, jnp.floating)}

    return jax.jit(left)


def check_steps(local_steps: Any, learning_rate: Any) -> tuple[int, float | None]:
    """(k, rate) as they are recorded; several steps without a positive rate raise `InputError`."""
    local_steps = whole("local_steps", local_steps, 1, MOST_STEPS)
    if local_steps > 1 and learning_rate is None:
        raise InputError(f"learning_rate is needed with {local_steps} local_steps: the update depends on it")
    if learning_rate is None:
        return 1, None
    rate = real("learning_rate", learning_rate, "positive and finite")
    if rate <= 0:
        raise InputError(f"learning_rate must be positive and finite, got {learning_rate!r}")
    return local_steps, None if local_steps == 1 else rate


def check_decay(weight_decay: Any, local_steps: int) -> float:
    """lambda as it is recorded, 0 for none; one that cannot be subtracted from what was sent raises `InputError`."""
    decay = real("weight_decay", weight_decay, "a number from 0")
    if decay < 0:
        raise InputError(f"weight_decay must be a number from 0, got {weight_decay!r}")
    if decay and local_steps > 1:
        raise InputError(
            f"weight_decay goes with one local step, got {local_steps}: it decays the weights of every step between"
        )
    return decay


@dataclasses.dataclass(frozen=True)
class Protection:
    """A defense as `observe` applies it: one of the table by its `setting`, or a transformation given as such."""

    setting: Setting | None
    given: optax.GradientTransformation | None
    seed: int

    @classmethod
    def read(cls, defense: Any, seed: int, local_steps: int) -> "Protection":
        """Check a specification, a transformation or None."""
        if defense is None or isinstance(defense, optax.GradientTransformation):
            return cls(None, defense, seed)
        if not isinstance(defense, str):
            raise InputError(
                f"defense must be a specification such as 'gaussian:1e-3' or an Optax transformation, "
                f"got a {type(defense).__name__}"
            )
        setting = build_defense(defense)
        if setting.defense.per_example and local_steps > 1:
            raise InputError(f"defense {setting.name!r} acts on every example's gradient; it takes one local step")
        return cls(setting, None, seed)

    @property
    def name(self) -> str | None:
        """What the server is told: the specification, "custom", or None."""
        return self.setting.spec if self.setting else None if self.given is None else CUSTOM

    @property
    def per_example(self) -> bool:
        """Whether the gradients of single examples are needed."""
        return self.setting is not None and self.setting.defense.per_example

    def apply(self, g: Any, model: Model, x: Any, victim: int) -> Any:
        """What is sent of the gradient `g` of images `x`."""
        transformation = self.given
        if self.setting is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), victim)
            transformation = self.setting.transformation(key, Client(model, x))
        if transformation is None:
            return g
        params = dict(model.params)
        return transformation.update(g, transformation.init(params), params)[0]
