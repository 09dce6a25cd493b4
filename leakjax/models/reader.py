"""A model as a pure function of named arrays: the only reader of Flax modules."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array, Shaped

from leakjax.errors import InputError, cannot_run, first_line
from leakjax.runtime.arrays import to_device

Arrays = Mapping[str, Shaped[Array | np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """logits = apply(variables, x), with `variables` = `params` (they have gradients) and `buffers` (they have none).

    Both are flat mappings from a path ("conv1/kernel") to an array. `x` has a leading batch axis. Models of one
    architecture share one `apply`.
    """

    apply: Callable[[Arrays, Any], Any]
    params: Arrays
    buffers: Arrays

    def __post_init__(self) -> None:
        if not (callable(self.apply) and isinstance(self.params, Mapping) and isinstance(self.buffers, Mapping)):
            raise InputError("Model takes a function and two mappings of arrays by path; read_model makes one")

    @property
    def variables(self) -> Arrays:
        """All arrays of the model by path."""
        return {**self.params, **self.buffers}

    def astype(self, dtype: Any) -> "Model":
        """The same model with every floating array cast to `dtype`."""
        return dataclasses.replace(self, params=_cast(self.params, dtype), buffers=_cast(self.buffers, dtype))

    def with_arrays(self, params: Arrays, buffers: Arrays) -> "Model":
        """The same architecture with other weights."""
        return dataclasses.replace(self, params=params, buffers=buffers)


def read_model(model: Any, params: Any = None) -> Model:
    """Read a Flax model or a plain function.

    Arguments:
    - `model`: an `nnx.Module`; a pair (linen module, variables); a pair (apply_fn, params); or, with `params` given, a
      linen module or `apply_fn(params, x)` itself. `x` has a leading batch axis.

    Raises `InputError` where it is none of these.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, tuple) and len(model) == 2 and params is None:
        model, params = model
    if isinstance(model, nnx.Module):
        if params is not None:
            raise InputError("params is for plain functions and linen modules; an nnx module carries its own")
        try:
            graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
        except Exception as error:  # a module with attributes that Flax cannot take apart
            raise InputError(f"model cannot be taken apart by Flax: {first_line(error)}") from error
        return _from_trees(graphdef, lambda p, b, x: nnx.merge(graphdef, p, b)(x), weights, rest)
    if isinstance(model, linen.Module):
        if not isinstance(params, Mapping) or "params" not in params:
            raise InputError("a linen module needs its variables: pass (module, module.init(key, x))")
        rest = {k: v for k, v in params.items() if k != "params"}
        module = model
        return _from_trees(module, lambda p, b, x: module.apply({"params": p, **b}, x), params["params"], rest)
    if callable(model):
        if params is None:
            raise InputError("apply_fn needs its parameters: pass (apply_fn, params)")
        function = model
        return _from_trees(function, lambda p, b, x: function(p, x), params, {})
    raise InputError(
        f"model must be an nnx module, (linen module, variables) or (apply_fn, params), got {type(model).__name__}"
    )


def _from_trees(architecture: Any, apply: Callable[[Any, Any, Any], Any], params: Any, buffers: Any) -> Model:
    flat_params, params_tree = _flatten(params)
    flat_buffers, buffers_tree = _flatten(buffers)
    if not flat_params:
        raise InputError("model has no parameters, hence no gradient to invert")
    for path, leaf in flat_params.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"parameter {path!r} has dtype {leaf.dtype}; only floating point has gradients")
    clash = flat_params.keys() & flat_buffers.keys()
    if clash:
        raise InputError(f"model has a parameter and a buffer both named {min(clash)!r}; rename one")

    def by_path(variables: Arrays, x: Any) -> Any:
        weights = jax.tree.unflatten(params_tree, [variables[path] for path in flat_params])
        rest = jax.tree.unflatten(buffers_tree, [variables[path] for path in flat_buffers])
        return apply(weights, rest, x)

    return Model(_same_architecture((architecture, params_tree, buffers_tree), by_path), flat_params, flat_buffers)


_KNOWN: dict[Any, Callable[[Arrays, Any], Any]] = {}
_KNOWN_LIMIT = 64


def _same_architecture(key: Any, apply: Callable[[Arrays, Any], Any]) -> Callable[[Arrays, Any], Any]:
    """The `apply` read first for an equal architecture, so that what was compiled for it serves all its weights."""
    try:
        while len(_KNOWN) >= _KNOWN_LIMIT and key not in _KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        return _KNOWN.setdefault(key, apply)
    except TypeError:  # not hashable: an architecture of its own
        return apply


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
        raise InputError(f"model must return one array, the logits; got a {type(logits).__name__}")
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
