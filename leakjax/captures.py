"""Captures: an observation on disk as npz arrays and a JSON string. No pickles, never an image."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from leakjax.errors import InputError
from leakjax.losses import LOSSES
from leakjax.model import Model
from leakjax.observation import Observation

_PARTS = ("params", "gradients", "buffers")


def write_capture(observation: Observation, path: Path) -> None:
    """Write `params/<path>`, `gradients/<path>`, `buffers/<path>` and `meta` to one npz file.

    Several victims stand along a leading axis of the gradients, and `meta` counts them.
    """
    single = observation.victims == 1
    meta = {
        "loss": observation.loss,
        "input_shape": list(observation.input_shape),
        "input_range": list(observation.input_range),
        "examples": observation.examples,
        "reduction": "mean",
    }
    if observation.defense is not None:
        meta["defense"] = observation.defense
    if observation.local_steps > 1:
        meta |= {"local_steps": observation.local_steps, "learning_rate": observation.learning_rate}
    if not single:
        meta["victims"] = observation.victims
    arrays = {f"params/{p}": np.asarray(a) for p, a in observation.model.params.items()}
    arrays |= {f"buffers/{p}": np.asarray(a) for p, a in plain_buffers(observation.model.buffers).items()}
    arrays |= {f"gradients/{p}": g[0] if single else g for p, g in observation.gradients.items()}
    np.savez(path, allow_pickle=False, meta=np.asarray(json.dumps(meta)), **arrays)


def read_capture(path: str | Path, model: Model) -> Observation:
    """Read a capture for `model`, whose weights and buffers it replaces.

    Raises `InputError` naming the tensor for anything missing, extra, misshapen, of another dtype or not finite.
    """
    arrays = read_arrays(path, "--capture")
    meta = read_meta(arrays, "--capture")
    parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in _PARTS}
    for key, array in arrays.items():
        part, slash, name = key.partition("/")
        if key == "meta":
            continue
        if part not in parts or not slash:
            raise InputError(f"--capture: unexpected array {key!r}; known: params/, gradients/, buffers/ and meta")
        parts[part][name] = array
    match_arrays("parameter", parts["params"], model.params)
    if not parts["gradients"]:
        raise InputError("--capture: no array under gradients/")
    match_arrays("buffer", parts["buffers"], plain_buffers(model.buffers))
    victims = meta.get("victims")
    for path, g in parts["gradients"].items():
        if victims and g.shape[:1] != (victims,):
            raise InputError(f"--capture: gradient {path!r} has shape {g.shape}; meta says {victims} victims")
    gradients = parts["gradients"] if victims else {p: g[None] for p, g in parts["gradients"].items()}
    return observation_from(meta, model.with_arrays(parts["params"], {**model.buffers, **parts["buffers"]}), gradients)


def observation_from(meta: Mapping[str, Any], model: Model, gradients: Mapping[str, np.ndarray]) -> Observation:
    """The observation that a capture's `meta` and arrays describe; the client's precision is the arrays' own."""
    precision = max((g.dtype for g in gradients.values()), key=lambda d: np.finfo(d).eps if d.kind == "f" else 0)
    return Observation(
        model,
        gradients,
        meta["loss"],
        tuple(int(s) for s in meta["input_shape"]),
        (float(meta["input_range"][0]), float(meta["input_range"][1])),
        int(meta.get("examples", 1)),
        str(precision),
        meta.get("defense"),
        int(meta.get("local_steps", 1)),
        meta.get("learning_rate"),
    )


def read_arrays(path: str | Path, argument: str) -> dict[str, np.ndarray]:
    """All arrays of an npz file; pickles, corrupt and missing files raise `InputError`."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{argument}: {path} is a single array; an npz file is expected")
        with file:
            arrays = {key: file[key] for key in file.files}
        strange = next((key for key, array in arrays.items() if not isinstance(array, np.ndarray)), None)
        if strange is not None:
            raise InputError(f"{argument}: {path}: {strange!r} is not an array")
        return arrays
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{argument}: no such file: {path}") from None
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on damaged files
        reason = "it holds pickled objects" if "pickle" in str(error).lower() else "it is corrupt or no npz file"
        raise InputError(f"{argument}: cannot read {path}: {reason}") from None


def read_meta(arrays: Mapping[str, np.ndarray], argument: str) -> dict[str, Any]:
    """The checked `meta` of a capture: loss, input_shape, input_range, examples."""
    if "meta" not in arrays:
        raise InputError(f"{argument}: array 'meta' (a JSON string) is missing")
    try:
        meta = json.loads(str(arrays["meta"]))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{argument}: meta is not JSON ({error})") from None
    if not isinstance(meta, dict):
        raise InputError(f"{argument}: meta must be a JSON object")
    for key in ("loss", "input_shape", "input_range"):
        if key not in meta:
            raise InputError(f"{argument}: meta lacks {key!r}")
    if not isinstance(meta["loss"], str) or meta["loss"] not in LOSSES:
        raise InputError(f"{argument}: meta's loss {meta['loss']!r} is none of {', '.join(LOSSES)}")
    shape, limits = meta["input_shape"], meta["input_range"]
    if not (isinstance(shape, list) and shape and all(map(_positive_integer, shape))):
        raise InputError(f"{argument}: meta's input_shape must be [H, W, C], got {shape!r}")
    if not (isinstance(limits, list) and len(limits) == 2 and all(map(_finite_number, limits))):
        raise InputError(f"{argument}: meta's input_range must be [low, high], got {limits!r}")
    if not limits[0] < limits[1]:
        raise InputError(f"{argument}: meta's input_range must have low < high, got {limits!r}")
    if meta.get("reduction", "mean") != "mean":
        raise InputError(f"{argument}: meta's reduction must be 'mean', got {meta['reduction']!r}")
    if not isinstance(meta.get("defense"), str | None):
        raise InputError(f"{argument}: meta's defense must be a specification, got {meta['defense']!r}")
    if not (meta.get("learning_rate") is None or _finite_number(meta["learning_rate"])):
        raise InputError(f"{argument}: meta's learning_rate must be a number, got {meta['learning_rate']!r}")
    for key in ("examples", "victims", "local_steps"):
        if key in meta and not _positive_integer(meta[key]):
            raise InputError(f"{argument}: meta's {key} must be a positive integer, got {meta[key]!r}")
    return meta


def _positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def match_arrays(
    kind: str, found: Mapping[str, np.ndarray], expected: Mapping[str, Any], argument: str = "--capture"
) -> None:
    """Refuse arrays that are not exactly those expected: missing, extra, misshapen, of another kind or not finite."""
    for path, array in expected.items():
        if path not in found:
            raise InputError(f"{argument}: {kind} {path!r} is missing")
        if found[path].shape != tuple(array.shape):
            shape = tuple(array.shape)
            raise InputError(f"{argument}: {kind} {path!r} has shape {found[path].shape}, the model's has {shape}")
        if _kind(array.dtype) != _kind(found[path].dtype):
            raise InputError(f"{argument}: {kind} {path!r} has dtype {found[path].dtype}, the model's {array.dtype}")
        if not np.all(np.isfinite(found[path])):
            raise InputError(f"{argument}: {kind} {path!r} holds NaN or infinite entries")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise InputError(f"{argument}: {kind} {extra[0]!r} is not in the model")


def _kind(dtype: Any) -> str:
    kinds = {"floating": jnp.floating, "integer": jnp.integer, "boolean": jnp.bool_}
    return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), "other")


def plain_buffers(buffers: Mapping[str, Any]) -> dict[str, Any]:
    """Buffers that are arrays of numbers (random keys stay with the model)."""
    return {p: a for p, a in buffers.items() if isinstance(getattr(a, "dtype", None), np.dtype)}
