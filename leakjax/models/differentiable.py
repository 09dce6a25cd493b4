"""Whether JAX can differentiate a model, found from its trace: nothing is computed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from leakjax.errors import UnreadableModelError, first_line

_BY_PARAMETERS = (
    "the model cannot be trained: JAX cannot differentiate it by its parameters ({reason}); write loops with "
    "jax.lax.scan"
)
_BY_INPUT = (
    "the model cannot be differentiated by its input ({reason}); give its parts that call out of JAX a derivative of "
    "their own (jax.custom_jvp), or leave them out"
)


def check_trainable(
    apply: Callable[[Any, Any], Any], params: Mapping[str, Any], buffers: Mapping[str, Any], x: Any
) -> None:
    """Refuse a model apply(variables, x) without a derivative by its `params`; raises `UnreadableModelError`."""

    def gradient(params: Any, buffers: Any, x: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(apply({**p, **buffers}, x)))(params)

    _try(gradient, _BY_PARAMETERS, dict(params), dict(buffers), x)


def check_differentiable(apply: Callable[[Any, Any], Any], variables: Mapping[str, Any], x: Any) -> None:
    """Refuse a model apply(variables, x) without a derivative by x; raises `UnreadableModelError`."""
    _try(lambda variables, x: jax.jvp(lambda x: apply(variables, x), (x,), (x,))[1], _BY_INPUT, dict(variables), x)


def _try(derivative: Callable[..., Any], words: str, *given: Any) -> None:
    try:
        jax.eval_shape(derivative, *given)
    except Exception as error:  # a primitive of the model's own, or one of JAX's without a rule
        raise UnreadableModelError(words.format(reason=first_line(error).rstrip("."))) from error
