"""The study of certificates: sixty cases of it, its judge, and its records."""

import dataclasses

import numpy as np
import pytest
from small_nets import one_layer

from benchmarks import study
from benchmarks.study_judge import judge, solvable
from benchmarks.study_nets import ACTIVATIONS, FORMS, architecture
from leakjax import invert, observe
from leakjax.reconstruction import Candidate


def test_every_activation_meets_every_form():
    kinds = {(net.activation, net.form) for net in map(architecture, range(study.ARCHITECTURES))}
    assert len(kinds) == len(ACTIVATIONS) * len(FORMS) == study.ARCHITECTURES
    assert {study.STEP * k % study.ARCHITECTURES for k in range(study.ARCHITECTURES)} == set(range(study.ARCHITECTURES))


@pytest.mark.parametrize(
    "number", [11, pytest.param(0, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.slow)]
)
def test_no_certificate_of_a_part_is_wrong(number):
    records = list(study.run_architecture(number, set(), victims=7))
    assert len(records) >= 60
    assert {r["client"] for r in records} >= {"plain", "float32", "bfloat16", "scaled", "noisy", "noisy_told"}
    wrong = [r for r in records if r.get("wrong") not in (None, "approximate")]
    assert not wrong, wrong
    estimates = [r for r in records if r["status"] == "approximate"]
    assert sum(r["wrong"] == "approximate" for r in estimates) <= 0.1 * len(estimates)
    if number == 11:
        assert sum(r["status"] in ("exact", "approximate") for r in records) >= 0.7 * len(records)


def test_the_judge_sees_what_is_wrong(rng):
    images, labels = rng.uniform(size=(1, 6, 6, 1)), np.array([2])
    model = one_layer(rng, 5)
    observation = observe(model, (images, labels))
    answer = invert(observation, attack="rgap")
    assert [v.wrong for v in judge(observation, answer, images, labels)] == [None]
    assert solvable(*model, "softmax_cross_entropy", images[0], 2)
    off = dataclasses.replace(answer, images=answer.images + 0.1)
    assert [v.wrong for v in judge(observation, off, images, labels)] == ["exact"]
    other = dataclasses.replace(answer, labels=np.array([3]))
    assert [v.wrong for v in judge(observation, other, images, labels)] == ["label"]
    (certificate,) = answer.certificates
    vague = dataclasses.replace(certificate, status="ambiguous")
    elsewhere = ((Candidate(images[0] + 0.1, 2, 0.0),),)
    unsure = dataclasses.replace(off, certificates=(vague,), candidates=elsewhere)
    assert [v.wrong for v in judge(observation, unsure, images, labels)] == ["ambiguous"]
    near = dataclasses.replace(certificate, status="approximate", psnr_estimate=30.0)
    guess = dataclasses.replace(off, certificates=(near,))
    assert [v.wrong for v in judge(observation, guess, images, labels)] == ["approximate"]


def test_records_are_written_whole_and_taken_up_again(tmp_path, monkeypatch):
    made = []

    def few(number, done, victims=4):
        made.append(number)
        for client in ("plain", "noisy"):
            if (number, client, "copa") not in done:
                base = {"net": number, "client": client, "attack": "copa", "form": "padded", "activation": "tanh"}
                yield from [base | {"status": "exact", "wrong": None, "solvable": True}] * 2

    monkeypatch.setattr(study, "run_architecture", few)
    study.main(["--out", str(tmp_path), "--count", "2"])
    first = (tmp_path / "study.jsonl").read_text()
    assert made == [0, study.STEP]
    assert len(first.splitlines()) == 8
    study.main(["--out", str(tmp_path), "--count", "2"])
    assert (tmp_path / "study.jsonl").read_text() == first
    assert "| all | 8 | 8 | 0 | 0 | 0 | 0 | 0 | 0 of 8 (0 %) |" in study.summary(study.read_records(tmp_path))
