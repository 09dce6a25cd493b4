"""`python -m benchmarks accuracy --out FILE`: what a defense costs in accuracy, and what it leaves of the images.

A small net learns scikit-learn's digits by federated SGD; each of `CLIENTS` clients a step sends the defended gradient
of one image. The attacker sees one such message, made with the weights of the beginning, and knows the defense.
A run continues what the file holds already.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dm_pix
import numpy as np
import optax
from flax import nnx

import leakjax
from benchmarks import asking
from benchmarks.records import Record, append, environment, read_records
from leakjax.client.defenses import Setting, build_defense
from leakjax.client.training.loop import train
from leakjax.datasets import to_range, train_and_test
from leakjax.leakage.audit import audit
from leakjax.leakage.privacy import DPSGD
from leakjax.metrics import psnr
from leakjax.models.networks import Conv, ConvNet
from leakjax.report.audit.audit import Audit

SHAPE, WINDOW = (8, 8, 1), 7
CLIENTS, EPOCHS, RATE, SEED = 32, 5, 3e-3, 0
IMAGES = 3
SIGMAS, SCALES, CLIP, MULTIPLIERS = ("1e-3", "1e-2", "1e-1", "1"), ("1e-2", "1e-1"), 1.0, ("1e-2", "1e-1", "1")
DEFENSES = (
    None,
    *(f"gaussian:{sigma}" for sigma in SIGMAS),
    *(f"laplace:{scale}" for scale in SCALES),
    *(f"dp_sgd:{CLIP},{multiplier}" for multiplier in MULTIPLIERS),
    *(f"top_k:{pruned}" for pruned in ("0.9", "0.99")),
    "sign",
    "qsgd:16",
    *(f"soteria:{pruned}" for pruned in ("0.1", "0.8")),
)


def net() -> leakjax.Model:
    """Two convolutions (6 and 8 filters, the second strided), tanh, and a dense head."""
    layers = [Conv(6, 3, 1, 1), Conv(8, 3, 2, 1)]
    module = ConvNet(layers, rngs=nnx.Rngs(SEED), activations=[nnx.tanh] * 2, input_shape=SHAPE, conv_bias=True)
    return leakjax.read_model(module)


def measure(spec: str | None) -> Record:
    """The record of one defense: accuracy after training, and reconstructions of the first test images."""
    model, (data, test) = net(), train_and_test("digits", SHAPE)
    told: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 1, "clients": CLIENTS, "seed": SEED, "keep": []}
    trained = train(model, data, test=test, optimizer=optax.adam(RATE), defense=spec, **told)
    images, labels = to_range(test.images[:IMAGES], (0.0, 1.0)), test.labels[:IMAGES]
    sent = leakjax.observe(model, (images, labels), defense=spec, seed=SEED)
    answer = leakjax.invert(sent, attack="match")
    pairs = list(zip(images, answer.images, strict=True))
    similar = functools.partial(dm_pix.ssim, filter_size=WINDOW)
    return {
        "measurement": "accuracy",
        "defense": spec,
        **{k: v for k, v in told.items() if k != "keep"},
        "learning_rate": RATE,
        "test_accuracy": trained.accuracy.tolist(),
        "images": IMAGES,
        "psnr": [psnr(truth, image) for truth, image in pairs],
        "ssim": [float(similar(np.float32(truth), np.float32(image))) for truth, image in pairs],
        "statuses": [c.status for c in answer.certificates],
        **_bounds(None if spec is None else build_defense(spec)),
        "environment": environment(),
    }


@functools.cache
def _audits() -> list[Audit]:
    """The test images' audits at every strength of noise, with the weights of the beginning."""
    test = train_and_test("digits", SHAPE)[1]
    images, sigmas = to_range(test.images[:IMAGES], (0.0, 1.0)), sorted({float(s) for s in SIGMAS + SCALES})
    private = DPSGD(CLIP, tuple(map(float, MULTIPLIERS)), steps=EPOCHS)
    told: dict[str, Any] = {"noise": sigmas, "dp_sgd": private}
    return [audit(net(), SHAPE, images=images[k : k + 1], labels=test.labels[k : k + 1], **told) for k in range(IMAGES)]


def _bounds(setting: Setting | None) -> Record:
    """What no unbiased attack exceeds in dB, the estimate with a prior, and epsilon, where the defense has them.

    The Fisher information of an entry is 1 / sigma^2 with Gaussian noise and 1 / scale^2 with Laplacian noise.
    """
    if setting is None or setting.name not in ("gaussian", "laplace", "dp_sgd"):
        return {}
    private = setting.name == "dp_sgd"
    multiplier = setting.values["noise_multiplier"] if private else None
    strength = setting.values["clip"] * multiplier if multiplier else next(iter(setting.values.values()))
    points = [
        next(p for p in found.noise or () if (p.noise_multiplier, p.sigma) == (multiplier, strength))
        for found in _audits()
    ]
    return {
        "psnr_bound": [p.psnr_bound for p in points],
        "psnr_estimate_prior": [p.psnr_estimate_prior for p in points],
        "epsilon": points[0].epsilon,
        "delta": points[0].delta,
    }


def table(records: Sequence[Record]) -> str:
    """Markdown, a row a defense, the last record of it."""
    lines = [
        "| defense | test accuracy % | PSNR dB: mean, highest | SSIM: mean, highest | exact "
        "| unbiased bound dB | estimate with prior dB | epsilon |",
        "|" + "---|" * 8,
    ]
    for r in {r["defense"]: r for r in records}.values():
        exact = sum(status == "exact" for status in r["statuses"])
        epsilon = "-" if r.get("epsilon") is None else f"{r['epsilon']:.3g}"
        cells = [r["defense"] or "none", f"{100 * r['test_accuracy'][-1]:.1f}"]
        cells += [_mean_and_highest(r["psnr"], 1), _mean_and_highest(r["ssim"], 3), f"{exact} of {r['images']}"]
        cells += [_mean(r.get("psnr_bound")), _mean(r.get("psnr_estimate_prior")), epsilon]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_highest(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}, {max(values):.{digits}f}"


def _mean(values: Sequence[float | None] | None) -> str:
    known = [v for v in values or () if v is not None]
    return f"{np.mean(known):.1f}" if known and len(known) == len(values or ()) else "-"


def main(words: Sequence[str]) -> None:
    """Measure every defense that the file lacks, and print the table."""
    parser = asking.Parser(prog="python -m benchmarks accuracy", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/accuracy.jsonl"), metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of records, run nothing")
    given = parser.parse_args(words)
    if given.table is None:
        asking.file_in_folder(given.out)
        held = {r.get("defense") for r in read_records(given.out)}
        for spec in DEFENSES:
            if spec not in held:
                append(given.out, [measure(spec)])
    print(asking.printed(given.table or given.out, table), end="")
