"""`python -m benchmarks solvers --out FILE.jsonl`: every solver of the matching problem on the same gradients, one run.

Each record: seconds of solving (compilation apart), steps, the relative residual of the gradient and the PSNR reached.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import leakjax
from benchmarks import asking
from benchmarks.records import append, environment
from leakjax.arguments import choice
from leakjax.datasets import load_dataset, to_range
from leakjax.metrics import psnr
from leakjax.models import MODELS, build_model
from leakjax.models.activations import parse_activation
from leakjax.report.reconstruction.record import unit_scale
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing.network import batch_gradient, read_network
from leakjax.solvers.descent import descend
from leakjax.solvers.gauss_newton import levenberg_marquardt

Solve = Callable[[Callable[[Any], Any], Any, Any], tuple[Any, Any]]


def _newton(max_inner: int) -> Solve:
    def solve(residual: Any, start: Any, size: Any) -> tuple[Any, Any]:
        found = levenberg_marquardt(residual, start, size=size, tolerance=1e-14, max_steps=80, max_inner=max_inner)
        return found.x, found.inner_steps

    return solve


def _descent(optimizer: optax.GradientTransformation, steps: int) -> Solve:
    def solve(residual: Any, start: Any, size: Any) -> tuple[Any, Any]:
        found = descend(
            lambda x: 0.5 * optax.tree.norm(residual(x), squared=True), start, optimizer, steps=steps, tolerance=1e-9
        )
        return found.x, found.steps

    return solve


SOLVERS: dict[str, Solve] = {
    "Levenberg-Marquardt, LSMR inside, at most 3000": _newton(3000),
    "Levenberg-Marquardt, LSMR inside, at most 300": _newton(300),
    "optax.lbfgs, memory 20": _descent(optax.lbfgs(memory_size=20), 3000),
    "optax.adam(0.01)": _descent(optax.adam(0.01), 6000),
    "optax.adam(0.1), cosine": _descent(optax.adam(optax.cosine_decay_schedule(0.1, 6000)), 6000),
}


def _client(model: str, activation: str, index: int) -> tuple[leakjax.Observation, Any, np.ndarray]:
    """What the server sees of one photo; for the record alone, the photo (1, H, W, C) in [0, 1] and its label."""
    spec = MODELS[model]
    data = load_dataset("samples", [index], spec.input_shape)
    labels = data.labels % 2 if spec.outputs == 1 else data.labels
    client = to_range(data.images, spec.input_range), labels
    net = build_model(model, activation=activation)
    return leakjax.observe(net, client, loss=spec.loss, input_range=spec.input_range), data.images / 255.0, labels


def measure(model: str, activation: str, index: int, name: str) -> dict[str, Any]:
    """The record of one solver on the gradient of one photo, from the same noise."""
    spec = MODELS[model]
    low, high = spec.input_range
    observation, truth, known = _client(model, activation, index)
    with compute_in("float64"):
        read = read_network(observation.model, spec.input_shape, 1, jnp.float64)
        gradient = batch_gradient(read.logits, spec.loss, tuple(observation.gradients))
        sent = {p: jnp.asarray(g[0]) for p, g in observation.gradients.items()}
        labels = jnp.asarray(known)

        def run(variables: Any, start: Any) -> Any:
            def residual(x: Any) -> Any:
                found = gradient(variables, x, labels)
                return {p: (found[p] - sent[p]) / jnp.linalg.norm(sent[p]) for p in sent}

            x, steps = SOLVERS[name](residual, start, jnp.sqrt(float(len(sent))))
            return x, steps, optax.tree.norm(residual(x)) / jnp.sqrt(float(len(sent)))

        noise = np.random.default_rng(0).normal(size=(1, *spec.input_shape))
        start = jnp.asarray(0.5 * (low + high) + 0.1 * (high - low) * noise)
        compiled = jax.jit(run).lower(dict(observation.model.variables), start).compile()
        begun, cpu = time.perf_counter(), time.process_time()
        x, steps, residual = jax.block_until_ready(compiled(dict(observation.model.variables), start))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    quality = psnr(truth[0], unit_scale(np.asarray(x), spec.input_range)[0])
    return {
        "model": model,
        "activation": activation,
        "index": index,
        "solver": name,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "steps": int(steps),
        "residual": float(residual),
        "psnr": quality,
        "environment": environment(),
    }


PULL_BACKS: dict[str, dict[str, Any]] = {
    "pull-back: by its nature": {"pull_back": "auto"},
    "pull-back: Levenberg-Marquardt": {"pull_back": "levenberg_marquardt"},
    "pull-back: optax.lbfgs": {"pull_back": "optax", "optimizer": "lbfgs"},
    "pull-back: optax.adam(0.01)": {"pull_back": "optax", "optimizer": "adam"},
}


def measure_pull_back(model: str, activation: str, index: int, name: str) -> dict[str, Any]:
    """The record of `copa` on one photo with one solver of its pulled-back constraints; programs compiled before."""
    observation, truth, _ = _client(model, activation, index)
    leakjax.invert(observation, **PULL_BACKS[name])
    begun, cpu = time.perf_counter(), time.process_time()
    answer = leakjax.invert(observation, **PULL_BACKS[name])
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return {
        "model": model,
        "activation": activation,
        "index": index,
        "solver": name,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "steps": sum(info.steps for info in answer.layers[0]),
        "residual": float(answer.gradient_residual[0]),
        "psnr": psnr(truth[0], unit_scale(answer.images, observation.input_range)[0]),
        "environment": environment(),
    }


def table(records: list[dict[str, Any]]) -> str:
    """A markdown row a record."""
    lines = ["| model | activation | solver | CPU s | steps | residual | PSNR dB |", "|" + "---|" * 7]
    for r in records:
        lines.append(
            f"| {r['model']} | {r['activation']} | {r['solver']} | {r['cpu_seconds']:.1f} | {r['steps']} "
            f"| {r['residual']:.1e} | {r['psnr']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> None:
    """Run every solver on every problem, or print the table of a file."""
    parser = asking.Parser(prog="python -m benchmarks solvers", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/solvers.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="print the table of a file, run nothing")
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--activations", default="tanh,sigmoid")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--pull-back", action="store_true", help="the solvers of `copa` instead of those of `match`")
    options = parser.parse_args(words)
    if options.table is not None:
        print(asking.printed(options.table, table), end="")
        return
    choice("model", options.model, MODELS)
    for text in options.activations.split(","):
        parse_activation(text)
    asking.file_in_folder(options.out)
    for activation in options.activations.split(","):
        for name in PULL_BACKS if options.pull_back else SOLVERS:
            record = (measure_pull_back if options.pull_back else measure)(
                options.model, activation, options.index, name
            )
            append(options.out, [record])
            print(f"done: {activation}, {name}", file=sys.stderr, flush=True)
