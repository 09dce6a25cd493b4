"""`python -m benchmarks [--out DIR] [--quick]`: every measurement in a process of its own, records, a table.

Records are appended to `records.jsonl` as soon as they are made; `table.md` is generated from them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


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
    engines = [r for r in records if r["measurement"] == "engine" and "failed" not in r]
    lines = ["| victims | chunk | dtype | CPU s an image | wall s an image | compile s | MiB | worst layer error |"]
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


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="print the table of a records.jsonl, run nothing")
    parser.add_argument("--quick", action="store_true", help="without the dense baseline and the large batches")
    options = parser.parse_args()
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]), end="")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = ["1", "8"] if options.quick else ["1", "8", "32", "128", "32:float64:32", "1:float32", "32:float32"]
    plan = [("engine", size) for size in sizes] + [("attack", case) for case in ("cnn6:rgap", "cnn6d:copa")]
    plan += [] if options.quick else [("lstsq", "")]
    records = []
    with open(options.out / "records.jsonl", "a") as file:

        def keep(record: dict[str, Any]) -> None:
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"done: {record['measurement']} {record.get('argument', '')}", file=sys.stderr)

        for name, argument in plan:
            keep(measure(name, argument))
        with tempfile.TemporaryDirectory() as cache:
            keep(start_time(cache, str(options.out / "command")))
    (options.out / "table.md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    main()
