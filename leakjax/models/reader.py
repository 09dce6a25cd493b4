"""A model as a pure function of named arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from leakjax.errors import InputError, cannot_run, first_line
from leakjax.models.calls import PLAIN, Path, listed, read_call
from leakjax.models.families import Parts, take_apart
from leakjax.runtime.arrays import to_device

Arrays = Mapping[str, Shaped[Array | np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """logits = apply(variables, x), with `variables` = `params` (they have gradients) and `buffers` (they have none).

    Both are flat mappings from a path ("conv1/kernel") to an array. `x` has a leading batch axis. Models of one
    architecture share one `apply`. `known_keys`: whether the random numbers of a call, if it draws any, are known.
    `step(variables, x)` returns the logits and what the call leaves in the buffers, by path; None without buffers.
    """

    apply: Callable[[Arrays, Any], Any]
    params: Arrays
    buffers: Arrays
    known_keys: bool = False
    step: Callable[[Arrays, Any], tuple[Any, Arrays]] | None = None

    def __post_init__(self) -> None:
        if not (callable(self.apply) and isinstance(self.params, Mapping) and isinstance(self.buffers, Mapping)):
            raise InputError("Model takes a function and two mappings of arrays by path; read_model makes one")

    @property
    def variables(self) -> Arrays:
        """All arrays of the model by path."""
        return {**self.params, **self.buffers}

    @property
    def structs(self) -> tuple[tuple[str, tuple[int, ...], Any], ...]:
        """(path, shape, dtype) of every array: what programs of an architecture depend on."""
        return tuple((path, tuple(a.shape), a.dtype) for path, a in self.variables.items())

    def astype(self, dtype: Any) -> "Model":
        """The same model with every floating array cast to `dtype`."""
        return dataclasses.replace(self, params=_cast(self.params, dtype), buffers=_cast(self.buffers, dtype))

    def with_arrays(self, params: Arrays, buffers: Arrays) -> "Model":
        """The same architecture with other weights."""
        return dataclasses.replace(self, params=params, buffers=buffers)


def read_model(
    model: Any,
    params: Any = None,
    *,
    call: Mapping[str, Any] | None = None,
    rngs: Mapping[str, int] | int | None = None,
    output: Path | None = None,
    layout: str = "NHWC",
    train: bool | None = None,
) -> Model:
    """Read a model as published: Flax, Equinox, Haiku, or a plain function.

    Arguments:
    - `model`: an `nnx.Module`; a pair (linen module, variables); one of transformers' Flax classes; an
      `equinox.Module`, or a pair (module, state); a pair (Haiku transform, params), or (transform, (params, state));
      a pair (apply_fn, params); or, with `params` given, the first of such a pair itself. `x` has a leading batch axis;
      an Equinox module takes one example, and is vmapped;
    - `call`: keyword arguments beside x, as {"train": False};
    - `rngs`: seeds of the random streams, by name ({"dropout": 0}), or one for all: what a model draws is then known,
      and part of what a server sees;
    - `output`: which output counts where the model returns several: an index, a name, or a path of both;
    - `layout`: "NCHW" for a model that takes channels before rows and columns; images stay (N, H, W, C);
    - `train`: whether the model runs in training mode: `train()` or `eval()` of an nnx module, `inference_mode` of
      Equinox, else the argument `train`, `training`, `is_training`, `deterministic` or `use_running_average` of the
      call; None for the model as it is.

    Raises `InputError` where it is none of these.
    """
    how = read_call(call, rngs, output, layout, train)
    if isinstance(model, Model):
        if how != PLAIN:
            raise InputError(
                "call, rngs, output, layout and train go with a model as published, not with one read before"
            )
        return model
    if isinstance(model, tuple) and type(model) is tuple and len(model) == 2 and params is None:
        model, params = model
    return from_parts(take_apart(model, params, how), known_keys=how.known_keys)


def from_parts(parts: Parts, *, known_keys: bool) -> Model:
    """The model of a function of trees, as one of arrays by path; see `Model`."""
    flat_params, params_tree = _flatten(parts.params)
    flat_buffers, buffers_tree = _flatten(parts.buffers)
    if not flat_params:
        raise InputError("model has no parameters, hence no gradient to invert")
    for path, leaf in flat_params.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"parameter {path!r} has dtype {leaf.dtype}; only floating point has gradients")
    clash = flat_params.keys() & flat_buffers.keys()
    if clash:
        raise InputError(f"model has a parameter and a buffer both named {min(clash)!r}; rename one")
    run = parts.apply

    def both(variables: Arrays, x: Any) -> tuple[Any, Any]:
        weights = jax.tree.unflatten(params_tree, [variables[path] for path in flat_params])
        rest = jax.tree.unflatten(buffers_tree, [variables[path] for path in flat_buffers])
        return run(weights, rest, x)

    def apply(variables: Arrays, x: Any) -> Any:
        return both(variables, x)[0]

    def step(variables: Arrays, x: Any) -> tuple[Any, Arrays]:
        logits, state = both(variables, x)
        after = _leaves(state)
        return logits, {path: after[path] for path in flat_buffers if path in after}

    same = _same_architecture((parts.architecture, params_tree, buffers_tree), (apply, step))
    return Model(
        apply=same[0],
        params=flat_params,
        buffers=flat_buffers,
        known_keys=known_keys,
        step=same[1] if flat_buffers else None,
    )


Functions = tuple[Callable[[Arrays, Any], Any], Callable[[Arrays, Any], tuple[Any, Arrays]]]
_KNOWN: dict[Any, Functions] = {}
_KNOWN_LIMIT = 64


def _same_architecture(key: Any, functions: Functions) -> Functions:
    """The functions read first for an equal architecture, so that what was compiled for them serves all its weights."""
    try:
        while len(_KNOWN) >= _KNOWN_LIMIT and key not in _KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        return _KNOWN.setdefault(key, functions)
    except TypeError:  # not hashable: an architecture of its own
        return functions


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    try:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        arrays = [(_path(keys), leaf if hasattr(leaf, "dtype") else np.asarray(leaf)) for keys, leaf in leaves]
    except Exception as error:  # keys that cannot be sorted, ragged lists
        raise InputError(f"a model's params must be arrays in nested dicts or lists: {first_line(error)}") from error
    flat = dict(arrays)
    if len(flat) < len(arrays):
        raise InputError("a model's params: two arrays have the same path; give them different names")
    return flat, treedef


def _leaves(tree: Any) -> dict[str, Any]:
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _path(keys: Any) -> str:
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys]
    return "/".join(names[:-1] if len(names) > 1 and names[-1] == "value" else names)


def _cast(arrays: Arrays, dtype: Any) -> Arrays:
    def cast(a: Any) -> Any:
        return to_device(np.asarray(a), dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return {path: cast(a) for path, a in arrays.items()}


def run_model(model: Model, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of the model's logits at `x`, without computing; a model that cannot run raises `InputError`."""
    try:
        logits = jax.eval_shape(model.apply, model.variables, x)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the model's own code
        raise cannot_run(x.shape, error) from error
    if not isinstance(logits, jax.ShapeDtypeStruct):
        raise InputError(f"model must return one array, the logits; say which output is: {listed(logits)}")
    return logits


def output_shape(model: Model, input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a model's outputs for one example of `input_shape`."""
    dtype = jnp.result_type(*(a.dtype for a in model.params.values()))
    outputs = run_model(model, jax.ShapeDtypeStruct((1, *input_shape), dtype))
    if outputs.shape[:1] != (1,):
        raise InputError(f"model must return outputs of shape (examples, ...), got {outputs.shape} for one example")
    return tuple(outputs.shape[1:])


def output_count(model: Model, input_shape: Sequence[int]) -> int:
    """How many classes a model's outputs for one example of `input_shape` tell apart: the size of their last axis."""
    shape = output_shape(model, input_shape)
    return shape[-1] if shape else 1
