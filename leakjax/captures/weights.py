"""A model's weights on disk as a capture holds them: npz arrays `params/<path>` and `buffers/<path>`. No pickles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from leakjax.arguments import instance
from leakjax.captures.capture import check_finite, match_arrays, plain_buffers
from leakjax.errors import InputError
from leakjax.files.npz import open_npz
from leakjax.files.whole import write_npz
from leakjax.models.reader import Model


def write_weights(model: Model, path: str | Path) -> None:
    """Write `params/<path>` and `buffers/<path>` of `model` to the npz file `path`."""
    instance("model", model, Model, "from read_model")
    arrays = {f"params/{p}": np.asarray(a) for p, a in model.params.items()}
    arrays |= {f"buffers/{p}": np.asarray(a) for p, a in plain_buffers(model.buffers).items()}
    write_npz(path, arrays)


def read_weights(path: str | Path, model: Model, argument: str = "--weights") -> Model:
    """`model` with the weights in the npz file `path`: of `write_weights`, or a capture, whose gradients are left.

    Raises `InputError` naming the tensor for anything missing, extra, misshapen, of another kind or not finite.
    """
    with open_npz(path, argument) as file:
        for key in file.entries:
            if key != "meta" and key.partition("/")[0] not in ("params", "buffers", "gradients"):
                raise InputError(f"{argument}: unexpected array {key!r}; known: params/ and buffers/")
        known = _by_part(file.entries)
        match_arrays("parameter", known["params"], model.params, argument)
        match_arrays("buffer", known["buffers"], plain_buffers(model.buffers), argument)
        parts = _by_part(file.read([key for key in file.entries if key.partition("/")[0] in known]))
    check_finite("parameter", parts["params"], argument)
    check_finite("buffer", parts["buffers"], argument)
    return model.with_arrays(parts["params"], {**model.buffers, **parts["buffers"]})


def _by_part(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By path: what stands under `params/` and under `buffers/`."""
    parts: dict[str, dict[str, Any]] = {"params": {}, "buffers": {}}
    for key, array in arrays.items():
        part, _, name = key.partition("/")
        if part in parts:
            parts[part][name] = array
    return parts
