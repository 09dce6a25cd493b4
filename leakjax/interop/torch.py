"""Captures from PyTorch: arrays in PyTorch's layout, matched to a Flax model's layers by order, kind and shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from leakjax.captures import observation_from, read_arrays, read_meta
from leakjax.errors import InputError
from leakjax.model import Model
from leakjax.observation import Observation
from leakjax.segments import Chain, Segment, read_segments

_ARGUMENT = "--torch-capture"


class _Layer(NamedTuple):
    """A module with its tensors by role: kernel, bias, scale (a batch norm's weight)."""

    name: str
    tensors: dict[str, str]
    segment: Segment | None


def read_torch_capture(path: str | Path, model: Model) -> Observation:
    """Read `param/<name>`, `grad/<name>`, `names` (state-dict order) and `meta`, in PyTorch's layout.

    Convolution kernels OIHW become HWIO; dense weights (out, in) over a channel-first flatten become (in, out) over a
    channel-last one. Raises `InputError` naming the first layer that differs from the model's.
    """
    arrays = read_arrays(path, _ARGUMENT)
    meta = read_meta(arrays, _ARGUMENT)
    if "names" not in arrays or arrays["names"].dtype.kind not in "US":
        raise InputError(f"{_ARGUMENT}: array 'names' (the parameters' names in state-dict order) is missing")
    names = [str(n) for n in np.atleast_1d(arrays["names"])]
    for name in names:
        for part in ("param", "grad"):
            if f"{part}/{name}" not in arrays:
                raise InputError(f"{_ARGUMENT}: array '{part}/{name}' is missing")
    chain = read_segments(model.astype(np.float32), meta["input_shape"], np.float32)
    theirs = _torch_layers(names, arrays)
    ours = _flax_layers(chain)
    params, gradients = {}, {}
    for k in range(max(len(theirs), len(ours))):
        if k >= len(theirs) or k >= len(ours):
            side, other = (ours[k].name, "capture") if k >= len(theirs) else (theirs[k].name, "model")
            raise InputError(f"{_ARGUMENT}: layer {side!r} has no counterpart in the {other}")
        a, b = theirs[k], ours[k]
        if a.tensors.keys() != b.tensors.keys():
            raise InputError(
                f"{_ARGUMENT}: layer {a.name!r} has {_list(a.tensors)}, the model's {b.name!r} has {_list(b.tensors)}"
            )
        for role, source in a.tensors.items():
            goal = b.tensors[role]
            shape = tuple(model.params[goal].shape)
            for part, store in (("param", params), ("grad", gradients)):
                store[goal] = _convert(arrays[f"{part}/{source}"], shape, b, chain, f"{part}/{source}")
    missing = sorted(model.params.keys() - params.keys())
    if missing:
        raise InputError(f"{_ARGUMENT}: parameter {missing[0]!r} of the model has no counterpart")
    weights = {p: params[p] for p in model.params}
    return observation_from(meta, model.with_arrays(weights, model.buffers), {p: gradients[p][None] for p in weights})


def _list(roles: Mapping[str, str]) -> str:
    return " and ".join(sorted(roles)) or "nothing"


def _torch_layers(names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> list[_Layer]:
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            raise InputError(f"{_ARGUMENT}: tensor {name!r} is neither a weight nor a bias")
        role = "bias" if leaf == "bias" else "scale" if arrays[f"param/{name}"].ndim == 1 else "kernel"
        layers.setdefault(module, {})[role] = name
    return [_Layer(module, tensors, None) for module, tensors in layers.items()]


def _flax_layers(chain: Chain) -> list[_Layer]:
    layers: dict[str, _Layer] = {}
    for segment in chain.segments:
        for path in segment.paths:
            module, _, leaf = path.rpartition("/")
            layers.setdefault(module, _Layer(module, {}, segment)).tensors[leaf] = path
    return list(layers.values())


def _convert(array: np.ndarray, shape: tuple[int, ...], layer: _Layer, chain: Chain, name: str) -> np.ndarray:
    if array.ndim == 4:
        moved = np.transpose(array, (2, 3, 1, 0))
    elif array.ndim == 2 and len(shape) == 2:
        size = array.shape[1]
        image = _image_before(chain, layer.segment, size)
        if image is not None:
            height, width, channels = image
            array = array.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(-1, size)
        moved = array.T
    else:
        moved = array
    if moved.shape != shape:
        raise InputError(
            f"{_ARGUMENT}: layer {layer.name!r} differs: {name!r} has shape {array.shape} ({moved.shape} in Flax's "
            f"layout), the model's has {shape}"
        )
    return np.ascontiguousarray(moved)


def _image_before(chain: Chain, segment: Segment | None, size: int) -> tuple[int, int, int] | None:
    """(H, W, C) of the feature map that a dense layer of `size` inputs flattens, None where it is flat already."""
    if segment is None:
        return None
    before = chain.segments[: chain.segments.index(segment) + 1]
    for struct in (earlier.input for earlier in reversed(before)):
        if len(struct.shape) == 4 and int(np.prod(struct.shape)) == size:
            _, height, width, channels = struct.shape
            return height, width, channels
    return None
