"""`report.json` and `reconstruction.npz`, exactly as other programs read them."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from leakjax.client.observation import Observation
from leakjax.files.whole import write_npz, write_text
from leakjax.metrics import METRICS, psnr
from leakjax.models.losses import loss_name
from leakjax.models.normalization import Limits
from leakjax.reconstruction import Candidate, Certificate, Reconstruction
from leakjax.version import __version__

DETERMINED = 1 - 1e-6


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What a report says of the run itself."""

    model: str
    activation: str | None
    seed: int
    gradient_noise: float | None = None


def build_report(
    run: RunInfo, observation: Observation, result: Reconstruction, truth: np.ndarray | None = None
) -> dict[str, Any]:
    """The object of `report.json`; `truth` (V, H, W, C) on a [0, 1] scale, where it is known."""
    return _finite(
        {
            "leakjax": __version__,
            "model": run.model,
            "activation": run.activation,
            "attack": result.attack,
            "loss": loss_name(observation.loss),
            "dtype": result.dtype,
            "device": str(jax.devices()[0]),
            "seed": run.seed,
            "input_range": list(observation.input_range),
            "input_mean": _listed(observation.input_mean),
            "input_std": _listed(observation.input_std),
            "defense": observation.defense,
            "gradient_noise": run.gradient_noise,
            "weight_decay": observation.weight_decay,
            "local_steps": observation.local_steps,
            "examples": [_example(observation, result, truth, k) for k in range(len(result.images))],
            "remarks": list(result.remarks),
            "seconds": result.seconds,
        }
    )


def _listed(numbers: tuple[float, ...] | None) -> list[float] | None:
    return None if numbers is None else list(numbers)


def unit_scale(images: np.ndarray, limits: Limits) -> np.ndarray:
    """Images from the model's input range, one for all channels or one each, to a [0, 1] scale, unclipped."""
    low, high = limits
    return (np.asarray(images, float) - low) / (high - low)


def write_report(directory: Path, report: Mapping[str, Any], result: Reconstruction) -> None:
    """Write `report.json` and `reconstruction.npz` into a directory."""
    write_text(directory / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    arrays = {"images": result.images, "labels": result.labels, "determined": result.determined}
    write_npz(directory / "reconstruction.npz", arrays)


def _example(observation: Observation, result: Reconstruction, truth: np.ndarray | None, k: int) -> dict[str, Any]:
    image = unit_scale(result.images[k], observation.limits)
    scores: dict[str, Any] = {"psnr": None, "psnr_determined": None, "ssim": None, "mse": None}
    if truth is not None:
        scores = {name: metric(truth[k], image) for name, metric in METRICS.items()}
        scores["psnr_determined"] = psnr(truth[k], image, result.determined[k] > DETERMINED)
    return {
        "label": int(result.labels[k]) if result.labels[k] >= 0 else None,
        "label_source": result.label_sources[k],
        "target": None if result.targets[k] is None else np.asarray(result.targets[k], float).tolist(),
        **{name: scores[name] for name in ("psnr", "psnr_determined", "ssim", "mse")},
        "unseen_pixels": int(result.unseen_pixels[k]),
        "gradient_residual": float(result.gradient_residual[k]),
        "gradient_scale": float(result.gradient_scale[k]),
        "certificate": _certificate(result.certificates[k], result.candidates[k]),
        "layers": [dataclasses.asdict(info) for info in result.layers[k]],
    }


def _certificate(certificate: Certificate, candidates: tuple[Candidate, ...]) -> dict[str, Any]:
    record = dataclasses.asdict(certificate)
    record["candidates"] = [{"label": c.label, "gradient_residual": c.gradient_residual} for c in candidates]
    return record


def _finite(value: Any) -> Any:
    """The same object with every non-finite number replaced by None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
