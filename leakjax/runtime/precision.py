"""Floating precision, asked for where a computation starts and never at import."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from leakjax.arguments import shown
from leakjax.errors import InputError

DTYPES = ("float64", "float32")


@contextlib.contextmanager
def compute_in(dtype: str) -> Iterator[Any]:
    """Compute in `dtype` ("float64" or "float32") with the highest matrix-product precision inside the block.

    Yields the dtype. Raises `InputError` for any other name. JAX's own settings are restored afterwards.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield jnp.dtype(dtype)
