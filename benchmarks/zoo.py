"""`python -m benchmarks.zoo --out FILE.jsonl`: reconstructions of the zoo, a record an image; and their table.

Records are appended as soon as a group of images is done, and what a file holds already is not run again.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

import leakjax
from benchmarks.measure import environment
from leakjax.datasets import load_dataset, to_range
from leakjax.errors import InputError
from leakjax.metrics import psnr
from leakjax.models import MODELS, build_model
from leakjax.report.pairing import pair_with_truth
from leakjax.report.record import DETERMINED, unit_scale

KEY = ("model", "activation", "seed", "dataset", "dtype", "attack", "batch")


def run(case: dict[str, Any], index: list[int]) -> list[dict[str, Any]]:
    """The records of some images of one case; a failure is a record too."""
    spec = MODELS[case["model"]]
    data = load_dataset(case["dataset"], index, spec.input_shape)
    model = build_model(case["model"], seed=case["seed"], activation=case["activation"])
    labels = data.labels % 2 if spec.outputs == 1 else data.labels
    begun = time.process_time()
    try:
        client = to_range(data.images, spec.input_range), labels
        options = {"loss": spec.loss, "input_range": spec.input_range, "dtype": case["dtype"]}
        observation = leakjax.observe(model, client, batch_size=case["batch"], **options)
        answer = leakjax.invert(observation, attack=case["attack"], solver=case.get("solver", "auto"))
    except InputError as error:
        return [{**case, "index": i, "failed": str(error)[:200]} for i in index]
    seconds = (time.process_time() - begun - answer.seconds["compile"] - answer.seconds["trace"]) / len(index)
    seconds = seconds if seconds > 0 else None  # on a busy machine compilation takes less CPU than wall time
    pictures = unit_scale(answer.images, spec.input_range)
    truth = pair_with_truth(data.images / 255.0, pictures, case["batch"])
    records = []
    for k, i in enumerate(index):
        group = slice(k // case["batch"] * case["batch"], (k // case["batch"] + 1) * case["batch"])
        candidates = [unit_scale(c.image, spec.input_range) for c in answer.candidates[k]]
        certificate = answer.certificates[k]
        records.append(
            {
                **case,
                "index": i,
                "status": certificate.status,
                "layer": certificate.layer,
                "unknowns": certificate.unknowns,
                "leaked_dimensions": certificate.leaked_dimensions,
                "unseen_pixels": int(answer.unseen_pixels[k]),
                "psnr": psnr(truth[k], pictures[k]),
                "psnr_determined": psnr(truth[k], pictures[k], answer.determined[k] > DETERMINED),
                "psnr_best_candidate": max((psnr(truth[k], c) for c in candidates), default=None),
                "labels_right": sorted(answer.labels[group].tolist()) == sorted(labels[group].tolist()),
                "gradient_residual": float(answer.gradient_residual[k]),
                "cpu_seconds": seconds,
                "environment": environment(),
            }
        )
    return [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in r.items()} for r in records]


def table(records: list[dict[str, Any]]) -> str:
    """A markdown row for every model, activation, dtype, attack and batch size."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in records:
        attack = f"{r['attack']}, solver {r['solver']}" if "solver" in r else r["attack"]
        groups.setdefault((r["model"], r["activation"], r["dtype"], attack, r["batch"]), []).append(r)
    lines = [
        "| model | activation | gradient | attack | images | leaked dimensions | certificates "
        "| determined part, dB (least, median) | whole, dB (least, median) | wrong | CPU s |",
        "|" + "---|" * 11,
    ]
    for (model, activation, dtype, attack, batch), group in groups.items():
        done = [r for r in group if "failed" not in r]
        leaked = sorted({r["leaked_dimensions"] for r in done if r["leaked_dimensions"] is not None})
        unknowns = done[0]["unknowns"] if done else None
        counts = Counter(r.get("status", "refused") for r in group)
        wrong = sum(r["status"] == "exact" and r["psnr"] < 60 for r in done)
        attack = attack if batch == 1 else f"{attack}, batches of {batch}"
        lines.append(
            f"| {model} | {activation} | {dtype} | {attack} | {len(group)} | {_span(leaked)} of {unknowns} "
            f"| {', '.join(f'{n} {status}' for status, n in counts.most_common())} "
            f"| {_least_median(done, 'psnr_determined')} | {_least_median(done, 'psnr')} | {wrong} "
            f"| {_mean([r['cpu_seconds'] for r in done if r['cpu_seconds'] is not None])} |"
        )
    return "\n".join(lines) + "\n"


def _span(values: list[int]) -> str:
    return "-" if not values else str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" if values else "-"


def _least_median(records: list[dict[str, Any]], name: str) -> str:
    values = [r[name] for r in records if r[name] is not None]
    return f"{min(values):.0f}, {statistics.median(values):.0f}" if values else "-"


def main() -> None:
    """Run what the options name, or print the table of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/zoo.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="print the table of a file, run nothing")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--activations", default="tanh,leaky_relu,relu")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dataset", default="samples")
    parser.add_argument("--index", default="0,1")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--attack", default="copa")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--solver", default="auto")
    options = parser.parse_args()
    if options.table is not None:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]), end="")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    held = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(*(r[k] for k in KEY), r.get("solver", "auto"), r["index"]) for r in held}
    index = [int(i) for i in options.index.split(",")]
    names = [part.split(",") for part in (options.seeds, options.models, options.activations)]
    for seed, model, activation in itertools.product(*names):
        dataset = "foolbox/mnist" if MODELS[model].input_shape[-1] == 1 else options.dataset
        values = (model, activation, int(seed), dataset, options.dtype, options.attack, options.batch)
        left = [i for i in index if (*values, options.solver, i) not in done]
        if not left:
            continue
        solver = {} if options.solver == "auto" else {"solver": options.solver}
        records = run({**dict(zip(KEY, values, strict=True)), **solver}, left)
        with open(options.out, "a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
        print(f"done: {model} {activation} seed {seed}", file=sys.stderr, flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
