"""One measurement in a process of its own: `python -m benchmarks.measure NAME [ARGUMENT]` prints a JSON record."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import leakjax
from benchmarks import baseline
from benchmarks.records import environment
from leakjax.attacks.layerwise.layer_step import compile_steps, run_steps
from leakjax.attacks.layerwise.system import LayerState
from leakjax.attacks.problem import Monitor, Problem
from leakjax.constraints.layer import loss_pull, segment_rows
from leakjax.datasets import load_dataset, to_range
from leakjax.models import MODELS, build_model
from leakjax.runtime.precision import compute_in
from leakjax.segments.chain import read_segments
from leakjax.segments.tracing.network import read_network

MODEL, ACTIVATION = "cnn6", "leaky_relu:0.2"


class PeakMemory:
    """Peak resident memory above that at the last `reset`, in MiB (Linux)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from the memory resident now."""
        Path("/proc/self/clear_refs").write_text("5")
        self.base = self._read("VmRSS")

    def above(self) -> float:
        """MiB above the base at the highest point since."""
        return self._read("VmHWM") - self.base

    @staticmethod
    def _read(name: str) -> float:
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
        return int(line.split()[1]) / 1024


def _truth(victims: int, dtype: str) -> tuple[Problem, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """A problem, and the true x and dL/dx at every segment's output (for feeding each layer its own system)."""
    spec = MODELS[MODEL]
    data = load_dataset("samples", [k % 10 for k in range(victims)], spec.input_shape)
    images = to_range(data.images, spec.input_range)
    labels = data.labels % 2
    model = leakjax.read_model(build_model(MODEL, activation=ACTIVATION))
    observation = leakjax.observe(model, (images, labels), loss=spec.loss, dtype=dtype)
    with compute_in(dtype) as floating:
        cast = model.astype(floating)
        chain = read_segments(cast, spec.input_shape, floating)
        variables = cast.variables

        @jax.jit
        def states(x: Any, label: Any) -> Any:
            xs, zs = [x[None]], []
            for segment in chain.segments:
                zs.append(segment.function(variables, xs[-1]))
                xs.append(segment.activation.function(variables, zs[-1]))
            dz = loss_pull(chain.segments[-1], variables, spec.loss, zs[-1], label)
            dxs = []
            for k in reversed(range(1, len(zs))):
                dxs.append(jax.vjp(lambda x, s=chain.segments[k]: s.function(variables, x), xs[k])[1](dz)[0])
                dz = chain.segments[k - 1].activation.slope(variables, zs[k - 1]) * dxs[-1]
            return xs, dxs[::-1]

        xs, dxs = jax.vmap(states)(jnp.asarray(images, floating), jnp.asarray(labels))
        gradients = {p: np.asarray(g, floating) for p, g in observation.gradients.items()}
        eps = float(np.finfo(floating).eps)
        problem = Problem(
            chain=chain,
            network=read_network(cast, spec.input_shape, 1, floating),
            variables=variables,
            gradients=gradients,
            loss=spec.loss,
            input_shape=spec.input_shape,
            input_range=spec.input_range,
            labels=None,
            dtype=floating,
            noise=eps,
            chunk=victims,
        )
    return problem, [np.asarray(x) for x in xs], [np.asarray(d) for d in dxs], images


IMAGES = 8  # at least: single solves are averaged over as many images


def engine(argument: str) -> dict[str, Any]:
    """The layer systems of cnn6, each from the true next layer: "VICTIMS[:DTYPE[:CHUNK]]".

    `victims` are solved at once, group after group until 8 images are done; a chunk is what `vmap` takes together.
    """
    count, dtype, chunk = (*argument.split(":"), *("", "", "")[argument.count(":") :])[:3]
    victims, dtype, size = int(count), dtype or "float64", int(chunk or (1 if jax.default_backend() == "cpu" else 64))
    images = max(IMAGES, victims)
    problem, xs, dxs, _ = _truth(images, dtype)
    monitor = Monitor()
    segments = problem.segments[:-1]
    size = min(size, victims)
    groups = [list(range(start, start + victims)) for start in range(0, images, victims)]
    with compute_in(dtype):
        steps = compile_steps(problem, segments, size, monitor)
        memory = PeakMemory()
        results: list[list[Any]] = []
        cpu = wall = 0.0
        for _ in range(2):  # the first run warms up
            results, cpu, wall = [], time.process_time(), time.perf_counter()
            for k, step in enumerate(steps):
                noise = 1e-10 * np.sqrt(np.mean(xs[k + 1] ** 2, axis=tuple(range(1, xs[k + 1].ndim))))
                state = LayerState(xs[k + 1], dxs[k], noise, np.full(images, problem.tolerances.solve))
                parts = [(group, LayerState(*(a[group] for a in state))) for group in groups]
                results.append([run_steps(problem, step, size, part, group)[0].x for group, part in parts])
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    errors = [
        max(float(np.linalg.norm(x - t) / np.linalg.norm(t)) for x, t in zip(np.concatenate(found), truth, strict=True))
        for found, truth in zip(results, xs, strict=False)
    ]
    return {
        "victims": victims,
        "dtype": dtype,
        "chunk": size,
        "cpu_seconds_per_image": cpu / images,
        "wall_seconds_per_image": wall / images,
        "trace_seconds": monitor.trace,
        "compile_seconds": monitor.compile,
        "relative_errors": errors,
        "mib_above_compilation": memory.above(),
    }


def lstsq(argument: str) -> dict[str, Any]:
    """The same systems of one victim, dense with padding rows, by `numpy.linalg.lstsq`."""
    del argument
    problem, xs, dxs, _ = _truth(1, "float64")
    shapes = [(4, 2, 2), (3, 2, 1), (3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1)]
    cpu, errors = [], []
    with compute_in("float64"):
        layers = []
        for k, (segment, (_, stride, padding)) in enumerate(zip(problem.segments, shapes, strict=False)):
            x = jnp.asarray(xs[k][0])
            z = segment.function(problem.variables, x)
            dz = segment.activation.slope(problem.variables, z) * dxs[k][0].reshape(z.shape)
            gradient = segment_rows(segment, problem.variables, dz, x)[1][segment.paths[0]]
            kernel = np.asarray(problem.variables[segment.paths[0]])
            layers.append(
                baseline.Layer(
                    kernel, stride, padding, x.shape[1:], np.asarray(z[0]), np.asarray(dz[0]), np.asarray(gradient)
                )
            )
    memory = PeakMemory()
    for k, layer in enumerate(layers):
        x, seconds = baseline.solve(layer)
        cpu.append(seconds)
        errors.append(float(np.linalg.norm(x - xs[k][0, 0]) / np.linalg.norm(xs[k][0, 0])))
        print(f"lstsq: layer {k + 1} of {len(layers)}, {seconds:.1f} CPU s", file=sys.stderr)
    return {
        "victims": 1,
        "cpu_seconds": sum(cpu),
        "cpu_seconds_by_layer": cpu,
        "relative_errors": errors,
        "mib_above_compilation": memory.above(),
    }


def attack(argument: str) -> dict[str, Any]:
    """A whole attack on `IMAGES` photos at once, programs compiled before: "MODEL:ATTACK"."""
    name, kind = argument.split(":")
    spec = MODELS[name]
    data = load_dataset("samples", list(range(IMAGES)), spec.input_shape)
    images, labels = to_range(data.images, spec.input_range), data.labels % 2 if spec.outputs == 1 else data.labels
    model = build_model(name, activation=ACTIVATION)
    observation = leakjax.observe(model, (images, labels), loss=spec.loss, input_range=spec.input_range)
    leakjax.invert(observation, attack=kind)
    cpu, wall = time.process_time(), time.perf_counter()
    answer = leakjax.invert(observation, attack=kind)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cpu_seconds_per_image": cpu / IMAGES,
        "wall_seconds_per_image": wall / IMAGES,
        "statuses": [c.status for c in answer.certificates],
        "largest_error": float(np.max(np.abs(answer.images - images))),
    }


def throughput(argument: str) -> dict[str, Any]:
    """`rgap` on cnn6 of so many photos at once, first with compilation and then without: "VICTIMS[:CHUNK]"."""
    count, _, chunk = argument.partition(":")
    victims = int(count)
    spec = MODELS[MODEL]
    data = load_dataset("samples", [k % 10 for k in range(victims)], spec.input_shape)
    images = to_range(data.images, spec.input_range)
    client = build_model(MODEL, activation=ACTIVATION)
    observation = leakjax.observe(client, (images, data.labels % 2), loss=spec.loss, input_range=spec.input_range)
    told = {"chunk": int(chunk)} if chunk else {}
    first = leakjax.invert(observation, attack="rgap", **told).seconds
    memory = PeakMemory()
    cpu, wall = time.process_time(), time.perf_counter()
    answer = leakjax.invert(observation, attack="rgap", **told)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "victims": victims,
        "cpu_seconds_per_image": cpu / victims,
        "wall_seconds_per_image": wall / victims,
        "images_per_second": victims / wall,
        "compile_share": (first["trace"] + first["compile"]) / first["total"],
        "mib_a_victim": memory.above() / victims,
        "exact": sum(c.status == "exact" for c in answer.certificates),
        "largest_error": float(np.max(np.abs(answer.images - images))),
    }


MEASUREMENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "engine": engine,
    "lstsq": lstsq,
    "attack": attack,
    "throughput": throughput,
}


def main() -> None:
    """Run one measurement and print its record."""
    name, argument = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    record = MEASUREMENTS[name](argument)
    print(json.dumps({"measurement": name, "argument": argument, **record, "environment": environment()}))


if __name__ == "__main__":
    main()
