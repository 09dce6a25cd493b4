"""No certificate hangs on the exact value of a tolerance: each is moved by a factor of three, either way."""

import dataclasses
import functools

import numpy as np
import pytest

from benchmarks.study import CLIENTS, send
from benchmarks.study_judge import judge
from benchmarks.study_nets import architecture
from leakjax import invert, observe
from leakjax.attacks.tolerances import Tolerances
from leakjax.datasets import load_dataset, to_range
from leakjax.models import build_model

NAMES = [field.name for field in dataclasses.fields(Tolerances)]
CASES = [("plain", "copa"), ("plain", "match"), ("float32", "copa")]
NETS = 11, 62
"""A strided network and a normalized one, of the eight that docs/certificates.md speaks of."""


def moved(monkeypatch, name, factor):
    of = Tolerances.of

    def other(dtype, client):
        usual = of(dtype, client)
        return dataclasses.replace(usual, **{name: factor * getattr(usual, name)})

    monkeypatch.setattr(Tolerances, "of", other)


@functools.cache
def sent(number, client):
    net, client = architecture(number), next(c for c in CLIENTS if c.name == client)
    params, images, labels = net.params(0), net.images(0, 4), net.label_draws(0, 4)
    return send(net, params, client, images, labels, 0), images, labels


def certificates(number, client, attack):
    """(status, leaked dimensions) of every answer, and what is wrong with it."""
    observation, images, labels = sent(number, client)
    answer = invert(observation, attack=attack)
    wrong = [v.wrong for v in judge(observation, answer, images, labels)]
    return [(c.status, c.leaked_dimensions) for c in answer.certificates], wrong


def changes(number, name):
    """(case, factor, before, after) of every certificate that changes where a tolerance does, and all that is wrong."""
    changed, wrong, count = [], [], 0
    for case in CASES:
        before, _ = certificates(number, *case)
        for factor in (1 / 3, 3.0):
            with pytest.MonkeyPatch.context() as patch:
                moved(patch, name, factor)
                after, faults = certificates(number, *case)
            count += len(after)
            changed += [(case, factor, b, a) for b, a in zip(before, after, strict=True) if b != a]
            wrong += [(case, factor, f) for f in faults if f not in (None, "approximate")]
    return changed, wrong, count


@pytest.mark.slow
@pytest.mark.parametrize("number", NETS)
def test_no_certificate_hangs_on_the_value_of_a_tolerance(number):
    changed, wrong, count = [], [], 0
    for name in NAMES:
        more = changes(number, name)
        changed += [(name, *change) for change in more[0]]
        wrong += [(name, *fault) for fault in more[1]]
        count += more[2]
    assert count >= len(NAMES) * 2 * 4 * len(CASES)
    assert not wrong, wrong
    assert not changed, changed


def test_what_a_client_rounds_is_below_what_counts_as_rounding_of_a_sum():
    data = load_dataset("samples", [0], (32, 32, 3))
    client = to_range(data.images, (0.0, 1.0)), data.labels
    for name in ("lenet", "cnn2_c1"):
        model = build_model(name, seed=0, activation="tanh")
        fine, coarse = (observe(model, client, dtype=dtype).gradients for dtype in ("float64", "float32"))
        limits = Tolerances.of(np.float64, float(np.finfo(np.float32).eps))
        for path, exact in fine.items():
            off = np.linalg.norm(coarse[path].astype(float) - exact) / np.linalg.norm(exact)
            assert 0 < off <= limits.summed, path


def test_coarse_clients_are_those_below_float32():
    clients = {"float64": 2.2e-16, "float32": 1.2e-7, "bfloat16": 7.8e-3, "float16": 9.8e-4}
    coarse = {name for name, client in clients.items() if Tolerances.of(np.float64, client).coarse}
    assert coarse == {"bfloat16", "float16"}
