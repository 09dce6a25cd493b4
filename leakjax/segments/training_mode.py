"""Whether a model runs in training mode: batch norm by the very batch's statistics, or random numbers as in dropout.

Two batches that share their first example alone have the same first logits, unless examples mix.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.errors import InputError
from leakjax.models.paths import leaf, owner
from leakjax.models.reader import Model
from leakjax.runtime.programs import keep
from leakjax.segments.pieces import meeting_random
from leakjax.segments.tracing import jaxprs

_TRAINING = (
    "the model's logits of one example depend on the other examples of the batch{idle}: it normalizes with the batch's "
    "own statistics (train-mode batch norm); call model.eval() if the client ran it in evaluation mode"
)
_IDLE = (
    "the logits do not depend on the model's running statistics ({names}): it normalizes with the image's own "
    "(train-mode batch norm); call model.eval() if the client ran it in evaluation mode"
)
_RANDOM = (
    "random numbers meet the data in `{name}` at {location} (dropout in train mode?): they are taken from the model's "
    "own state, and an answer holds for a client that drew the same; call model.eval() if it ran in evaluation mode"
)
_STATISTICS = ("mean", "var", "running_mean", "running_var")


def training_remarks(
    model: Model, input_shape: Sequence[int], dtype: Any, *, normalizes: bool = False
) -> tuple[str, ...]:
    """What a server should know of a model in training mode; () for one that takes each example by itself.

    Arguments: `model` with weights in `dtype`; `input_shape` of one example; `normalizes`, whether the server knows
    that clients normalize by their own statistics, as where they send them: that is no remark then.
    """
    shape = tuple(input_shape)
    graph = _trace(model, shape, dtype)
    drawn = None if graph is None or model.known_keys else meeting_random(graph, graph.dependents([graph.input]))
    remarks = () if drawn is None else (_RANDOM.format(name=drawn.name, location=drawn.location),)
    if normalizes:
        return remarks
    idle = [] if graph is None else _idle_statistics(model, graph)
    if _mixes(model, shape, dtype):
        words = f", and not on its running statistics ({listed(idle)})" if idle else ""
        return (*remarks, _TRAINING.format(idle=words))
    return (*remarks, _IDLE.format(names=listed(idle))) if idle else remarks


def listed(paths: Sequence[str]) -> str:
    """The first four of some paths."""
    return ", ".join(paths[:4]) + (", .." if len(paths) > 4 else "")


def _trace(model: Model, shape: tuple[int, ...], dtype: Any) -> jaxprs.Graph | None:
    x = jax.ShapeDtypeStruct((1, *shape), dtype)
    try:
        return jaxprs.trace_by_path(model.apply, model.variables, x)
    except InputError:
        return None


def _idle_statistics(model: Model, graph: jaxprs.Graph) -> list[str]:
    """Paths of running means and variances that the logits do not depend on, though the module's parameters matter."""
    ids = dict(zip(model.variables, graph.variables, strict=True))
    read = {v for e in graph.needed(graph.output, [*graph.variables, graph.input]) for v in e.inputs if _is_id(v)}

    def called(path: str) -> bool:
        """Whether the module runs, as far as parameters of its own show that."""
        own = [other for other in model.params if owner(other) == owner(path)]
        return not own or any(ids[other] in read for other in own)

    buffers = [path for path in model.buffers if leaf(path) in _STATISTICS]
    return [path for path in buffers if ids[path] not in read and called(path)]


def _is_id(value: Any) -> bool:
    return isinstance(value, int)


def _mixes(model: Model, shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether the logits of example 0 change with example 1; False where the model takes no batch of two."""
    draw = np.random.default_rng(0)
    first, second, other = (draw.uniform(size=shape).astype(dtype) for _ in range(3))
    batches = np.stack([first, second]), np.stack([first, other])
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
