"""What is compiled, and how often: arrays reach the device without a program, a single client is not batched."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leakjax.runtime.arrays import to_device
from leakjax.runtime.batching import vmap_several


def compiled(caplog, run):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run()
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]


def test_arrays_reach_the_device_without_a_program(caplog, rng):
    here = rng.normal(size=(3, 17))
    assert compiled(caplog, lambda: jnp.ones((3, 17)) + 1.0)  # the log shows a program where there is one
    for value, dtype in ((here, None), (here, jnp.float32), ([1, 2, 3], None), (2.5, jnp.float64)):
        assert compiled(caplog, lambda value=value, dtype=dtype: to_device(value, dtype)) == []
        found = to_device(value, dtype)
        assert isinstance(found, jax.Array)
        np.testing.assert_array_equal(found, np.asarray(value, dtype), strict=True)
    there = jnp.asarray(here)
    assert to_device(there) is there
    assert to_device(there, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("count", [1, 3])
def test_one_and_several_come_out_as_of_vmap(rng, count):
    def halve(limit, x, scale):
        return jax.lax.while_loop(lambda s: s[0] > limit, lambda s: (s[0] / 2, s[1] + scale["a"]), (jnp.max(x), x))

    given = 0.5, rng.uniform(1, 9, (count, 4)), {"a": rng.normal(size=(count, 4))}
    found = jax.jit(vmap_several(halve, (None, 0, 0)))(*given)
    for a, b in zip(found, jax.vmap(halve, (None, 0, 0))(*given), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
