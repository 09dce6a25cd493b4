"""`python -m benchmarks throughput [--out DIR] [--quick]`: every measurement in a process of its own, records, a table.

Records are appended to `records.jsonl` as soon as they are made; `table.md` is generated from them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import asking
from benchmarks.records import append
from leakjax.errors import InputError
from leakjax.files.whole import write_text


def measure(name: str, argument: str) -> dict[str, Any]:
    """The record of one measurement; a failure is a record too."""
    command = [sys.executable, "-m", "benchmarks.measure", name, argument]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"measurement": name, "argument": argument, "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def start_time(cache: str, out: str) -> dict[str, Any]:
    """Seconds of a whole `leakjax invert --model cnn6`, cold and again with the persistent cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    command = [sys.executable, "-m", "leakjax.cli", "invert", "--model", "cnn6", "--out", out, "--json"]
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        subprocess.run(command, env=environment, capture_output=True, check=True)
        seconds.append(time.perf_counter() - begun)
    return {"measurement": "command", "cold_seconds": seconds[0], "cached_seconds": seconds[1]}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown tables of the records."""
    lines = _throughput(records)
    engines = [r for r in records if r["measurement"] == "engine" and "failed" not in r]
    if engines:
        lines.append(
            "| victims | chunk | dtype | CPU s an image | wall s an image | compile s | MiB | worst layer error |"
        )
        lines.append("|---|---|---|---|---|---|---|---|")
    for r in engines:
        lines.append(
            f"| {r['victims']} | {r['chunk']} | {r['dtype']} | {r['cpu_seconds_per_image']:.3f} "
            f"| {r['wall_seconds_per_image']:.3f} "
            f"| {r['compile_seconds']:.1f} | {r['mib_above_compilation']:.0f} | {max(r['relative_errors']):.1e} |"
        )
    dense = next((r for r in records if r["measurement"] == "lstsq" and "failed" not in r), None)
    single = next((r for r in engines if r["victims"] == 1 and r["dtype"] == "float64"), None)
    if dense and single:
        ratio = dense["cpu_seconds"] / single["cpu_seconds_per_image"]
        memory = dense["mib_above_compilation"] / max(single["mib_above_compilation"], 1.0)
        lines += [
            "",
            "| one victim | CPU s | MiB above import and compilation | worst layer error |",
            "|---|---|---|---|",
            f"| dense, numpy.linalg.lstsq | {dense['cpu_seconds']:.1f} | {dense['mib_above_compilation']:.0f} "
            f"| {max(dense['relative_errors']):.1e} |",
            f"| engine | {single['cpu_seconds_per_image']:.3f} | {single['mib_above_compilation']:.0f} "
            f"| {max(single['relative_errors']):.1e} |",
            f"| ratio | {ratio:.0f} | {memory:.0f} | |",
        ]
    attacks = [r for r in records if r["measurement"] == "attack" and "failed" not in r]
    if attacks:
        lines += ["", "| model, attack | CPU s an image | ratio | largest error |", "|---|---|---|---|"]
    for r in attacks:
        ratio = r["cpu_seconds_per_image"] / attacks[0]["cpu_seconds_per_image"]
        lines.append(
            f"| {r['argument'].replace(':', ', ')} | {r['cpu_seconds_per_image']:.2f} | {ratio:.1f} "
            f"| {r['largest_error']:.1e} |"
        )
    for r in records:
        if r["measurement"] == "command":
            lines += ["", f"`leakjax invert --model cnn6`: {r['cold_seconds']:.1f} s cold, {r['cached_seconds']:.1f} s"]
            lines[-1] += " with the persistent cache."
    return "\n".join(lines) + "\n"


RGAP_CPU_SECONDS = 340.0
"""What R-GAP's code takes for one image of cnn6, as measured on one CPU thread."""


def _throughput(records: list[dict[str, Any]]) -> list[str]:
    """`rgap` on cnn6 by batch, against batch 1 and R-GAP's own code."""
    runs = [r for r in records if r["measurement"] == "throughput" and "failed" not in r]
    if not runs:
        return []
    lines = [
        "| rgap on cnn6: victims at once | images a second | ratio | CPU s an image | R-GAP's 340 CPU s over it "
        "| MiB a victim | compiling, share of the first call | exact | largest error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        ratio = r["images_per_second"] / runs[0]["images_per_second"]
        lines.append(
            f"| {r['victims']} | {r['images_per_second']:.2f} | {ratio:.1f} | {r['cpu_seconds_per_image']:.3f} "
            f"| {RGAP_CPU_SECONDS / r['cpu_seconds_per_image']:.0f} | {r['mib_a_victim']:.1f} "
            f"| {100 * r['compile_share']:.0f} % | {r['exact']} | {r['largest_error']:.1e} |"
        )
    return [*lines, ""]


def main(words: Sequence[str]) -> None:
    """Run every measurement."""
    parser = asking.Parser(prog="python -m benchmarks throughput", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/throughput"))
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="print the table of a records.jsonl, run nothing")
    parser.add_argument("--quick", action="store_true", help="without the dense baseline and the large batches")
    parser.add_argument(
        "--only", default="", metavar="KIND[,KIND..]", help="throughput, engine, attack, lstsq, command"
    )
    options = parser.parse_args(words)
    if options.table is not None:
        print(asking.printed(options.table, table), end="")
        return
    kinds = {"throughput", "engine", "attack", "lstsq", "command"}
    if options.only and not set(options.only.split(",")) <= kinds:
        raise InputError(f"--only: expected some of {', '.join(sorted(kinds))}, got {options.only!r}")
    asking.folder(options.out)
    sizes = ["1", "8"] if options.quick else ["1", "8", "32", "128", "32:float64:32", "1:float32", "32:float32"]
    batches = ["1", "16"] if options.quick else ["1", "16", "64", "256"]
    plan = [("throughput", size) for size in batches] + [("engine", size) for size in sizes]
    plan += [("attack", case) for case in ("cnn6:rgap", "cnn6d:copa")] + ([] if options.quick else [("lstsq", "")])
    plan = [step for step in plan if not options.only or step[0] in options.only.split(",")]
    records = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        append(options.out / "records.jsonl", [record])
        print(f"done: {record['measurement']} {record.get('argument', '')}", file=sys.stderr)

    for name, argument in plan:
        keep(measure(name, argument))
    if not options.only or "command" in options.only.split(","):
        with tempfile.TemporaryDirectory() as cache:
            keep(start_time(cache, str(options.out / "command")))
    write_text(options.out / "table.md", table(records))
    print(table(records))
