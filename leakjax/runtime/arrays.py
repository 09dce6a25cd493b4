"""From the host to the device without a program: `jnp.asarray` compiles one for every shape and dtype it meets."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array


def to_device(value: Any, dtype: Any = None) -> Array:
    """`value` as a JAX array of its own dtype or of `dtype`; what is no JAX array yet is converted on the host."""
    if isinstance(value, jax.Array):
        return value if dtype is None or value.dtype == np.dtype(dtype) else value.astype(dtype)
    return jax.device_put(np.asarray(value, None if dtype is None else np.dtype(dtype)))
