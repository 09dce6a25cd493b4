"""A model's weights on disk as a capture holds them: npz arrays `params/<path>` and `buffers/<path>`. No pickles."""

from pathlib import Path

import numpy as np

from leakjax.captures import match_arrays, plain_buffers, read_arrays
from leakjax.errors import InputError
from leakjax.model import Model


def write_weights(model: Model, path: str | Path) -> None:
    """Write `params/<path>` and `buffers/<path>` of `model` to the npz file `path`."""
    arrays = {f"params/{p}": np.asarray(a) for p, a in model.params.items()}
    arrays |= {f"buffers/{p}": np.asarray(a) for p, a in plain_buffers(model.buffers).items()}
    np.savez(path, allow_pickle=False, **arrays)


def read_weights(path: str | Path, model: Model, argument: str = "--weights") -> Model:
    """`model` with the weights in the npz file `path`: of `write_weights`, or a capture, whose gradients are left.

    Raises `InputError` naming the tensor for anything missing, extra, misshapen, of another kind or not finite.
    """
    parts: dict[str, dict[str, np.ndarray]] = {"params": {}, "buffers": {}}
    for key, array in read_arrays(path, argument).items():
        part, _, name = key.partition("/")
        if part in parts:
            parts[part][name] = array
        elif key != "meta" and part != "gradients":
            raise InputError(f"{argument}: unexpected array {key!r}; known: params/ and buffers/")
    match_arrays("parameter", parts["params"], model.params, argument)
    match_arrays("buffer", parts["buffers"], plain_buffers(model.buffers), argument)
    return model.with_arrays(parts["params"], {**model.buffers, **parts["buffers"]})
