"""`python -m benchmarks sizes [--out FILE]`: what an image costs against side, width, clients, counted and measured.

Strided nets of ten classes, all layers determined: convolutions of 11x11 with stride 4 and 3x3 with stride 2 behind
tanh. For each size CPU seconds of a warm `invert`, peak memory of the process, decibels, and the operations that were
counted in the layers' programs with the steps that they took; a process of its own each. Exponents are slopes of
log-log fits.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import leakjax
from benchmarks import asking
from benchmarks.accelerator import photos, psnr_of
from benchmarks.nets import build_net, net_spec
from benchmarks.records import environment
from leakjax.datasets import to_range
from leakjax.errors import InputError
from leakjax.report.reconstruction.record import unit_scale

SIDES, WIDTHS, CLIENTS = (32, 64, 128, 224), (48, 64, 96, 128), (1, 4, 16)
SIDE, WIDTH = 64, 64  # where the others vary; from 48 filters on the first convolution alone has as many rows as pixels
LINES = {"side": (0, SIDES), "width": (1, WIDTHS[1:]), "clients": (2, CLIENTS)}
"""What is fitted, by the place in a size; 48 filters have fewer outputs than pixels, and another solver."""


def sizes() -> list[tuple[int, int, int]]:
    """(side, width, clients) of every measurement."""
    sides = [(side, WIDTH, 1) for side in SIDES]
    widths = [(SIDE, width, 1) for width in WIDTHS]
    several = [(SIDE, WIDTH, clients) for clients in CLIENTS]
    return sorted({*sides, *widths, *several})


def measure(side: int, width: int, clients: int) -> dict[str, Any]:
    """The record of one size."""
    name = f"strided:{side}x{width}x10"
    spec = net_spec(name)
    rows = [Image.fromarray(np.uint8(255 * image)).resize((side, side)) for image in photos(clients, 0)]
    images = to_range(np.stack([np.asarray(row) for row in rows]), spec.input_range)
    labels = np.arange(clients) % 10
    model = leakjax.read_model(build_net(name, 0, "tanh"))
    observation = leakjax.observe(model, (images, labels), loss=spec.loss, input_range=spec.input_range)
    plan = leakjax.plan(observation)
    seconds = []
    for _ in range(2):
        begun = time.process_time()
        answer = leakjax.invert(observation)
        seconds.append(time.process_time() - begun)
    pairs = zip(unit_scale(answer.images, spec.input_range), unit_scale(images, spec.input_range), strict=True)
    layers = list(zip(plan.layers, answer.layers[0][:-1], strict=True))
    return {
        "measurement": "sizes",
        "model": name,
        "side": side,
        "width": width,
        "clients": clients,
        "unknowns": side * side * 3,
        "cold_cpu_seconds": seconds[0],
        "cpu_seconds": seconds[1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "operations": clients * sum(p.operations + p.step * info.steps for p, info in layers),
        "db": [psnr_of(a, b) for a, b in pairs],
        "certificates": [c.status for c in answer.certificates],
        "layers": [(info.name, info.solver, info.steps, info.condition) for _, info in layers],
        "environment": environment(),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown of the records, and the exponents."""
    lines = [
        "| side | width | clients | CPU s: first | again | GFLOP | peak MiB | exact | dB (least) | layers, steps |"
    ]
    lines.append("|---" * 10 + "|")
    for r in records:
        layers = ", ".join(f"{solver} {steps}" for _, solver, steps, _ in r["layers"])
        cells = [r["side"], r["width"], r["clients"], f"{r['cold_cpu_seconds']:.1f}", f"{r['cpu_seconds']:.2f}"]
        cells += [f"{r['operations'] / 1e9:.3g}", f"{r['peak_mib']:.0f}"]
        cells += [r["certificates"].count("exact"), f"{min(r['db']):.0f}", layers]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| against | sizes | exponent of CPU s | of operations |", "|---|---|---|---|"]
    for name, (axis, values) in LINES.items():
        base = [SIDE, WIDTH, 1]
        wanted = [tuple(v if k == axis else b for k, b in enumerate(base)) for v in values]
        found = {(r["side"], r["width"], r["clients"]): r for r in records}
        rows = [(v, found[key]) for v, key in zip(values, wanted, strict=True) if key in found]
        if len(rows) > 2:
            slopes = [
                np.polyfit(np.log([v for v, _ in rows]), np.log([r[what] for _, r in rows]), 1)[0]
                for what in ("cpu_seconds", "operations")
            ]
            lines.append(f"| {name} | {', '.join(str(v) for v, _ in rows)} | {slopes[0]:.2f} | {slopes[1]:.2f} |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> None:
    """Measure every size in a process of its own and print the table."""
    parser = asking.Parser(prog="python -m benchmarks sizes", description=__doc__)
    asking.place_options(parser)
    parser.add_argument("--one", metavar="SIDE,WIDTH,CLIENTS", help="one size, in this process; its record as JSON")
    options = parser.parse_args(words)
    if options.table is not None:
        print(asking.printed(options.table, table))
        return
    if options.one is not None:
        numbers = asking.whole_numbers("--one", options.one, 1)
        if len(numbers) != 3:
            raise InputError(f"--one: expected SIDE,WIDTH,CLIENTS, got {options.one!r}")
        print(json.dumps(measure(*numbers)))
        return
    asking.recorded(map(_alone, sizes()), options.out, table)


def _alone(size: tuple[int, int, int]) -> dict[str, Any]:
    """The record of one size, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "sizes", "--one", ",".join(map(str, size))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
