"""The kinds of models that are read: Flax (nnx, linen, transformers), Equinox, Haiku, and plain functions.

Nothing but Flax is imported: an Equinox module or a Haiku transform exists where its package is loaded.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen, nnx

from leakjax.errors import InputError, first_line
from leakjax.models.calls import Call


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken apart: `apply(params, buffers, x)` -> (outputs, the buffers after the call), all trees of arrays,
    and what makes another model the same architecture (it is compared by ==)."""

    architecture: Any
    apply: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: Any
    buffers: Any


def take_apart(model: Any, params: Any, call: Call) -> Parts:
    """A model of any kind; see `read_model`. Raises `InputError` for what is none, or lacks its parameters."""
    if _is_transform(model):
        return _of_haiku(model, params, call)
    if isinstance(model, nnx.Module):
        if params is not None:
            raise InputError("params is for plain functions and linen modules; an nnx module carries its own")
        return _of_nnx(model, call)
    if isinstance(model, linen.Module):
        return _of_linen(model, params, call)
    if isinstance(getattr(model, "module", None), linen.Module) and params is None:  # transformers' Flax classes
        weights = getattr(model, "params", None)
        given = weights if isinstance(weights, Mapping) and "params" in weights else {"params": weights}
        return _of_linen(model.module, given, call)
    if _is_equinox(model) and (params is None or _is_state(params)):
        return _of_equinox(model, params, call)
    if callable(model):
        if params is None:
            if _is_torch(model):
                raise InputError("model is a PyTorch module: pass leakjax.interop.torch.from_module(module) (--torch)")
            raise InputError("apply_fn needs its parameters: pass (apply_fn, params)")
        return _of_function(model, params, call)
    raise InputError(
        "model must be an nnx module, (linen module, variables), an Equinox module, (Haiku transform, params) or "
        f"(apply_fn, params), got {type(model).__name__}"
    )


def _is_torch(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _of_nnx(model: nnx.Module, call: Call) -> Parts:
    if call.train is not None:
        model = nnx.clone(model)
        (model.train if call.train else model.eval)()
    try:
        model = _reseeded(model, dict(call.rngs)) if call.rngs and not _takes(model, "rngs") else model
        graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
    except InputError:
        raise
    except Exception as error:  # a module with attributes that Flax cannot take apart
        raise InputError(f"model cannot be taken apart by Flax: {first_line(error)}") from error
    if isinstance(dict(call.arguments).get("rngs"), nnx.Rngs):
        raise InputError('call: give the random streams by their seeds, as rngs={"dropout": 0} (--rngs dropout=0)')
    streams = _takes(model, "rngs") and call.rngs and "rngs" not in dict(call.arguments)

    def apply(params: Any, buffers: Any, x: Any) -> Any:
        module = nnx.merge(graphdef, params, buffers)

        def function(x: Any, **arguments: Any) -> Any:
            return module(x, rngs=_streams(call), **arguments) if streams else module(x, **arguments)

        outputs = call.run(function, x)
        return outputs, nnx.split(module, nnx.Param, ...)[2]

    return Parts((graphdef, call.identity), apply, weights, rest)


def _takes(model: nnx.Module, name: str) -> bool:
    """Whether a module is called with an argument of that name."""
    return name in inspect.signature(type(model).__call__).parameters


def _streams(call: Call) -> nnx.Rngs:
    """Fresh streams of the seeds, one alone for all."""
    seeds: dict[str, Any] = dict(call.rngs)
    return nnx.Rngs(seeds["params"]) if list(seeds) == ["params"] else nnx.Rngs(**seeds)


def _reseeded(model: nnx.Module, seeds: dict[str, int]) -> nnx.Module:
    """A copy whose random streams begin at the `seeds`; one seed alone (a stream `params` that it has not) is all's."""
    model = nnx.clone(model)
    streams = sorted({str(node.tag) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)})
    if list(seeds) == ["params"] and "params" not in streams:
        seeds = dict.fromkeys(streams, seeds["params"])
    unknown = next((name for name in seeds if name not in streams), None)
    if unknown is not None:
        raise InputError(f"rngs: the model has no random stream {unknown!r}; it has {', '.join(streams) or 'none'}")
    nnx.reseed(model, **seeds)  # pyright: ignore[reportArgumentType]
    return model


def _of_linen(module: linen.Module, variables: Any, call: Call) -> Parts:
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        raise InputError("a linen module needs its variables: pass (module, module.init(key, x))")
    rest, call = {k: v for k, v in variables.items() if k != "params"}, call.in_mode(module)

    def apply(params: Any, buffers: Any, x: Any) -> Any:
        def function(x: Any, **arguments: Any) -> Any:
            options = {"rngs": call.keys()} if call.rngs else {}
            if not rest:
                return module.apply({"params": params}, x, **options, **arguments), {}
            return module.apply({"params": params, **buffers}, x, mutable=list(rest), **options, **arguments)

        return call.run_with_state(function, x)

    return Parts((module, call.identity), apply, variables["params"], rest)


def _is_equinox(model: Any) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(model, equinox.Module)


def _is_state(params: Any) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(params, equinox.nn.State)


def _of_equinox(model: Any, state: Any, call: Call) -> Parts:
    """An Equinox module takes one example: it is vmapped, over the axis that Equinox's own batch norm calls "batch"."""
    _one_seed(call, "an Equinox module")
    equinox = sys.modules["equinox"]
    model = model if call.train is None else equinox.nn.inference_mode(model, not call.train)
    params, rest = equinox.partition(model, equinox.is_inexact_array)
    buffers, static = equinox.partition(rest, equinox.is_array)
    leaves, structure = jax.tree.flatten(static)

    def apply(params: Any, buffers: Any, x: Any) -> Any:
        buffers, state = buffers
        module = equinox.combine(params, buffers, static)

        def function(x: Any, **arguments: Any) -> Any:
            keys = jax.random.split(call.keys()[call.rngs[0][0]], len(x)) if call.rngs else None

            def one(x: Any, key: Any) -> Any:
                more = {} if key is None else {"key": key}
                if state is None:
                    return module(x, **more, **arguments), None
                return module(x, state, **more, **arguments)

            outputs, after = jax.vmap(one, in_axes=(0, None if keys is None else 0), axis_name="batch")(x, keys)
            return outputs, jax.tree.map(lambda a: a[0], after)  # one for the batch, or an example's own

        outputs, after = call.run_with_state(function, x)
        return outputs, (buffers, after)

    architecture = structure, tuple((type(leaf), leaf) for leaf in leaves), call.identity
    return Parts(architecture, apply, params, (buffers, state))


def _one_seed(call: Call, kind: str) -> None:
    if len(call.rngs) > 1:
        raise InputError(f"rngs: {kind} takes one key; give one seed, as rngs=0 (--rngs 0)")


def _is_transform(model: Any) -> bool:
    """Whether this is what `haiku.transform` or `haiku.transform_with_state` returns."""
    return type(model).__name__ in ("Transformed", "TransformedWithState") and hasattr(model, "apply")


def _of_haiku(transform: Any, params: Any, call: Call) -> Parts:
    _one_seed(call, "a Haiku transform")
    stateful = type(transform).__name__ == "TransformedWithState"
    if params is None or (stateful and not (isinstance(params, tuple) and len(params) == 2)):
        wanted = "(transform, (params, state))" if stateful else "(transform, params)"
        raise InputError(f"a Haiku transform needs what its init returned: pass {wanted}")
    weights, state = params if stateful else (params, None)
    if call.train is not None:
        raise InputError('train: say how the transform is called (call={"is_training": True}, --call is_training=true)')
    keyed = "rng" in inspect.signature(transform.apply).parameters

    def apply(params: Any, buffers: Any, x: Any) -> Any:
        def function(x: Any, **arguments: Any) -> Any:
            key = [call.keys()[call.rngs[0][0]] if call.rngs else None] if keyed else []
            found = transform.apply(params, *([buffers] if stateful else []), *key, x, **arguments)
            return found if stateful else (found, {})

        return call.run_with_state(function, x)

    return Parts((transform, call.identity), apply, weights, {} if state is None else state)


def _of_function(function: Callable[..., Any], params: Any, call: Call) -> Parts:
    if call.rngs:
        raise InputError('rngs goes with modules; give a function its key by call, as call={"key": jax.random.key(0)}')
    call = call.in_mode(function)

    def apply(params: Any, buffers: Any, x: Any) -> Any:
        return call.run(lambda x, **more: function(params, x, **more), x), {}

    return Parts((function, call.identity), apply, params, {})
