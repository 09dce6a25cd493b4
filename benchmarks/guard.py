"""`python -m benchmarks guard [--out FILE]`: what the guard costs a client, beside its plain training step.

One line a model and batch: milliseconds of a step (gradient and SGD, float32, compiled), of `Guard.score` by each
method, their ratios, and what the methods found. With `--out` a record is appended to FILE as a line of JSON.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import leakjax
from benchmarks import asking
from benchmarks.records import append, environment
from leakjax.datasets import load_dataset
from leakjax.guard import guard, loss_of
from leakjax.models import build_model

NOISE = 0.01
EXACT_PIXELS = 1024  # "exact" takes up to 4096, in minutes
CASES = (("small", 1), ("small", 8), ("lenet2", 1), ("lenet2", 8))
LIMITS = {"max_leaked_fraction": 0.5, "max_psnr": 20.0}
GUARDS: dict[str, dict[str, Any]] = {
    "count": {"method": "sketch", "probes": 1},
    "sketch 1x4": {"method": "sketch", "noise": NOISE, "probes": 1},
    "sketch 2x4": {"method": "sketch", "noise": NOISE},
    "batch 2x4": {"method": "sketch", "noise": NOISE, "per": "batch"},
    "rank": {"method": "exact"},
    "exact": {"method": "exact", "noise": NOISE},
}
"""Probes times Lanczos steps; without noise the sketch is the count alone, and "exact" the rank alone;
"batch" bounds the worst image by the batch's mean."""


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a compiled call, over a second of calls, or one."""
    jax.block_until_ready(call())
    times: list[float] = []
    while sum(times) < 1.0:
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(times))


def small(images: Any) -> Any:
    """A convolution and a dense layer, for 16x16 images."""
    layers = [nn.Conv(12, (5, 5), strides=2), nn.tanh, lambda x: x.reshape(x.shape[0], -1), nn.Dense(10)]
    net = nn.Sequential(layers)
    return net, net.init(jax.random.key(0), images)


def measure(name: str, examples: int) -> dict[str, Any]:
    """The record of one model at one batch size, on the embedded photos."""
    data = load_dataset("samples", [k % 10 for k in range(examples)], (32, 32, 3))
    images, labels = jnp.asarray(data.images, jnp.float32) / 255, jnp.asarray(data.labels)
    images = images[:, ::2, ::2] if name == "small" else images
    model = leakjax.read_model(small(images) if name == "small" else build_model(name)).astype(jnp.float32)
    loss, params, tx = loss_of(model), dict(model.params), optax.sgd(0.1)

    @jax.jit
    def step(params: Any) -> Any:
        return optax.apply_updates(params, tx.update(jax.grad(loss)(params, images, labels), tx.init(params))[0])

    record: dict[str, Any] = {
        "measurement": "guard",
        "model": name,
        "examples": examples,
        "pixels": images.size,
        "parameters": sum(a.size for a in params.values()),
        "noise": NOISE,
        "step_ms": milliseconds(lambda: step(params)),
        "methods": {},
    }
    for method, options in GUARDS.items():
        if options["method"] == "exact" and images.size > EXACT_PIXELS:
            continue
        score = guard(loss, **LIMITS, **options).score
        found = jax.device_get(score(params, images, labels))
        record["methods"][method] = {
            "ms": milliseconds(lambda score=score: score(params, images, labels)),
            "leaked_dimensions": int(found.leaked_dimensions),
            "predicted_psnr": float(found.predicted_psnr),
            "worst_leaked_fraction": float(found.worst_leaked_fraction),
            "worst_psnr": float(found.worst_psnr),
        }
    return {**record, "environment": environment()}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown of the records: each method's time over the step's, its dimensions and the worst image's PSNR."""
    lines = ["| model | batch | n | P | step ms | " + " | ".join(GUARDS) + " |", "|---" * (5 + len(GUARDS)) + "|"]
    for r in records:
        cells = [r["model"], r["examples"], r["pixels"], r["parameters"], f"{r['step_ms']:.2f}"]
        for method in GUARDS:
            m = r["methods"].get(method)
            ratio = m and f"{m['ms'] / r['step_ms']:.0f}x ({m['leaked_dimensions']}, {m['worst_psnr']:.1f} dB)"
            cells.append(ratio or "-")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    """Measure every case and print the table."""
    parser = asking.Parser(prog="python -m benchmarks guard", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the records as lines of JSON")
    options = parser.parse_args(words)
    if options.out is not None:
        asking.file_in_folder(options.out)
    records = []
    for name, examples in CASES:
        records.append(measure(name, examples))
        if options.out is not None:
            append(options.out, [records[-1]])
    print(table(records))
