"""Captures from PyTorch for the very module that made them: every array by its name in `state_dict`, as it is."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from leakjax.captures.capture import check_finite, match_arrays, observation_from, plain_buffers
from leakjax.client.observation import Observation
from leakjax.errors import InputError
from leakjax.files.npz import Npz
from leakjax.models.paths import leaf
from leakjax.models.reader import Model, output_count

_PARTS = ("param", "grad", "new_buffers")
_STATISTICS = ("running_mean", "running_var")


def named_after_a_module(file: Npz, model: Model) -> bool:
    """Whether the arrays have names of the model's parameters: it was read from a PyTorch module."""
    return any(f"param/{name}" in file.entries for name in model.params)


def read_by_name(file: Npz, meta: Mapping[str, Any], model: Model, argument: str) -> Observation:
    """The observation of `param/<name>`, `grad/<name>` and, where the client sent them, `new_buffers/<name>`.

    Buffers that `state_dict` leaves out keep the module's own values.
    Raises `InputError` naming the first array that is missing, extra, misshapen, of another dtype or not finite.
    """
    output_count(model, tuple(meta["input_shape"]))  # refuses a model that cannot run at this shape
    entries: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for key, entry in file.entries.items():
        part, slash, name = key.partition("/")
        if slash and part in entries:
            entries[part][name] = entry
        elif key not in ("names", "meta"):
            known = "param/, grad/, new_buffers/, names and meta"
            raise InputError(f"{argument}: unexpected array {key!r}; known: {known}")
    own = plain_buffers(model.buffers)
    held = {name: a for name, a in own.items() if name in entries["param"] or leaf(name) in _STATISTICS}
    match_arrays("parameter", entries["param"], {**model.params, **held}, argument)
    match_arrays("gradient", {n: e for n, e in entries["grad"].items() if n not in own}, model.params, argument)
    sent = entries["new_buffers"]
    match_arrays("new buffer", sent, {name: own[name] for name in sent if name in own}, argument)
    arrays = file.read([key for key in file.entries if "/" in key])
    check_finite("array", arrays, argument)
    params = {name: arrays[f"param/{name}"] for name in model.params}
    buffers = {name: arrays.get(f"param/{name}", buffer) for name, buffer in model.buffers.items()}
    gradients = {name: arrays[f"grad/{name}"][None] for name in model.params}
    new = {name: np.asarray(arrays[f"new_buffers/{name}"])[None] for name in sent}
    found = observation_from(meta, model.with_arrays(params, buffers), gradients)
    return dataclasses.replace(found, buffers=new)
