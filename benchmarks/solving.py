"""From the cases of one group to their records: one observation, one inversion, then the truth joins."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import leakjax
from benchmarks.cases import MAP, Case
from benchmarks.nets import build_net, net_spec
from benchmarks.pictures import load_pictures
from benchmarks.records import Record, environment
from leakjax.datasets import Images, luminance_maps, to_range
from leakjax.metrics import psnr, ssim
from leakjax.models.zoo import ModelSpec
from leakjax.report.pairing import pair_with_truth
from leakjax.report.reconstruction.record import DETERMINED, unit_scale

_MESSAGE = 300


def read_net(case: Case) -> leakjax.Model:
    """The model of a case, as the library reads it."""
    train = None if case.train is None else True
    return leakjax.read_model(build_net(case.model, case.seed, case.activation), train=train)


def solve(cases: Sequence[Case], model: leakjax.Model, devices: Sequence[Any] | None = None) -> list[Record]:
    """The records of whole gradients' cases of one group; a failure is a record too."""
    named = [{"key": case.key, **case.fields} for case in cases]
    try:
        found = _solve(cases, model, devices)
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"[:_MESSAGE]
        found = [{"failed": failed}] * len(cases)
    around = environment()
    return [{**name, **record, "environment": around} for name, record in zip(named, found, strict=True)]


def _solve(cases: Sequence[Case], model: leakjax.Model, devices: Sequence[Any] | None) -> list[Record]:
    case, spec = cases[0], net_spec(cases[0].model)
    data = load_pictures(case.dataset, [c.index for c in cases], spec.input_shape)
    labels = _labels(spec, data)
    observation = _observe(cases, model, Images(data.images, labels))
    told: dict[str, Any] = {} if devices is None else {"devices": devices}
    told |= dict(case.options)
    if told.get("labels") == MAP:
        told["labels"] = labels
    begun, cpu = time.perf_counter(), time.process_time()
    answer = leakjax.invert(observation, attack=case.attack, **told)  # pyright: ignore
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    compiling = answer.seconds["trace"] + answer.seconds["compile"]
    seconds = {name: answer.seconds[name] / len(cases) for name in ("trace", "compile", "solve")}
    seconds |= {"wall": wall / len(cases), "together": len(cases)}
    pictures = unit_scale(answer.images, spec.input_range)
    truth = pair_with_truth(data.images / 255.0, pictures, case.batch)
    records = []
    for k in range(len(cases)):
        gradient = slice(k // case.batch * case.batch, (k // case.batch + 1) * case.batch)
        candidates = [unit_scale(c.image, spec.input_range) for c in answer.candidates[k]]
        certificate = answer.certificates[k]
        records.append(
            {
                **dataclasses.asdict(certificate),
                "unseen_pixels": int(answer.unseen_pixels[k]),
                "psnr": psnr(truth[k], pictures[k]),
                "psnr_determined": psnr(truth[k], pictures[k], answer.determined[k] > DETERMINED),
                "psnr_best_candidate": max((psnr(truth[k], c) or -np.inf for c in candidates), default=None),
                "ssim": ssim(truth[k], pictures[k]),
                "labels_right": _found(answer, gradient) == sorted(labels[gradient].tolist()),
                "gradient_residual": float(answer.gradient_residual[k]),
                "seconds": seconds,
                "cpu_seconds": (cpu - compiling) / len(cases) if cpu > compiling else None,
            }
        )
    return records


def _found(answer: leakjax.Reconstruction, gradient: slice) -> list[Any]:
    """The labels or label maps of a gradient's examples, in one order."""
    pairs = zip(answer.labels[gradient].tolist(), answer.targets[gradient], strict=True)
    return sorted(label if target is None else np.asarray(target).tolist() for label, target in pairs)


def _labels(spec: ModelSpec, data: Images) -> np.ndarray:
    """What the loss compares with: the data's labels (N,), or label maps (N, H, W) of the images' luminance."""
    if spec.maps:
        return luminance_maps(data.images, spec.outputs)
    return data.labels % 2 if spec.outputs == 1 else data.labels


def _observe(cases: Sequence[Case], model: leakjax.Model, data: Images) -> leakjax.Observation:
    """What the clients of the cases send; what a defense draws depends on the image, not on the company."""
    case, spec = cases[0], net_spec(cases[0].model)
    told: dict[str, Any] = {"loss": spec.loss, "input_range": spec.input_range, "dtype": case.dtype}
    told |= {"batch_size": case.batch}
    if case.local_steps != 1:
        told |= {"local_steps": case.local_steps}
    if case.train is not None:
        told |= {"buffers": case.train == "sent"}
    if case.learning_rate is not None:
        told |= {"learning_rate": case.learning_rate}
    images = to_range(data.images, spec.input_range)
    if case.defense is None:
        return leakjax.observe(model, (images, data.labels), **told)
    alone = []
    for k in range(0, len(cases), case.batch):
        batch = images[k : k + case.batch], data.labels[k : k + case.batch]
        seed = 1000 * case.seed + cases[k].index
        alone.append(leakjax.observe(model, batch, defense=case.defense, seed=seed, **told))
    joined = {
        name: {p: np.concatenate([getattr(o, name)[p] for o in alone]) for p in getattr(alone[0], name)}
        for name in ("gradients", "buffers")
    }
    return dataclasses.replace(alone[0], **joined)
