"""`python -m benchmarks layers [--out FILE]`: direct solves of layers beside LSMR, on the same gradients in one run.

A record for each net and number of clients: CPU seconds an image of a whole `invert` by each solver, compiled before
and taken in turns (the least of the repetitions), the decibels of every image, certificates, and each layer's solver.
The nets of the papers whose layers are determined, float64, embedded photos.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import leakjax
from benchmarks import asking
from benchmarks.nets import build_net, net_spec
from benchmarks.pictures import load_pictures
from benchmarks.records import environment
from leakjax.datasets import to_range
from leakjax.errors import InputError
from leakjax.metrics import psnr
from leakjax.report.reconstruction.record import unit_scale

NETS = ("cnn6", "lenet", "lenet2", "wide", "cnn2_c1", "cnn3_c3", "rconv_lenet", "rconv_cnn6")
SOLVERS = ("auto", "lsmr")
PHOTOS = 10  # embedded ones; more clients have them again


def measure(name: str, clients: int, activation: str, repetitions: int) -> dict[str, Any]:
    """The record of one net and number of clients."""
    spec = net_spec(name)
    data = load_pictures("samples", [k % PHOTOS for k in range(clients)], spec.input_shape)
    labels = data.labels % 2 if spec.outputs == 1 else data.labels
    model = leakjax.read_model(build_net(name, 0, activation))
    given = {"loss": spec.loss, "input_range": spec.input_range}
    observation = leakjax.observe(model, (to_range(data.images, spec.input_range), labels), **given)
    answers = {solver: leakjax.invert(observation, solver=solver) for solver in SOLVERS}
    seconds: dict[str, list[float]] = {solver: [] for solver in SOLVERS}
    for _ in range(repetitions):
        for solver in SOLVERS:
            begun = time.process_time()
            answers[solver] = leakjax.invert(observation, solver=solver)
            seconds[solver].append(time.process_time() - begun)
    truth = data.images / 255.0
    record: dict[str, Any] = {"measurement": "layers", "model": name, "clients": clients, "activation": activation}
    for solver, answer in answers.items():
        pictures = unit_scale(answer.images, spec.input_range)
        record[solver] = {
            "cpu_seconds_per_image": min(seconds[solver]) / clients,
            "db": [float(psnr(a, b)) for a, b in zip(pictures, truth, strict=True)],
            "certificates": [certificate.status for certificate in answer.certificates],
            "layers": [(info.name, info.solver) for info in answer.layers[0]],
        }
    return {**record, "environment": environment()}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown of the records."""
    head = "net | activation | clients | layers direct | CPU ms an image: lsmr | direct | ratio | exact "
    lines = [f"| {head}| dB (least, median): lsmr | direct |", "|---" * 10 + "|"]
    for r in records:
        old, new = r["lsmr"], r["auto"]
        solvers = [solver for _, solver in new["layers"][:-1]]
        times = [1e3 * one["cpu_seconds_per_image"] for one in (old, new)]
        exact = [f"{one['certificates'].count('exact')}" for one in (old, new)]
        db = [f"{min(one['db']):.0f}, {np.median(one['db']):.0f}" for one in (old, new)]
        cells = [r["model"], r["activation"], r["clients"], f"{solvers.count('direct')} of {len(solvers)}"]
        cells += [f"{times[0]:.0f}", f"{times[1]:.0f}", f"{times[0] / times[1]:.1f}", ", ".join(exact), *db]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    """Measure every net and print the table."""
    parser = asking.Parser(prog="python -m benchmarks layers", description=__doc__)
    asking.place_options(parser)
    parser.add_argument("--nets", default=",".join(NETS), metavar="NET[,NET..]")
    parser.add_argument("--clients", default="1,8", metavar="N[,N..]")
    parser.add_argument("--activation", default="leaky_relu:0.2")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    options = parser.parse_args(words)
    if options.table is not None:
        print(asking.printed(options.table, table))
        return
    counts = asking.whole_numbers("--clients", options.clients, 1)
    if options.repetitions < 1:
        raise InputError(f"--repetitions must be a positive number, got {options.repetitions}")
    names = options.nets.split(",")
    for name in names:
        net_spec(name)
    records = (measure(name, n, options.activation, options.repetitions) for name in names for n in counts)
    asking.recorded(records, options.out, table)
