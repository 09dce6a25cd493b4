"""Runs cases over devices and processes; every record is on disk as soon as it is known, and none is made twice."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.cases import Case, case_of
from benchmarks.records import Record, append, read_records, records_file
from benchmarks.solving import read_net, solve
from leakjax.attacks import ATTACKS
from leakjax.errors import InputError
from leakjax.runtime.cores import cores

ACCELERATED = 64  # victims of a device at once, as `invert` has it by default

Gradient = tuple[Case, ...]


def choose_devices(asked: str | None) -> list[Any] | None:
    """The local devices of `--devices N` or `all`; None, JAX's default device, where nothing is asked."""
    if asked is None:
        return None
    here = jax.local_devices()
    if asked == "all":
        return here
    if not asked.isdecimal() or not 1 <= int(asked) <= len(here):
        raise InputError(
            f"--devices must be 'all' or a number up to {len(here)}, got {asked!r}; on a CPU more are made by "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    return here[: int(asked)]


def shares(cases: Iterable[Case], process: int = 0, processes: int = 1) -> list[list[Gradient]]:
    """The gradients of every group that fall to a process, group after group."""
    groups: dict[Case, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    return [
        [tuple(group[k : k + of.batch]) for k in range(0, len(group), of.batch)][process::processes]
        for of, group in groups.items()
    ]


def portions(gradients: Sequence[Gradient], devices: Sequence[Any] | None) -> list[list[Case]]:
    """Gradients that are solved together: as many as there are lanes, so that finished records are soon safe.

    Attacks that take one gradient after another have one lane.
    """
    attack, count = ATTACKS.get(gradients[0][0].attack), len(devices or [None])
    if attack is None or not attack.layerwise:
        lanes = 1
    else:
        lanes = max(count, cores()) if jax.default_backend() == "cpu" else ACCELERATED * count
    return [
        [case for gradient in gradients[k : k + lanes] for case in gradient] for k in range(0, len(gradients), lanes)
    ]


def run(
    cases: Iterable[Case],
    directory: Path,
    *,
    devices: Sequence[Any] | None = None,
    process: int = 0,
    processes: int = 1,
    retry: bool = False,
    tell: Callable[[str, int, int], None] = lambda words, done, total: None,
) -> None:
    """Make the records that `directory` lacks of the process's share of the cases.

    Arguments: `retry` makes failed ones again; `tell(words, done, total)` is called with the cases done of this share.
    """
    groups = shares(cases, process, processes)
    held = {case_of(r).key for r in read_records(directory) if not (retry and "failed" in r)}
    total, done = sum(len(g) for group in groups for g in group), 0
    before = None
    for group in groups:
        left = [gradient for gradient in group if any(case.key not in held for case in gradient)]
        done += sum(len(g) for g in group) - sum(len(g) for g in left)
        if not left:
            continue
        case = left[0][0]
        if before is not None and before.model != case.model:
            jax.clear_caches()
        before = case
        model = None
        for turn, portion in enumerate(portions(left, devices)):
            tell(f"{case.model} {case.attack} {case.defense or ''}".strip(), done, total)
            model = model or read_net(case)
            records = [{**r, "warm": turn > 0} for r in solve(portion, model, devices) if r["key"] not in held]
            append(records_file(directory, process), records)
            done += len(portion)
    tell("done", done, total)


def gather(directory: Path, process: int) -> None:
    """Bring the records of all processes to the first one's folder, where that is not a shared one."""
    from jax.experimental import multihost_utils

    mine = json.dumps(read_records(records_file(directory, process))).encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(mine)], np.int32))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    if process:
        return
    held = {r["key"] for r in read_records(directory)}
    for other, (size, content) in enumerate(zip(sizes, every, strict=True)):
        theirs: list[Record] = json.loads(content[:size].tobytes())
        missing = [r for r in theirs if r["key"] not in held]
        if missing:
            append(records_file(directory, other), missing)
