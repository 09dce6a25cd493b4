"""The benchmark suites: names and keys, records that survive, devices and processes, numbers of the tables."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accuracy, zoo
from benchmarks.__main__ import chosen, main
from benchmarks.cases import Case, case_of, on_images, options
from benchmarks.nets import build_net, net_spec, plain
from benchmarks.records import append, read_records, records_file
from benchmarks.runner import choose_devices, run, shares
from benchmarks.statistics import fit_exponent, spread_of
from benchmarks.suites import IMAGES, SUITES
from benchmarks.summary import exponents, rows, table
from leakjax.attacks import ATTACKS
from leakjax.client.defenses import build_defense
from leakjax.datasets import DATASETS
from leakjax.errors import InputError
from leakjax.models import MODELS

ROOT = Path(__file__).parent.parent
TINY = on_images(Case(plain(8, 12, 1), "rgap", "foolbox/cifar10@32", activation="tanh"), range(12))
TIMED = {"seconds", "cpu_seconds", "environment", "warm"}
RUN_TINY = """
import sys, time
from pathlib import Path
import jax
from benchmarks.runner import choose_devices, gather, run
from tests.test_suites import TINY
out, devices, process, processes, pause, coordinator = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]
if coordinator != "-":
    jax.distributed.initialize(coordinator, int(processes), int(process))
run(
    TINY, out, devices=choose_devices(None if devices == "-" else devices), process=int(process),
    processes=int(processes), tell=lambda *_: time.sleep(float(pause)),
)
if coordinator != "-":
    gather(out, int(process))
"""


def start(out, *, devices="-", process=0, processes=1, pause=0.0, coordinator="-", flags="", **options):
    """A process that runs the tiny cases."""
    words = [str(out), devices, process, processes, pause, coordinator]
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", RUN_TINY, *map(str, words)], cwd=ROOT, env=env, **options)


def results(records):
    """What is found, without how long it took, by key."""
    return {r["key"]: {k: v for k, v in r.items() if k not in TIMED} for r in records}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tiny cases run in one go, on one device."""
    out = tmp_path_factory.mktemp("whole")
    run(TINY, out)
    records = read_records(out)
    assert len(records) == len(TINY)
    assert all(r["psnr"] > 200 and r["status"] == "exact" for r in records)
    return records


def assert_same(records, others):
    """To the last digit: a victim's numbers depend neither on its company nor on its device."""
    assert results(records) == results(others)


# --- suites are data ---


@pytest.mark.parametrize("name", SUITES)
def test_names_exist_and_keys_are_unique(name):
    cases = SUITES[name].cases
    assert len({case.key for case in cases}) == len(cases)
    assert {case.attack for case in cases} <= set(ATTACKS)
    assert {case.dataset.split("@")[0] for case in cases} <= set(DATASETS)
    for case in {case.group for case in cases}:
        assert len(net_spec(case.model).input_shape) == 3
    for group in shares(cases):
        assert all(len(gradient) == gradient[0].batch for gradient in group)


def test_table_suites_have_twenty_real_images_of_every_net():
    for name in ("rgap-table", "hybrid-table", "rconv-table", "defenses"):
        for group in {case.group for case in SUITES[name].cases}:
            indices = {case.index for case in SUITES[name].cases if case.group == group}
            assert len(indices) == IMAGES - IMAGES % group.batch
            assert group.dataset.startswith("foolbox/")


def test_every_defense_is_one_that_the_library_reads():
    for spec in {case.defense for case in SUITES["defenses"].cases} - {None}:
        build_defense(spec)


def test_keys_are_stable():
    """Records on disk are joined by them: these strings must never change."""
    case = Case("cnn6", "rgap", "foolbox/cifar10", 3)
    assert case.key == "cnn6 - seed=0 foolbox/cifar10:3 rgap batch=1 float64"
    told = {
        "defense": "gaussian:1e-3",
        "local_steps": 2,
        "learning_rate": 0.01,
        "options": options(steps=9, prior="tv"),
    }
    case = Case("lenet", "match", "samples", 8, "tanh", 1, 4, "float32", **told)
    assert case.key == (
        "lenet tanh seed=1 samples:8 match batch=4 float32 defense=gaussian:1e-3 local_steps=2 learning_rate=0.01 "
        "prior=tv steps=9"
    )


def test_records_lead_back_to_their_cases():
    for suite in SUITES.values():
        for case in suite.cases:
            assert case_of(json.loads(json.dumps({"key": case.key, **case.fields, "psnr": 1.0}))) == case
    old = read_records(ROOT / "benchmarks" / "records" / "zoo.jsonl")
    assert len(old) > 900
    assert case_of(old[0]).key == "fcn3 tanh seed=0 foolbox/mnist:0 copa batch=1 float64"


def test_limit_takes_whole_batches_and_only_takes_words():
    batched = [c for c in chosen("defenses", 5, "batch=4") if c.defense is None]
    assert [c.index for c in batched] == [0, 1, 2, 3]
    assert {c.model for c in chosen("rgap-table", 1, "cnn6")} == {"cnn6"}
    with pytest.raises(InputError, match="--only"):
        chosen("smoke", None, "nothing-has-this")


def test_a_plain_net_has_the_size_of_its_name():
    net = build_net(plain(8, 5, 3), 0, None)
    assert net.depth == 3
    assert net.conv3.kernel.shape == (3, 3, 5, 5)
    assert net.head.kernel.shape == (4 * 4 * 5, 10)


def test_label_maps_are_given_where_a_case_says_so(tmp_path, monkeypatch, capsys):
    """`zoo --labels map`: networks that class every pixel have rows of their own, the others are asked as ever."""
    monkeypatch.setitem(MODELS, "fcn", dataclasses.replace(MODELS["fcn"], input_shape=(4, 4, 3)))
    words = ["--models", "fcn,fcn3", "--activations", "tanh", "--index", "0", "--dataset", "samples@16"]
    zoo.main([*words, "--labels", "map", "--out", str(tmp_path)])
    of_maps, of_classes = sorted(read_records(tmp_path), key=lambda r: r["model"])
    assert of_maps["key"] == "fcn tanh seed=0 samples@16:0 copa batch=1 float64 labels=map"
    assert case_of(of_maps).key == of_maps["key"]
    assert "labels" not in of_classes
    for record in (of_maps, of_classes):
        assert record["status"] == "exact"
        assert record["psnr"] > 200
        assert record["labels_right"]
    assert "| fcn | tanh | float64 | copa, map given | 1 | 48 of 48 | 1 exact |" in capsys.readouterr().out


# --- records survive ---


def test_a_half_written_line_is_no_record_and_harms_no_other(tmp_path):
    path = records_file(tmp_path)
    append(path, [{"a": 1}, {"a": math.inf}])
    with open(path, "a") as file:
        file.write('{"a": 3, "b')
    append(path, [{"a": 4}])
    assert [r["a"] for r in read_records(tmp_path)] == [1, None, 4]


def test_a_run_continues_where_a_line_was_cut_off_and_repeats_nothing(tmp_path, whole):
    path = records_file(tmp_path)
    append(path, whole[:9])
    path.write_bytes(path.read_bytes()[:-40])
    before = path.read_bytes()
    run(TINY, tmp_path)
    assert path.read_bytes().startswith(before)
    records = read_records(tmp_path)
    assert sorted(r["key"] for r in records) == sorted(case.key for case in TINY)
    assert results(records) == results(whole)
    again = path.read_bytes()
    run(TINY, tmp_path)
    assert path.read_bytes() == again


def test_a_killed_run_continues_to_the_same_table(tmp_path, whole):
    path = records_file(tmp_path)
    process = start(tmp_path, pause=0.3)
    try:
        until = time.monotonic() + 120
        while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = path.read_bytes()
    assert 4 <= len(read_records(tmp_path)) < len(TINY)
    run(TINY, tmp_path)
    assert path.read_bytes().startswith(kept)
    records = read_records(tmp_path)
    assert len(records) == len(TINY)
    assert results(records) == results(whole)

    def timeless(records):
        return table([{**r, "cpu_seconds": None} for r in records], TINY)

    assert timeless(records) == timeless(whole)


def test_a_failure_is_a_record_and_is_made_again_when_asked(tmp_path):
    cases = [Case(plain(8, 12, 1), "no such attack", "foolbox/cifar10@32", k) for k in range(2)]
    run(cases, tmp_path)
    run(cases, tmp_path)
    records = read_records(tmp_path)
    assert len(records) == 2
    assert all("no such attack" in r["failed"] for r in records)
    assert "2 refused" in table(records, cases)
    run(cases, tmp_path, retry=True)
    assert len(read_records(tmp_path)) == 4
    assert len(rows(read_records(tmp_path), cases)[0].records) == 2


# --- devices and processes ---


def test_records_are_the_same_on_eight_devices(tmp_path, whole):
    flags = "--xla_force_host_platform_device_count=8"
    assert start(tmp_path, devices="8", flags=flags).wait(timeout=200) == 0
    assert_same(read_records(tmp_path), whole)


def test_records_are_the_same_in_two_processes(tmp_path, whole):
    """Each writes where the other cannot see; the first has all in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    folders = [tmp_path / str(k) for k in range(2)]
    for folder in folders:
        folder.mkdir()
    flags = "--xla_force_host_platform_device_count=2"
    given = {"devices": "all", "processes": 2, "coordinator": coordinator, "flags": flags}
    processes = [start(folder, process=k, **given) for k, folder in enumerate(folders)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert len(read_records(folders[1])) == len(TINY) // 2
    assert len(read_records(folders[0])) == len(TINY)
    assert_same(read_records(folders[0]), whole)


def test_shares_of_processes_are_whole_gradients_and_make_the_whole():
    cases = on_images(Case("wide", "match", "samples", batch=2), range(10))
    parts = [shares(cases, k, 3) for k in range(3)]
    assert [[len(g) for g in part] for part in parts] == [[2], [2], [1]]
    together = [case for part in parts for group in part for gradient in group for case in gradient]
    assert sorted(together, key=lambda c: c.index) == cases


def test_devices_that_are_not_here_are_refused():
    with pytest.raises(InputError, match="xla_force_host_platform_device_count"):
        choose_devices("999")
    assert choose_devices(None) is None
    assert len(choose_devices("1")) == 1


# --- numbers of the tables ---


def record(case, **found):
    usual = {"status": "exact", "ssim": 1.0, "labels_right": True, "cpu_seconds": 1.0, "warm": True}
    return {"key": case.key, **case.fields, **usual, **found}


def test_the_table_holds_the_numbers_of_its_records():
    cases = on_images(Case("cnn6", "rgap", "foolbox/cifar10"), range(4))
    found = [(300.0, "exact", 2.0), (100.0, "exact", 1.0), (50.0, "exact", 4.0), (10.0, "failed", 90.0)]
    records = [record(c, psnr=p, status=s, cpu_seconds=t) for c, (p, s, t) in zip(cases, found, strict=True)]
    records[3]["warm"] = False
    line = table(records, cases).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["cnn6", "leaky_relu:0.2", "-", "rgap", "4"]
    assert cells[5].startswith("75.0 [10.0, ")
    assert cells[6:8] == ["115.0", "10.0"]
    assert cells[9] == "3 exact, 1 failed"
    assert cells[10:13] == ["1", "4 of 4", "2"]
    assert cells[13].startswith("49.0 (breaching, one image); 12 to 37")


def test_spread_and_exponent_are_those_worked_out_by_hand():
    s = spread_of([1.0, 2.0, 4.0, 9.0])
    assert (s.median, s.mean, s.least) == (3.0, 4.0, 1.0)
    assert 1.0 <= s.low < s.median < s.high <= 9.0
    drawn = np.random.default_rng(1).normal(size=400)
    assert spread_of(drawn).high - spread_of(drawn).low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.25)
    sizes = [1.0, 2.0, 4.0]
    law = fit_exponent(sizes, [3.0, 3.0 * 2**1.5, 3.0 * 4**1.5])
    assert law.exponent == pytest.approx(1.5)
    assert law.factor == pytest.approx(3.0)
    assert law.error == pytest.approx(0.0, abs=1e-12)
    bent = fit_exponent(sizes, [1.0, 2.0, 1.0])  # residuals -1/3, 2/3, -1/3 of log 2; S_xx = 2 log(2)^2
    assert bent.exponent == pytest.approx(0.0, abs=1e-12)
    assert bent.error == pytest.approx(math.sqrt(6 / 9 / 2))


def test_exponents_come_from_the_plain_nets_that_differ_in_one_size():
    cases = [Case(plain(side, 12, 2), "rgap", "samples@64") for side in (16, 32, 64)]
    records = [record(c, psnr=100.0, cpu_seconds=t) for c, t in zip(cases, (1.0, 4.0, 16.0), strict=True)]
    (fit,) = exponents(rows(records))
    assert fit.sizes == (16, 32, 64)
    assert fit.law.exponent == pytest.approx(2.0)
    assert "| 2.00 ± 0.00 |" in table(records)


def test_the_command_runs_a_suite_and_prints_its_table_again(tmp_path, capsys):
    main(["smoke", "--limit", "1", "--only", "fcn3,rgap", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| fcn3 | leaky_relu:0.2 | - | rgap | 1 | 3" in printed
    assert (tmp_path / "table.md").read_text() == printed
    assert (tmp_path / "psnr.png").stat().st_size > 5000
    main(["smoke", "--table", str(tmp_path), "--only", "fcn3,rgap"])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="2"):
        main(["smoke", "--devices", "none"])
    assert capsys.readouterr().err.count("\n") == 1


def test_the_table_of_accuracy_holds_the_last_record_of_every_defense():
    """Mean and highest of the images; a bound only where every image has one."""
    found = {"test_accuracy": [0.1, 0.955], "images": 2, "ssim": [0.5, 0.25], "statuses": ["exact", "failed"]}
    noisy = {"psnr_bound": [10.0, 20.0], "psnr_estimate_prior": [12.0, None], "epsilon": 3.25}
    records = [
        {**found, "defense": None, "psnr": [1.0, 2.0]},
        {**found, "defense": "dp_sgd:1.0,1", "psnr": [9.0, 10.0], **noisy},
        {**found, "defense": None, "psnr": [30.0, 31.0]},
    ]
    assert accuracy.table(records).splitlines()[2:] == [
        "| none | 95.5 | 30.5, 31.0 | 0.375, 0.500 | 1 of 2 | - | - | - |",
        "| dp_sgd:1.0,1 | 95.5 | 9.5, 10.0 | 0.375, 0.500 | 1 of 2 | 15.0 | - | 3.25 |",
    ]


def test_accuracy_is_asked_of_defenses_that_the_library_reads():
    assert len(set(accuracy.DEFENSES)) == len(accuracy.DEFENSES)
    assert [spec for spec in accuracy.DEFENSES if spec and not build_defense(spec).name] == []


@pytest.mark.slow
def test_accuracy_without_a_defense_and_with_noise():
    plain, noisy = accuracy.measure(None), accuracy.measure("gaussian:1")
    assert plain["test_accuracy"][-1] > 0.9
    assert min(plain["psnr"]) > 200
    assert max(noisy["psnr"]) < 20
    assert max(noisy["psnr_bound"]) < max(noisy["psnr_estimate_prior"])


@pytest.mark.slow
def test_smoke_is_exact_throughout(tmp_path, capsys):
    main(["smoke", "--out", str(tmp_path)])
    records = read_records(tmp_path)
    assert len(records) == len(SUITES["smoke"].cases)
    assert not [r for r in records if "failed" in r]
    assert all(r["psnr"] > 200 for r in records if r["status"] == "exact")
