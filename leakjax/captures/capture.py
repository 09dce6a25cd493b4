"""Captures: an observation on disk as npz arrays and a JSON string. No pickles, never an image."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from leakjax.arguments import LARGEST, MOST, instance
from leakjax.client.factors import check_factor, factors_of, known_factors
from leakjax.client.observation import REDUCTIONS, Observation
from leakjax.errors import InputError
from leakjax.files.npz import Npz, open_npz
from leakjax.files.whole import write_npz
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.normalization import check_normalization, hull, spread
from leakjax.models.reader import Model, output_count
from leakjax.models.targets import KINDS

_PARTS = ("params", "gradients", "buffers", "new_buffers")

CUSTOM_LOSS = "custom"
"""What `meta` says of a loss that is a function: whoever reads the capture must have it."""


def write_capture(observation: Observation, path: Path) -> None:
    """Write `params/<path>`, `gradients/<path>`, `buffers/<path>`, `new_buffers/<path>` and `meta` to one npz file.

    Several victims stand along a leading axis of the gradients and new buffers, and `meta` counts them.
    """
    instance("observation", observation, Observation, "from observe")
    single = observation.victims == 1
    meta = {
        "loss": observation.loss if isinstance(observation.loss, str) else CUSTOM_LOSS,
        "input_shape": list(observation.input_shape),
        "input_range": list(observation.input_range),
        "examples": observation.examples,
        "reduction": observation.reduction,
    }
    if observation.defense is not None:
        meta["defense"] = observation.defense
    if observation.local_steps > 1:
        meta |= {"local_steps": observation.local_steps, "learning_rate": observation.learning_rate}
    if observation.weight_decay:
        meta["weight_decay"] = observation.weight_decay
    if observation.input_mean is not None and observation.input_std is not None:
        meta |= {"input_mean": list(observation.input_mean), "input_std": list(observation.input_std)}
    factors = set(known_factors(observation.gradients, observation.factors, None))
    if len(factors) == 1 and None not in factors and not (observation.target == "class" and _with_bias(observation)):
        meta["gradient_scale"] = factors.pop()
    if not single:
        meta["victims"] = observation.victims
    if observation.target != "class":
        meta |= {"target": observation.target, "target_shape": list(observation.target_shape)}
    arrays = {f"params/{p}": np.asarray(a) for p, a in observation.model.params.items()}
    arrays |= {f"buffers/{p}": np.asarray(a) for p, a in plain_buffers(observation.model.buffers).items()}
    arrays |= {f"gradients/{p}": g[0] if single else g for p, g in observation.gradients.items()}
    arrays |= {f"new_buffers/{p}": a[0] if single else a for p, a in observation.buffers.items()}
    write_npz(path, {"meta": np.asarray(json.dumps(meta)), **arrays})


def _with_bias(observation: Observation) -> bool:
    """Whether some parameter can be a bias of the logits, which shows the factor of a gradient of classes."""
    outputs = output_count(observation.model, observation.input_shape)
    if outputs == 1:  # many a parameter is one number
        return False
    return any(a.shape == (outputs,) for a in observation.model.params.values())


def read_capture(path: str | Path, model: Model, *, loss: LossSpec | None = None) -> Observation:
    """Read a capture for `model`, whose weights and buffers it replaces.

    Arguments: `loss`, the client's, in place of the one that the capture names; needed where that is a function, of
    which a file holds no code.

    Raises `InputError` naming the tensor for anything missing, extra, misshapen, of another dtype or not finite.
    """
    instance("model", model, Model, "from read_model")
    with open_npz(path, "--capture") as file:
        meta = read_meta(file, "--capture", loss)
        output_count(model, tuple(meta["input_shape"]))  # refuses a model that cannot run at this shape
        victims = meta.get("victims")
        known = _by_part(file.entries)
        match_arrays("parameter", known["params"], model.params)
        match_arrays("buffer", known["buffers"], plain_buffers(model.buffers))
        _match_gradients(known["gradients"], model, victims)
        parts = _by_part(file.read([key for key in file.entries if key != "meta"]))
    check_finite("parameter", parts["params"])
    check_finite("buffer", parts["buffers"])
    gradients, new = (
        parts[part] if victims else {p: a[None] for p, a in parts[part].items()}
        for part in ("gradients", "new_buffers")
    )
    began = model.with_arrays(parts["params"], {**model.buffers, **parts["buffers"]})
    return dataclasses.replace(observation_from(meta, began, gradients), buffers=new)


def _by_part(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By part, by path: what stands under each of `_PARTS`."""
    parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for key, array in arrays.items():
        part, slash, name = key.partition("/")
        if key == "meta":
            continue
        if part not in parts or not slash:
            raise InputError(
                f"--capture: unexpected array {key!r}; known: params/, gradients/, buffers/, new_buffers/ and meta"
            )
        parts[part][name] = array
    return parts


def _match_gradients(found: Mapping[str, Any], model: Model, victims: int | None) -> None:
    """Refuse gradients that are not one a parameter, of its shape behind the victims' axis, and floating."""
    if not found:
        raise InputError("--capture: no array under gradients/")
    for path in model.params:
        if path not in found:
            raise InputError(
                f"--capture: gradient of {path!r} is missing; the model has {len(model.params)} parameters"
            )
    for path, g in found.items():
        if path not in model.params:
            raise InputError(f"--capture: gradient {path!r} belongs to no parameter of the model")
        if victims and g.shape[:1] != (victims,):
            raise InputError(f"--capture: gradient {path!r} has shape {g.shape}; meta says {victims} victims")
        shape, own = tuple(model.params[path].shape), g.shape[1:] if victims else g.shape
        if own != shape:
            raise InputError(f"--capture: gradient of {path!r} has shape {own}, its parameter {shape}")
        if g.dtype.kind != "f":
            raise InputError(f"--capture: gradient of {path!r} has dtype {g.dtype}; floating point expected")


def observation_from(meta: Mapping[str, Any], model: Model, gradients: Mapping[str, np.ndarray]) -> Observation:
    """The observation that a capture's `meta` and arrays describe; the client's precision is the arrays' own."""
    mean, std = _normalization(meta)
    between = meta["input_range"] if mean is None or "input_range" in meta else hull(mean, std)
    precision = max((g.dtype for g in gradients.values()), key=lambda d: np.finfo(d).eps if d.kind == "f" else 0)
    return Observation(
        model=model,
        gradients=gradients,
        loss=meta["loss"],
        input_shape=tuple(int(s) for s in meta["input_shape"]),
        input_range=(float(between[0]), float(between[1])),
        examples=int(meta.get("examples", 1)),
        precision=str(precision),
        defense=meta.get("defense"),
        local_steps=int(meta.get("local_steps", 1)),
        learning_rate=meta.get("learning_rate"),
        weight_decay=float(meta.get("weight_decay", 0.0)),
        input_mean=mean,
        input_std=std,
        factors=factors_of(gradients, meta.get("gradient_scale")),
        reduction=meta.get("reduction", "mean"),
        target=meta.get("target", "class"),
        target_shape=tuple(meta.get("target_shape", ())),
    )


def _normalization(meta: Mapping[str, Any], prefix: str = "") -> tuple[Any, Any]:
    """(mean, std) by channel, or (None, None)."""
    names = f"{prefix}input_mean", f"{prefix}input_std"
    mean, std = check_normalization(meta.get("input_mean"), meta.get("input_std"), names)
    if mean is None:
        return None, None
    channels = int(meta["input_shape"][-1])
    return spread(mean, channels, names), spread(std, channels, names)


def read_meta(file: Npz, argument: str, loss: LossSpec | None = None) -> dict[str, Any]:
    """The checked `meta` of a capture: loss (the given one, where there is one), input_shape, input_range, examples."""
    if "meta" not in file.entries:
        raise InputError(f"{argument}: array 'meta' (a JSON string) is missing")
    try:
        meta = json.loads(str(file.text("meta")))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{argument}: meta is not JSON ({error})") from None
    if not isinstance(meta, dict):
        raise InputError(f"{argument}: meta must be a JSON object")
    told = "input_mean" in meta or "input_std" in meta
    for key in ("loss", "input_shape", "input_range"):
        if key not in meta and not (key == "input_range" and told):
            raise InputError(f"{argument}: meta lacks {key!r}")
    meta["loss"] = _loss(meta["loss"], argument, loss)
    if meta.get("target", "class") not in KINDS:
        raise InputError(f"{argument}: meta's target must be one of {', '.join(KINDS)}, got {meta['target']!r}")
    extents = meta.get("target_shape", [])
    if not (isinstance(extents, list) and len(extents) < 10 and all(map(_positive_integer, extents))):
        raise InputError(f"{argument}: meta's target_shape must be a list of sizes, got {extents!r}")
    shape, limits = meta["input_shape"], meta.get("input_range", [0, 1])
    if not (isinstance(shape, list) and 0 < len(shape) < 10 and all(map(_positive_integer, shape))):
        raise InputError(f"{argument}: meta's input_shape must be [H, W, C], got {shape!r}")
    if not (isinstance(limits, list) and len(limits) == 2 and all(map(_finite_number, limits))):
        raise InputError(f"{argument}: meta's input_range must be [low, high], got {limits!r}")
    if not limits[0] < limits[1]:
        raise InputError(f"{argument}: meta's input_range must have low < high, got {limits!r}")
    _normalization(meta, f"{argument}: meta's ")
    if meta.get("reduction", "mean") not in REDUCTIONS:
        raise InputError(f"{argument}: meta's reduction must be 'mean' or 'sum', got {meta['reduction']!r}")
    if not isinstance(meta.get("defense"), str | None):
        raise InputError(f"{argument}: meta's defense must be a specification, got {meta['defense']!r}")
    if not (meta.get("learning_rate") is None or _finite_number(meta["learning_rate"])):
        raise InputError(f"{argument}: meta's learning_rate must be a number, got {meta['learning_rate']!r}")
    if not _finite_number(meta.get("weight_decay", 0.0)):
        raise InputError(f"{argument}: meta's weight_decay must be a number, got {meta['weight_decay']!r}")
    check_factor(f"{argument}: meta's gradient_scale", meta.get("gradient_scale"))
    for key in ("examples", "victims", "local_steps"):
        if key in meta and not _positive_integer(meta[key]):
            raise InputError(f"{argument}: meta's {key} must be a positive integer, got {meta[key]!r}")
    return meta


def _loss(named: Any, argument: str, given: LossSpec | None) -> LossSpec:
    if given is not None:
        read_loss(given)
        return given
    if named == CUSTOM_LOSS:
        raise InputError(
            f"{argument}: its loss is a function that the file does not hold; give it (loss, --loss "
            'package.module:function), or say that it is not known ("unknown")'
        )
    if not isinstance(named, str):
        raise InputError(f"{argument}: meta's loss must be a name, got {named!r}")
    try:
        read_loss(named)
    except InputError as error:
        raise InputError(f"{argument}: meta's {error}") from None
    return named


def _positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def _finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def match_arrays(kind: str, found: Mapping[str, Any], expected: Mapping[str, Any], argument: str = "--capture") -> None:
    """Refuse arrays, read or not yet, that are not exactly those expected: missing, extra, misshapen, another kind."""
    for path, array in expected.items():
        if path not in found:
            raise InputError(f"{argument}: {kind} {path!r} is missing")
        if found[path].shape != tuple(array.shape):
            shape = tuple(array.shape)
            raise InputError(f"{argument}: {kind} {path!r} has shape {found[path].shape}, the model's has {shape}")
        if _kind(array.dtype) != _kind(found[path].dtype):
            raise InputError(f"{argument}: {kind} {path!r} has dtype {found[path].dtype}, the model's {array.dtype}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise InputError(f"{argument}: {kind} {extra[0]!r} is not in the model")


def check_finite(kind: str, arrays: Mapping[str, np.ndarray], argument: str = "--capture") -> None:
    """Refuse arrays with entries that are NaN or infinite."""
    for path, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise InputError(f"{argument}: {kind} {path!r} holds NaN or infinite entries")


def _kind(dtype: Any) -> str:
    kinds = {"floating": jnp.floating, "integer": jnp.integer, "boolean": jnp.bool_}
    return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), "other")


def plain_buffers(buffers: Mapping[str, Any]) -> dict[str, Any]:
    """Buffers that are arrays of numbers (random keys stay with the model)."""
    return {p: a for p, a in buffers.items() if isinstance(getattr(a, "dtype", None), np.dtype)}
