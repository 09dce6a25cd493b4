"""`python -m benchmarks accelerator [--out FILE]`: clients a second of one compiled program a chunk, beside the bounds.

For each number of clients at once: seconds of the program of all layers (arrays on the device, compiled before, the
median of several runs), and of the whole `invert`; the floating-point operations that were counted in the program's
products, over the rate that a large matrix product reaches on the same device; and the bytes that it must read and
write once, over the rate of a copy. Photos are the embedded ones, moved and mirrored at random.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import leakjax
from benchmarks import asking
from benchmarks.nets import build_net, net_spec
from benchmarks.records import environment
from leakjax.attacks.layerwise.cost import step_count
from leakjax.attacks.layerwise.layer_step import Step, compile_steps
from leakjax.attacks.layerwise.start import start
from leakjax.attacks.layerwise.sweep import compile_sweep, state_of, swept_together
from leakjax.attacks.problem import Monitor, Problem
from leakjax.datasets import to_range
from leakjax.preparation import Asked, prepare
from leakjax.report.reconstruction.record import unit_scale
from leakjax.runtime.precision import compute_in

MODEL, ACTIVATION = "cnn6", "leaky_relu:0.2"
RUNS = 5  # of the compiled program, the median counts
SIDE = 8192  # of the matrices whose product and copy give the rates; on CPUs a sixteenth


def photos(count: int, seed: int) -> np.ndarray:
    """(count, 32, 32, 3) in 0..1: the embedded photos, rolled and mirrored at random, so that no two are alike."""
    folder = Path(leakjax.__file__).parent / "datasets" / "samples" / "32"
    files = sorted(folder.glob("*.png"))
    loaded = np.stack([np.asarray(Image.open(file).convert("RGB"), float) / 255 for file in files])
    rng = np.random.default_rng(seed)
    chosen = [np.roll(loaded[k % len(files)], rng.integers(32, size=2), (0, 1)) for k in range(count)]
    return np.stack([image[:, :: rng.choice([-1, 1])] for image in chosen])


def rates(dtype: str) -> dict[str, float]:
    """Operations a second of a product of two large matrices, and bytes a second of a copy, on this device."""
    side = SIDE if jax.default_backend() != "cpu" else SIDE // 16
    with compute_in(dtype) as floating:
        a = jax.random.normal(jax.random.key(0), (side, side), floating)
        product = median_seconds(jax.jit(lambda a: a @ a), a)
        copy = median_seconds(jax.jit(lambda a: a + 1), a)
    return {"flops": 2 * side**3 / product, "bytes": 2 * a.nbytes / copy}


def median_seconds(program: Callable[..., Any], *arguments: Any, runs: int = RUNS) -> float:
    """Seconds of a run on arguments that are there, after a first one."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def problem_of(observation: leakjax.Observation, dtype: str, solver: str, chunk: int) -> Problem:
    """The problem that `invert(observation, "rgap", dtype, solver, chunk)` solves."""
    asked = Asked(
        attack="rgap",
        dtype=dtype,
        labels=None,
        solver=solver,
        chunk=chunk,
        starts=1,
        prior="none",
        pull_back="auto",
        optimizer="adam",
        steps=None,
        seed=0,
        devices=None,
        adaptive=True,
        gradient_noise=None,
        gradient_scale=None,
        progress=None,
    )
    return prepare(observation, asked, np.dtype(dtype), Monitor())[0]


def measure(clients: int, dtype: str, solver: str, *, whole: bool, layers: bool) -> dict[str, Any]:
    """The record of a chunk of `clients`: the program of all layers, and the `whole` invert; by `layers` too."""
    spec = net_spec(MODEL)
    images = to_range(np.uint8(np.round(255 * photos(clients, 1))), spec.input_range)
    labels = np.random.default_rng(2).integers(spec.outputs if spec.outputs > 1 else 2, size=clients)
    model = leakjax.read_model(build_net(MODEL, 0, ACTIVATION))
    observation = leakjax.observe(model, (images, labels), loss=spec.loss, input_range=spec.input_range)
    record: dict[str, Any] = {"measurement": "accelerator", "model": MODEL, "clients": clients}
    record |= {"dtype": dtype, "solver": solver, "rates": rates(dtype)}
    with compute_in(dtype):
        problem, monitor = problem_of(observation, dtype, solver, clients), Monitor()
        segments = list(problem.segments[:-1])
        begun = time.perf_counter()
        found = start(problem, monitor, problem.segments[-1])
        paths = {path.victim: path for path in reversed(found) if path.labels[0] == labels[path.victim]}
        record["head_seconds"] = time.perf_counter() - begun
        state = state_of(problem, [paths[k] for k in range(clients)])
        together = swept_together(problem, segments, clients) or segments[::-1]
        steps = dict(zip(segments, compile_steps(problem, segments, clients, monitor, later=segments), strict=True))
        program, factors = compile_sweep(problem, monitor, [steps[s] for s in together], clients)
        record |= {"trace_seconds": monitor.trace, "compile_seconds": monitor.compile}
        memory = program.memory_analysis()
        record["bytes"] = {"temporary": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes}
        begun = time.perf_counter()
        gradient = {p: problem.gradients[p] for s in together for p in s.paths}
        given = jax.device_put((dict(problem.variables), factors, *state, gradient))
        jax.block_until_ready(given)
        record["transfer_seconds"] = time.perf_counter() - begun
        record["program_seconds"] = median_seconds(program, *given)
        found = program(*given)
        images_found = unit_scale(np.asarray(found[-1][0].x)[:, 0], spec.input_range)
        record["db"] = [
            float(psnr_of(a, b)) for a, b in zip(images_found, unit_scale(images, spec.input_range), strict=True)
        ]
        record["lost"] = [float(np.max(lost)) for _, lost, _, _ in found]
        counts = [operations(problem, steps[s], layer[0]) for s, layer in zip(together, found, strict=True)]
        record["operations"] = sum(counts)
        record["moved"] = sum(np.asarray(a).nbytes for a in jax.tree.leaves(given)) + images_found.nbytes
        if layers:
            record["layers"] = by_layer(problem, steps, together, state)
    if whole:
        for _ in range(2):
            begun = time.perf_counter()
            answer = leakjax.invert(observation, attack="rgap", dtype=dtype, solver=solver, chunk=clients)
            record["invert_seconds"] = time.perf_counter() - begun
        record["certificates"] = [c.status for c in answer.certificates].count("exact")
    return {**record, "environment": environment()}


def psnr_of(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, of images in 0..1."""
    return float(-10 * np.log10(max(np.mean((np.asarray(a, float) - b) ** 2), 1e-40)))


def operations(problem: Problem, step: Step, solution: Any) -> float:
    """Floating-point operations of a layer for all clients, its iterations counted with those that it took."""
    count = step_count(problem, step)
    taken = solution.estimates.steps[:, 0] if step.route is not None else solution.steps
    return float(len(taken) * count.fixed + count.step * np.sum(np.asarray(taken)))


def by_layer(problem: Problem, steps: Any, together: Sequence[Any], state: Any) -> list[dict[str, Any]]:
    """Seconds of each layer's own program on the same clients."""
    rows, state = [], state
    for segment in together:
        step = steps[segment]
        directly = step.route is not None
        program = step.program(directly=directly)
        shared = (step.route.factor,) if directly else (np.asarray(False),)
        gradient = {p: problem.gradients[p] for p in segment.paths}
        given = jax.device_put((dict(problem.variables), *shared, *state, gradient))
        seconds = median_seconds(program, *given, runs=3)
        solution, dx = program(*given)
        steps_taken = solution.estimates.steps if directly else solution.steps
        rows.append(
            {
                "name": segment.name,
                "direct": directly,
                "seconds": seconds,
                "steps": int(np.max(steps_taken)),
                "operations": operations(problem, step, solution),
                "residual": float(np.max(solution.residual)),
            }
        )
        state = state._replace(x=solution.x, dx=dx)
    return rows


def table(records: list[dict[str, Any]]) -> str:
    """Markdown of the records."""
    head = "device | clients | dtype | solver | compile s | program s | clients a second | GFLOP a client "
    lines = [f"| {head}| bound by FLOPs | by bytes | invert s | exact | dB (least, median) |"]
    lines.append("|---" * 13 + "|")
    for r in records:
        rate, n = r["rates"], r["clients"]
        counted = r.get("operations")
        bounds = [
            "" if counted is None else f"{n * rate['flops'] / counted:.0f}",
            f"{n * rate['bytes'] / r['moved']:.0f}",
        ]
        whole = (f"{r['invert_seconds']:.2f}", f"{r['certificates']}") if "invert_seconds" in r else ("", "")
        cells = [r["environment"]["kind"], n, r["dtype"], r["solver"], f"{r['compile_seconds']:.1f}"]
        cells += [f"{r['program_seconds']:.4f}", f"{n / r['program_seconds']:.0f}"]
        cells += ["" if counted is None else f"{counted / n / 1e9:.2f}"]
        cells += [*bounds, *whole, f"{min(r['db']):.0f}, {np.median(r['db']):.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    """Measure every number of clients and print the table."""
    parser = asking.Parser(prog="python -m benchmarks accelerator", description=__doc__)
    asking.place_options(parser)
    parser.add_argument("--clients", default="64,1024,4096", metavar="N[,N..]")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--solver", choices=("auto", "lsmr"), default="auto")
    parser.add_argument("--whole", action="store_true", help="the whole invert too")
    parser.add_argument("--layers", action="store_true", help="each layer's own program too")
    options = parser.parse_args(words)
    if options.table is not None:
        print(asking.printed(options.table, table))
        return
    counts = asking.whole_numbers("--clients", options.clients, 1)
    chosen = {"whole": options.whole, "layers": options.layers}
    records = (measure(clients, options.dtype, options.solver, **chosen) for clients in counts)
    asking.recorded(records, options.out, table)
