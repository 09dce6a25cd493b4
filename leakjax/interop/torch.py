"""Captures from PyTorch: arrays in PyTorch's layout, matched to a Flax model's layers by order, kind and shape."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from leakjax.arguments import instance
from leakjax.captures.capture import observation_from, read_meta
from leakjax.client.observation import Observation
from leakjax.errors import InputError
from leakjax.files.npz import Entry, Npz, open_npz
from leakjax.interop.by_name import named_after_a_module, read_by_name
from leakjax.interop.layout import Layout
from leakjax.interop.modules import from_module
from leakjax.models.losses import LossSpec
from leakjax.models.reader import Model, output_count
from leakjax.segments.chain import Chain, read_segments

__all__ = ["from_module", "read_torch_capture"]

_ARGUMENT = "--torch-capture"
_STATISTICS = {"running_mean": "mean", "running_var": "var"}  # of a batch norm: buffers, without gradients
_COUNTER = "num_batches_tracked"


class _Layer(NamedTuple):
    """A module with its tensors by role: kernel, bias, scale (a batch norm's weight), mean, var."""

    name: str
    tensors: dict[str, str]


def read_torch_capture(path: str | Path, model: Model, *, loss: LossSpec | None = None) -> Observation:
    """Read `param/<name>`, `grad/<name>`, `names` (state-dict order) and `meta`, in PyTorch's layout.

    Convolution kernels OIHW become HWIO; dense weights (out, in) over a channel-first flatten become (in, out) in the
    order in which the model flattens. A batch norm's running statistics are parameters without `grad/`. `loss`, where
    it is given, stands in place of the one that the capture names.

    A `model` of `from_module` takes the arrays by their names, as they are, and `new_buffers/<name>`, the running
    statistics that the client sent with its gradient.

    Raises `InputError` naming the first layer, or the first name, that differs from the model's.
    """
    instance("model", model, Model, "from read_model")
    with open_npz(path, _ARGUMENT) as file:
        meta = read_meta(file, _ARGUMENT, loss)
        if named_after_a_module(file, model):
            return read_by_name(file, meta, model, _ARGUMENT)
        names = _names(file)
        shape = tuple(meta["input_shape"])
        model = model.astype(np.float32)
        output_count(model, shape)  # refuses a model that cannot run at this shape
        layout = Layout(model, shape, np.float32, _ARGUMENT)
        layers = _torch_layers(names, file.entries), _flax_layers(read_segments(model, shape, np.float32), model)
        keys = [key for key in file.entries if key.partition("/")[2] in names]
        _converted(*layers, {key: _unread(file.entries[key]) for key in keys}, model, layout)
        arrays = file.read(keys)
    for key, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise InputError(f"{_ARGUMENT}: array {key!r} holds NaN or infinite entries")
    weights, gradients = _converted(*layers, arrays, model, layout)
    params = {path: weights[path] for path in model.params}
    buffers = {path: weights.get(path, buffer) for path, buffer in model.buffers.items()}
    found = observation_from(meta, model.with_arrays(params, buffers), {path: gradients[path] for path in params})
    return dataclasses.replace(found, interchangeable=_interchangeable(layers[1], model, layout))


def _interchangeable(layers: Sequence[_Layer], model: Model, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """Groups of layers whose tensors have one shape and stand in one order: their modules could be exchanged."""
    groups: dict[Any, list[str]] = {}
    for layer in layers:
        shapes = {role: tuple(model.variables[path].shape) for role, path in layer.tensors.items()}
        orders = {role: layout.order(path) for role, path in layer.tensors.items() if path in model.params}
        flattened = sorted((role, order.tobytes()) for role, order in orders.items() if order is not None)
        groups.setdefault((*sorted(shapes.items()), *flattened), []).append(layer.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _unread(entry: Entry) -> np.ndarray:
    """An array of the entry's shape that takes no memory, to see whether it fits."""
    return np.broadcast_to(np.zeros((), np.float32), entry.shape)


def _converted(
    theirs: Sequence[_Layer], ours: Sequence[_Layer], arrays: Mapping[str, np.ndarray], model: Model, layout: Layout
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The model's weights and gradients by path, layer by layer; the first layer that differs is refused."""
    weights, gradients = {}, {}
    for a, b in zip(theirs, ours, strict=False):
        if a.tensors.keys() != b.tensors.keys():
            raise InputError(
                f"{_ARGUMENT}: layer {a.name!r} has {_list(a.tensors)}, the model's {b.name!r} has {_list(b.tensors)}"
            )
        for role, source in a.tensors.items():
            goal = b.tensors[role]
            weights[goal] = _convert(arrays[f"param/{source}"], b, role, model, layout, a.name)
            if goal in model.params:
                gradients[goal] = _convert(arrays[f"grad/{source}"], b, role, model, layout, a.name)[None]
    if len(theirs) != len(ours):
        extra, other = (theirs[len(ours) :], "model") if len(theirs) > len(ours) else (ours[len(theirs) :], "capture")
        raise InputError(f"{_ARGUMENT}: layer {extra[0].name!r} has no counterpart in the {other}")
    missing = sorted(model.params.keys() - weights.keys())
    if missing:
        raise InputError(f"{_ARGUMENT}: parameter {missing[0]!r} of the model has no counterpart")
    return weights, gradients


def _names(file: Npz) -> list[str]:
    """The checked names: each has its arrays, floating and of one shape, and no array is left over."""
    arrays = file.entries
    if "names" not in arrays or arrays["names"].dtype.kind not in "US":
        raise InputError(f"{_ARGUMENT}: array 'names' (the parameters' names in state-dict order) is missing")
    try:
        given = np.atleast_1d(file.text("names")).ravel().astype(str)
    except UnicodeDecodeError:
        raise InputError(f"{_ARGUMENT}: array 'names' is not text in ASCII; write it as a unicode array") from None
    names = [str(n) for n in given if not n.endswith(_COUNTER)]
    for name in names:
        parts = ("param",) if name.rpartition(".")[2] in _STATISTICS else ("param", "grad")
        for key in (f"{part}/{name}" for part in parts):
            if key not in arrays:
                raise InputError(f"{_ARGUMENT}: array {key!r} is missing")
            if arrays[key].dtype.kind != "f":
                raise InputError(f"{_ARGUMENT}: array {key!r} has dtype {arrays[key].dtype}; floating point expected")
        if len({arrays[f"{part}/{name}"].shape for part in parts}) > 1:
            wrong, right = arrays[f"grad/{name}"].shape, arrays[f"param/{name}"].shape
            raise InputError(f"{_ARGUMENT}: array 'grad/{name}' has shape {wrong}, its parameter {right}")
    for key in arrays:
        part, _, name = key.partition("/")
        known = part in ("param", "grad") and (name in names or name.endswith(_COUNTER))
        if not known and key not in ("names", "meta"):
            raise InputError(f"{_ARGUMENT}: array {key!r} is in the file but not in 'names'")
    return names


def _list(roles: Mapping[str, str]) -> str:
    return " and ".join(sorted(roles)) or "nothing"


def _torch_layers(names: Sequence[str], arrays: Mapping[str, Entry]) -> list[_Layer]:
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias", *_STATISTICS):
            raise InputError(f"{_ARGUMENT}: tensor {name!r} is neither a weight nor a bias")
        weight = "scale" if len(arrays[f"param/{name}"].shape) == 1 else "kernel"
        role = weight if leaf == "weight" else _STATISTICS.get(leaf, leaf)
        tensors = layers.setdefault(module, {})
        if role in tensors:
            raise InputError(f"{_ARGUMENT}: tensor {name!r} stands twice in 'names'")
        tensors[role] = name
    return [_Layer(module, tensors) for module, tensors in layers.items()]


def _flax_layers(chain: Chain, model: Model) -> list[_Layer]:
    layers: dict[str, _Layer] = {}
    for path in (path for segment in chain.segments for path in segment.paths):
        module, _, leaf = path.rpartition("/")
        layers.setdefault(module, _Layer(module, {})).tensors[leaf] = path
    for path, buffer in model.buffers.items():
        module, _, leaf = path.removeprefix("batch_stats/").rpartition("/")
        if module in layers and leaf in _STATISTICS.values():
            layers[module].tensors[leaf] = path
        elif jnp.issubdtype(getattr(buffer, "dtype", bool), jnp.floating):
            raise InputError(f"{_ARGUMENT}: buffer {path!r} of the model has no counterpart in PyTorch")
    return list(layers.values())


def _convert(array: np.ndarray, layer: _Layer, role: str, model: Model, layout: Layout, theirs: str) -> np.ndarray:
    """One tensor, or its gradient, in the layout of the model's tensor of that role."""
    path = layer.tensors[role]
    shape = tuple(model.variables[path].shape)
    kernel = array.ndim >= 2
    moved = np.transpose(array, (*range(2, array.ndim), 1, 0)) if kernel else array
    if moved.shape != shape:
        raise InputError(
            f"{_ARGUMENT}: layer {theirs!r} differs from the model's {layer.name!r}: its {role} has shape {array.shape}"
            f"{f' ({moved.shape} in Flax layout)' if kernel else ''}, the model's has {shape}"
        )
    if array.ndim == 2 and not layout.dense_kernel(path):
        raise InputError(f"{_ARGUMENT}: parameter {path!r} is no (inputs, outputs) kernel of a dense layer")
    order = layout.order(path)
    if order is not None and len(order) == len(moved):
        moved = moved[order]
    return np.ascontiguousarray(moved)
