"""Runs of one compiled program at once may go wrong on CPUs: no wrong number is taken, whatever the runtime does."""

import concurrent.futures
import importlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_property import psnr

from leakjax import invert, observe


def small(rng):
    params = {"w": rng.normal(0, 0.3, (3, 3, 1, 12)), "b": rng.normal(0, 0.1, 12), "v": rng.normal(0, 0.2, (192, 4))}
    params["c"] = rng.normal(0, 0.1, 4)

    def apply(p, x):
        z = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(z + p["b"].reshape(1, 1, 1, -1)).reshape(len(x), -1) @ p["v"] + p["c"][None]

    return apply, params


def test_a_run_that_was_disturbed_by_another_is_done_again(monkeypatch, rng):
    """Every program that runs while another does returns wrong numbers, as XLA's client has been seen to do."""
    module = importlib.import_module("leakjax.attacks.layerwise.layer_step")
    compile_steps, busy, disturbed = module.compile_steps, threading.Semaphore(1), []

    def faulty(*given, **options):
        def wrap(program):
            def run(*arguments):
                alone = busy.acquire(blocking=False)
                try:
                    if alone:
                        threading.Event().wait(0.2)  # the other run begins meanwhile
                    solution, pulled = program(*arguments)
                finally:
                    if alone:
                        busy.release()
                if alone:
                    return solution, pulled
                disturbed.append(1)
                return solution._replace(
                    x=solution.x + 1.0, residual=solution.residual + 1, lost=solution.lost + 1
                ), pulled

            return run

        steps = compile_steps(*given, **options)
        for step in steps:
            step.programs = {kind: wrap(program) for kind, program in step.programs.items()}
        return steps

    recursion = importlib.import_module("leakjax.attacks.layerwise.recursion")
    monkeypatch.setattr(recursion, "compile_steps", faulty)
    monkeypatch.setattr(importlib.import_module("leakjax.attacks.layerwise.chunks"), "cores", lambda: 2)
    images = rng.uniform(size=(2, 6, 6, 1))
    answer = invert(observe(small(rng), (images, np.array([1, 2]))), attack="rgap")
    assert disturbed
    assert [c.status for c in answer.certificates] == ["exact", "exact"]
    assert all(psnr(found, truth) > 200 for found, truth in zip(answer.images, images, strict=True))


@pytest.mark.slow
def test_whether_this_jaxlib_has_the_fault(record_property):
    """Two threads in one compiled loop whose product contracts the leading dimension of both operands."""
    generator, wrong = np.random.default_rng(0), []
    for k, m, n in ((3025, 363, 64), (12100, 75, 64), (4096, 512, 64), (16384, 64, 32), (50176, 147, 8)):
        a, x = jnp.asarray(generator.normal(size=(k, m))), jnp.asarray(generator.normal(size=(m, n)))

        @jax.jit
        def loop(a, x):
            def step(_, x):
                z = jax.lax.dot_general(a, a @ x, (((0,), (0,)), ((), ())))
                return z / jnp.linalg.norm(z)

            return jax.lax.fori_loop(0, 20, step, x)

        alone = np.asarray(loop(a, x))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _, a=a, x=x: np.asarray(loop(a, x)), range(8)))
        wrong += [(k, m, n) for one in found if np.max(np.abs(one - alone)) > 1e-9]
    record_property("sizes with wrong products", str(sorted(set(wrong))))
    print(f"jax {jax.__version__}: wrong products at {sorted(set(wrong)) or 'no size tried'}")
    np.testing.assert_array_equal(alone, np.asarray(loop(a, x)))  # alone it is right, always
