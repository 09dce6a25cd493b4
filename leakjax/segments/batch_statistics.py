"""Whether a model normalizes with the statistics of the very batch: train-mode batch norm, found without its names.

Two batches that share their first example alone have the same first logits, unless examples mix.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.errors import InputError
from leakjax.models.reader import Model
from leakjax.runtime.programs import keep
from leakjax.segments.tracing import jaxprs

_TRAINING = (
    "the model's logits of one example depend on the other examples of the batch{idle}: it normalizes with the batch's "
    "own statistics (train-mode batch norm); call model.eval() if the client ran it in evaluation mode"
)
_IDLE = (
    "the logits do not depend on the model's running statistics ({names}): it normalizes with the image's own "
    "(train-mode batch norm); call model.eval() if the client ran it in evaluation mode"
)
_STATISTICS = ("mean", "var")


def batch_remarks(model: Model, input_shape: Sequence[int], dtype: Any) -> tuple[str, ...]:
    """What a server should know of a model in training mode; () for one that takes each example by itself.

    Arguments: `model` with weights in `dtype`; `input_shape` of one example.
    """
    shape = tuple(input_shape)
    idle = _idle_statistics(model, shape, dtype)
    if _mixes(model, shape, dtype):
        words = f", and not on its running statistics ({_listed(idle)})" if idle else ""
        return (_TRAINING.format(idle=words),)
    return (_IDLE.format(names=_listed(idle)),) if idle else ()


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (", .." if len(paths) > 4 else "")


def _idle_statistics(model: Model, shape: tuple[int, ...], dtype: Any) -> list[str]:
    """Paths of running means and variances that the logits do not depend on."""
    buffers = [path for path in model.buffers if path.rpartition("/")[2] in _STATISTICS]
    if not buffers:
        return []
    paths, arrays = list(model.variables), list(model.variables.values())
    x = jax.ShapeDtypeStruct((1, *shape), dtype)
    try:
        graph = jaxprs.trace(lambda leaves, x: model.apply(dict(zip(paths, leaves, strict=True)), x), arrays, x)
    except InputError:
        return []
    ids = dict(zip(paths, graph.variables, strict=True))
    read = {v for e in graph.needed(graph.output, [*graph.variables, graph.input]) for v in e.inputs if _is_id(v)}
    return [path for path in buffers if ids[path] not in read]


def _is_id(value: Any) -> bool:
    return isinstance(value, int)


def _mixes(model: Model, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether the logits of example 0 change with example 1; False where the model takes no batch of two."""
    draw = np.random.default_rng(0)
    first, second, other = (jnp.asarray(draw.uniform(size=shape), dtype) for _ in range(3))
    batches = (jnp.stack([first, second]), jnp.stack([first, other]))
    try:
        a, b = (np.asarray(_run(model.apply)(dict(model.variables), x), float) for x in batches)
    except Exception:  # a model of its own batch size
        return False
    if a.ndim != 2 or len(a) != 2 or not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return False
    return bool(np.max(np.abs(a[0] - b[0])) > np.sqrt(float(jnp.finfo(dtype).eps)) * np.max(np.abs(a)))


@keep(32)
def _run(apply: Any) -> Any:
    return jax.jit(lambda variables, x: apply(variables, x))
