"""What a plan says an inversion costs is what its programs hold, and a plan solves nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_direct import three_routes
from typer.testing import CliRunner

import leakjax
from leakjax import InputError, UnreadableModelError, invert, observe
from leakjax.attacks.layerwise import chunks, layer_step
from leakjax.cli import app
from leakjax.segments.tracing.counting import count_operations


def test_counts_are_those_of_the_textbook():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    assert count_operations(jnp.matmul, a, b).fixed == 2 * 3 * 4 * 5 * 6
    x, w = jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 2, 7))

    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count_operations(conv, x, w).fixed == 2 * 6 * 6 * 7 * 9 * 2
    gram, tall = jnp.zeros((200, 200)), jnp.zeros((300, 200))

    def triangular(a, b):
        return jax.lax.linalg.triangular_solve(a, b, left_side=True)

    def singular(a):
        return jax.lax.linalg.svd(a, compute_uv=False)

    leading = {  # masks and copies beside them are of lower order
        jnp.linalg.cholesky: 200**3 / 3,
        lambda a: jnp.linalg.eigh(a)[1]: 9 * 200**3,
        lambda a: triangular(a, a): 200**3,
        lambda a: singular(tall): 14 * 300 * 200**2,
        lambda a: jnp.linalg.qr(tall, mode="r"): 2 * 300 * 200**2,
    }
    for function, operations in leading.items():
        assert count_operations(function, gram).fixed == pytest.approx(operations, rel=0.15)


def test_loops_count_by_their_length_or_by_the_step():
    m = jnp.zeros((5, 5))

    def closed(x):
        return jax.lax.scan(lambda x, _: (m @ x, None), x, None, length=7)[0]

    def opened(x):
        return jax.lax.while_loop(lambda x: x[0] < 1, lambda x: m @ x, m @ x)

    assert count_operations(closed, jnp.zeros(5)).fixed == 7 * 50
    count = count_operations(opened, jnp.zeros(5))
    assert (count.fixed, count.step) == (50, 50)
    assert count.after(10) == 550


def test_operations_are_those_of_the_compiled_program(rng, monkeypatch):
    """XLA counts the same within a factor of two; of a loop it counts one step."""
    kept = []
    compile_steps = layer_step.compile_steps

    def spied(*given, **options):
        kept.extend(compile_steps(*given, **options))
        return kept

    monkeypatch.setattr("leakjax.attacks.layerwise.cost.compile_steps", spied)
    observation = observe(three_routes(rng), (rng.uniform(size=(1, 24, 24, 2)), np.array([1])))
    plan = leakjax.plan(observation, solver="lsmr")
    assert [layer.name for layer in plan.layers] == ["a", "b", "c"]
    for layer, step in zip(plan.layers, kept, strict=True):
        counted = step.program(directly=False).cost_analysis()["flops"]
        assert 0.5 * counted <= (layer.operations + layer.step) / 2 <= 2 * counted  # the program is one of two sides


def test_a_plan_says_what_the_run_then_does(rng):
    """Its solvers, its bounds on steps; and what it compiled is not compiled again."""
    observation = observe(three_routes(rng), (rng.uniform(size=(2, 24, 24, 2)), np.array([1, 2])))
    leakjax.clear_caches()
    plan = leakjax.plan(observation)
    assert (plan.clients, plan.together) == (2, 1)
    answer = invert(observation)
    for layer, info in zip(plan.layers, answer.layers[0][:-1], strict=True):
        assert (layer.name, layer.unknowns, layer.solver) == (info.name, info.unknowns, info.solver)
        assert info.steps <= layer.most_steps
        assert layer.bytes > 8 * layer.unknowns
    assert plan.operations == 2 * sum(layer.operations for layer in plan.layers)
    assert plan.bytes == max(layer.bytes for layer in plan.layers)
    assert answer.seconds["compile"] == 0


def test_the_memory_of_a_chunk_is_that_of_the_program_that_runs(rng, monkeypatch):
    """Several clients have all layers in one program, which holds more than each layer's own."""
    ran = []

    def spied(problem, segments, program, *given):
        ran.append(program)
        return chunks.run_chunks(problem, segments, program, *given)

    monkeypatch.setattr("leakjax.attacks.layerwise.sweep.run_chunks", spied)
    observation = observe(three_routes(rng), (rng.uniform(size=(4, 24, 24, 2)), np.array([1, 2, 0, 3])))
    plan = leakjax.plan(observation, chunk=4)
    invert(observation, chunk=4)
    memory = ran[0].memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert plan.bytes == needed > 4 * max(layer.bytes for layer in plan.layers)


def test_models_that_cannot_be_gone_through_have_no_plan(rng):
    params = {"w": rng.normal(size=(36, 36)), "v": rng.normal(size=(36, 4))}

    def residual(p, x):
        x = x.reshape(len(x), -1)
        return jnp.tanh(x + jnp.tanh(x @ p["w"])) @ p["v"]

    observation = observe((residual, params), (rng.uniform(size=(1, 6, 6, 1)), np.array([1])))
    for command in (leakjax.plan, invert):
        with pytest.raises(UnreadableModelError, match="is no affine map"):
            command(observation, attack="rgap")


def test_a_plan_counts_far_less_where_layers_are_solved_directly(rng):
    observation = observe(three_routes(rng), (rng.uniform(size=(1, 24, 24, 2)), np.array([1])))
    totals = {}
    for solver in ("auto", "lsmr"):
        plan, answer = leakjax.plan(observation, solver=solver), invert(observation, solver=solver)
        steps = [info.steps for info in answer.layers[0][:-1]]
        totals[solver] = sum(p.operations + p.step * s for p, s in zip(plan.layers, steps, strict=True))
    assert totals["auto"] < 0.5 * totals["lsmr"]


def test_nonlinear_layers_wait_and_have_no_count(rng):
    params = {"w": rng.normal(size=(36, 36)), "u": rng.normal(size=(36, 36)), "v": rng.normal(size=(36, 4))}

    def apply(p, x):
        x = x.reshape(len(x), -1)
        x = jnp.tanh(x + jnp.tanh(x @ p["w"]) @ p["u"])  # a residual block
        return x @ p["v"]

    plan = leakjax.plan(observe((apply, params), (rng.uniform(size=(1, 6, 6, 1)), np.array([1]))))
    waiting = [layer for layer in plan.layers if layer.solver == "pull_back"]
    assert [(layer.operations, layer.step, layer.bytes) for layer in waiting] == [(None, None, None)]
    assert plan.operations == sum(layer.operations for layer in plan.layers if layer not in waiting)


@pytest.mark.parametrize("attack", ["match", "rconv"])
def test_attacks_without_layers_of_two_blocks_have_no_plan(rng, attack):
    observation = observe(three_routes(rng), (rng.uniform(size=(1, 24, 24, 2)), np.array([1])))
    with pytest.raises(InputError, match="has no plan; a plan counts the layers of copa"):
        leakjax.plan(observation, attack=attack)
    with pytest.raises(InputError, match="solver 'dense' has no plan"):
        leakjax.plan(observation, solver="dense")


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["invert", "--model", "cnn2_c1", "--plan", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["layers"][0]["solver"] == "direct"
    assert plan["operations"] > 0
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["invert", "--model", "cnn2_c1", "--plan"])
    assert "max steps" in done.output
    refused = CliRunner().invoke(app, ["invert", "--model", "cnn2_c1", "--plan", "--out", "x"])
    assert refused.exit_code == 2
    assert "solves nothing" in refused.output
