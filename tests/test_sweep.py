"""The layers of a chunk of clients as one program: what it gives is what layer by layer gives, and it never stalls."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_direct import open_layers, three_routes

import leakjax
from leakjax import invert, observe
from leakjax.attacks.layerwise import chunks, sweep
from leakjax.solvers.lapack import cholesky, cholesky_solve, eigh


def watch(monkeypatch):
    """What `sweep` runs: (segments, the lowered program, clients in all) of each call; and which answers were taken."""
    calls, taken = [], []
    run, same = chunks.run_chunks, sweep._same

    def spied(problem, segments, program, size, state, victims, kinds, is_clean):
        ran = []

        def counted(*given):
            ran.append(len(given[2]))
            return program(*given)

        found = run(problem, segments, counted, size, state, victims, kinds, is_clean)
        calls.append(([s.name for s in segments], program, ran))
        return found

    monkeypatch.setattr(sweep, "run_chunks", spied)
    monkeypatch.setattr("leakjax.attacks.layerwise.layer_step.run_chunks", spied)
    monkeypatch.setattr(sweep, "_same", lambda a, b: taken.append(same(a, b)) or taken[-1])
    return calls, taken


def test_a_chunk_of_64_is_one_dispatch(rng, monkeypatch):
    """No layer is asked again, and the program holds no call back to the host and no shape that it must wait for."""
    calls, taken = watch(monkeypatch)
    images = rng.uniform(size=(64, 24, 24, 2))
    observation = observe(three_routes(rng), (images, rng.integers(4, size=64)))
    answer = invert(observation, chunk=64)
    [(segments, program, ran)] = calls
    assert (segments, ran) == (["c", "b", "a"], [64])
    assert all(np.all(rows) for rows in taken)
    assert all(c.status == "exact" for c in answer.certificates)
    assert np.max(np.abs(answer.images - images)) < 1e-9
    text = program.as_text()
    assert "fusion" in text
    assert not any(word in text for word in ("python_cpu_callback", "ffi_python", "outfeed", "infeed", "<="))


def test_a_chunk_gives_what_single_clients_give(rng):
    images = rng.uniform(size=(5, 24, 24, 2))
    observation = observe(three_routes(rng), (images, np.array([0, 3, 1, 2, 2])))
    together, alone = invert(observation, chunk=3), invert(observation, chunk=1)
    assert np.max(np.abs(together.images - alone.images)) < 1e-11
    for mine, theirs in zip(together.layers, alone.layers, strict=True):
        assert [(i.solver, i.rank, i.status) for i in mine] == [(i.solver, i.rank, i.status) for i in theirs]


@pytest.mark.parametrize(("client", "solved"), [("float64",) * 2, ("float32", "float64"), ("float32",) * 2])
def test_layers_that_lsmr_solves_are_swept_too(rng, monkeypatch, client, solved):
    """In one program, whose every answer is taken: nothing is asked again, whatever the precision."""
    calls, taken = watch(monkeypatch)
    images = rng.uniform(size=(3, 24, 24, 2))
    observation = observe(three_routes(rng), (images, np.array([0, 3, 1])), dtype=client)
    answer = invert(observation, chunk=3, solver="lsmr", dtype=solved)
    assert [segments for segments, _, _ in calls] == [["c", "b", "a"]]
    assert [rows.tolist() for rows in taken] == [[True] * 3] * 3
    assert np.max(np.abs(answer.images - images)) < (1e-9 if client == "float64" else 1e-2)


def test_an_open_layer_is_asked_again_once(rng, monkeypatch):
    """What was swept beyond an open layer is not taken, and nothing is asked more often than for single clients."""
    calls, taken = watch(monkeypatch)
    images = rng.uniform(size=(2, 10, 10, 2))
    observation = observe(open_layers(rng), (images, np.array([0, 3])))

    def ask(chunk):
        calls.clear()
        answer = invert(observation, attack="rgap", chunk=chunk)
        return answer, [segments[0] for segments, _, _ in calls if len(segments) == 1]

    (together, again), (alone, each) = ask(2), ask(1)
    assert "a" in again
    assert not np.all(taken)
    assert all(again.count(name) <= each.count(name) for name in set(again))
    assert [c.status for c in together.certificates] == [c.status for c in alone.certificates]


def test_what_was_not_asked_is_not_taken(rng):
    """A state that differs in one entry, or in its noise, is another question."""
    state = sweep.LayerState(rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), np.ones(3), np.full(3, 1e-9))
    moved = state._replace(x=state.x + np.array([[0, 0, 0, 0], [0, 1e-15, 0, 0], [0, 0, 0, 0]]))
    louder = state._replace(noise=np.array([1.0, 1.0, 2.0]))
    assert sweep._same(state, state).tolist() == [True] * 3
    assert sweep._same(state, moved).tolist() == [True, False, True]
    assert sweep._same(state, louder).tolist() == [True, True, False]


STALL = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from leakjax.solvers.lapack import cholesky, cholesky_solve, eigh

@jax.jit
@jax.vmap
def both(k):
    gram = k.T @ k
    solved = cholesky_solve(cholesky(gram), k.T[:, :5])
    return solved.sum() + eigh(gram)[1].sum()

k = jnp.asarray(np.random.default_rng(0).normal(size=(8, 329, 289)))
for round in range(10):
    jax.block_until_ready(both(k + round))
print("done")
"""


def test_two_batched_factorizations_at_once_do_not_stall():
    """With `jax.numpy`'s own this script never ends on two cores (jaxlib 0.10.2)."""
    done = subprocess.run([sys.executable, "-c", STALL], capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr


def test_factorizations_are_those_of_numpy(rng):
    tall = rng.normal(size=(3, 12, 7))
    grams = np.einsum("bij,bik->bjk", tall, tall)
    lower = jax.vmap(cholesky)(jnp.asarray(grams))
    assert np.allclose(lower @ jnp.swapaxes(lower, 1, 2), grams)
    x = rng.normal(size=(3, 7, 2))
    assert np.allclose(jax.vmap(cholesky_solve)(lower, jnp.asarray(grams @ x)), x)
    assert np.allclose(jax.vmap(eigh)(jnp.asarray(grams))[0], np.linalg.eigvalsh(grams))


DEVICES = """
import jax, numpy as np
from test_direct import three_routes
from leakjax import invert, observe
rng = np.random.default_rng(0)
images = rng.uniform(size=(5, 24, 24, 2))
observation = observe(three_routes(rng), (images, np.array([0, 3, 1, 2, 2])))
answer = invert(observation, devices=jax.devices(), chunk=2)
print(len(jax.devices()), [c.status for c in answer.certificates].count("exact"), answer.layers[4][0].solver)
print(float(np.max(np.abs(answer.images - images))) < 1e-9)
"""


def test_several_clients_on_each_of_several_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)
    command = [sys.executable, "-c", DEVICES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.stdout == "4 5 direct\nTrue\n", done.stderr[-2000:]


def test_sweeps_are_forgotten_with_the_other_programs(rng):
    observation = observe(three_routes(rng), (rng.uniform(size=(2, 24, 24, 2)), np.array([0, 3])))
    first = invert(observation, chunk=2)
    assert invert(observation, chunk=2).seconds["compile"] == 0
    leakjax.clear_caches()
    again = invert(observation, chunk=2)
    assert again.seconds["compile"] > 0
    assert np.array_equal(first.images, again.images)


def test_the_benchmark_of_accelerators_runs_here(monkeypatch):
    from benchmarks import accelerator

    monkeypatch.setattr(accelerator, "MODEL", "cnn3_c3")
    monkeypatch.setattr(accelerator, "RUNS", 1)
    record = accelerator.measure(2, "float64", "auto", whole=True, layers=True)
    assert min(record["db"]) > 200
    assert record["certificates"] == 2
    assert record["operations"] == pytest.approx(sum(row["operations"] for row in record["layers"]), rel=0.05)
    assert "| 2 | float64 | auto |" in accelerator.table([record])
