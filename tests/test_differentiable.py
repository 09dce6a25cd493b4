"""Models that JAX cannot differentiate, by their input or by their parameters: one clear error, before any work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leakjax import audit, invert, observe
from leakjax.errors import UnreadableModelError

BATCH = np.full((1, 4, 4, 1), 0.3), np.array([1])
PARAMS = {"a": jnp.eye(16), "w": 0.1 * jnp.ones((16, 3))}


def with_callback(params, x):
    x = jax.pure_callback(lambda a: 2 * np.asarray(a), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return x.reshape(len(x), -1) @ params["a"] @ params["w"]


def with_loop(params, x):
    z = x.reshape(len(x), -1) @ params["a"]
    _, z = jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, z))
    return z @ params["w"]


@pytest.mark.parametrize("attack", ["copa", "match"])
def test_a_callback_is_named_where_the_input_must_be_differentiated(attack):
    observation = observe((with_callback, PARAMS), BATCH)
    with pytest.raises(UnreadableModelError, match=r"by its input .*callback"):
        invert(observation, attack=attack)


def test_a_callback_is_named_by_the_audit():
    with pytest.raises(UnreadableModelError, match=r"by its input .*callback"):
        audit((with_callback, PARAMS), (4, 4, 1))


def test_a_loop_of_unknown_length_cannot_be_trained():
    with pytest.raises(UnreadableModelError, match=r"cannot be trained.*scan"):
        observe((with_loop, PARAMS), BATCH)
    with pytest.raises(UnreadableModelError, match=r"cannot be trained.*scan"):
        audit((with_loop, PARAMS), (4, 4, 1))
