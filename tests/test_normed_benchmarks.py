"""Nets with train-mode norms in the benchmarks: they are built as named, and their records say what was sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.cases import Case, case_of
from benchmarks.nets import build_net, net_spec
from benchmarks.solving import read_net, solve
from benchmarks.study import KINDS, run, summary
from benchmarks.study_norms import build, plan_of, solvable
from leakjax import InputError, observe


def test_every_convolution_has_its_norm():
    net = build_net("batch_norm:lenet", 0, "tanh")
    plain = build_net("lenet", 0, "tanh")
    assert {f"norm{k}" for k in range(1, plain.depth + 1)} <= set(vars(net))
    np.testing.assert_array_equal(net.net.conv1.kernel[...], plain.conv1.kernel[...])
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 32, 32, 3)), jnp.float32)
    assert net(x).shape == plain(x).shape
    assert not np.allclose(net(x), plain(x))
    assert net_spec("batch_norm:cnn6").loss == net_spec("cnn6").loss


@pytest.mark.parametrize("name", ["resnet8", "fcn3", "lenet_max"])
def test_nets_that_have_no_such_form_are_refused(name):
    with pytest.raises(InputError, match="batch_norm:NAME"):
        build_net(f"batch_norm:{name}", 0, "tanh")


def test_keys_name_what_is_sent():
    """Records on disk are joined by them: this string must never change."""
    case = Case("batch_norm:wide", "copa", "samples", 2, "tanh", batch=2, train="kept")
    assert case.key == "batch_norm:wide tanh seed=0 samples:2 copa batch=2 float64 train=kept"
    assert case_of(case.fields) == case


@pytest.mark.parametrize("train", ["sent", "kept"])
def test_a_case_sends_its_statistics_or_keeps_them(monkeypatch, train):
    found = []
    monkeypatch.setattr("leakjax.invert", lambda observation, **_: found.append(observation) or 1 / 0)
    case = Case("batch_norm:plain:16x4x1", "copa", "samples", train=train)
    assert "ZeroDivisionError" in solve([case], read_net(case))[0]["failed"]
    assert bool(found[0].buffers) == (train == "sent")


def test_plans_hold_every_activation_batch_and_client():
    plans = [plan_of(k) for k in range(64)]
    assert {p.activation for p in plans} == {"tanh", "leaky_relu", "softplus", "relu"}
    assert {(p.examples, p.dtype, p.sent) for p in plans} == {
        (b, d, s) for b in (1, 2) for d in ("float64", "float32") for s in (True, False)
    }
    assert all(any(layer.norm == "batch" for layer in p.layers) for p in plans)
    assert plans[5] == plan_of(5)


@pytest.mark.parametrize("number", [0, 8])
def test_nets_of_plans_normalize_by_the_batch(number):
    plan = plan_of(number)
    net = build(plan)
    x = jax.random.uniform(jax.random.key(number), (3, plan.side, plan.side, plan.channels), jnp.float32)
    first = net(x)
    assert first.shape == (3, 5)
    assert np.all(np.isfinite(first))
    assert not np.allclose(first[:1], net(x[:1]), atol=1e-4)


def test_solvable_is_the_rank_of_what_was_sent():
    plan = plan_of(6)  # wide enough: batches of 2, statistics sent
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(size=(plan.examples, plan.side, plan.side, plan.channels)), np.array([1, 3])
    told = {"batch_size": 2, "train": True, "buffers": plan.sent}
    assert solvable(observe(build(plan), (images, labels), **told), images, labels)
    images[1] = images[0]  # two images that are the same move a sum of gradients in the same way
    assert not solvable(observe(build(plan), (images, np.array([1, 1])), **told), images, np.array([1, 1]))


def test_records_go_on_where_they_were(tmp_path, monkeypatch):
    kind = KINDS["norms"]._replace(
        records_of=lambda number, done: iter([_record(number)] if number not in done else [])
    )
    monkeypatch.setattr("benchmarks.study.jax.clear_caches", lambda: None)
    run(tmp_path, kind, 0, 3, 60.0)
    lines = (tmp_path / "norms.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert "| all | 3 | 3 |" in summary([_record(k) for k in range(3)])


def _record(number):
    named = {"net": number, "client": "c", "attack": "copa", "form": "batch norms", "activation": "tanh"}
    return named | {"status": "exact", "wrong": None, "solvable": True}
