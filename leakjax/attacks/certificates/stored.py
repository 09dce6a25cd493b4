"""The precision in which a gradient was stored once, read from the digits of its entries."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

_NARROW = (jnp.bfloat16, jnp.float16, jnp.float32)
LEAST = 64  # entries that must agree: a few numbers are short by chance


def stored_rounding(gradients: Mapping[str, Shaped[np.ndarray, "..."]]) -> float:
    """Relative rounding of the narrowest dtype that holds every entry as it is; 0 where float64 alone does.

    A gradient that was computed or sent in half precision, and converted since, has digits of that precision alone.
    Subnormal float16 numbers have fewer: the rounding is that of normal ones.
    """
    arrays = [np.asarray(g) for g in gradients.values()]
    if sum(int(np.count_nonzero(a)) for a in arrays) < LEAST:
        return 0.0
    for narrow in _NARROW:
        with np.errstate(over="ignore"):
            if all(np.array_equal(a.astype(narrow).astype(a.dtype), a) for a in arrays):
                return float(jnp.finfo(narrow).eps)
    return 0.0
