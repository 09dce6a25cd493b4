"""An `nn.Module` as a pure function of its named parameters and buffers."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.errors import InputError, first_line
from leakjax.interop.environment import environment, running, torch
from leakjax.models.calls import Call, Path, read_call
from leakjax.models.families import Parts
from leakjax.models.reader import Model, from_parts


def from_module(
    module: Any,
    *,
    call: Mapping[str, Any] | None = None,
    output: Path | None = None,
    layout: str = "NCHW",
    train: bool | None = None,
) -> Model:
    """Read a PyTorch module: what `observe`, `invert`, `audit` and `guard.loss_of` take as a model.

    The module is copied, so that it may train on. Parameters and buffers have their names in `state_dict`, and the
    layout that they have there. A parameter without `requires_grad` gets no gradient, and is a buffer. In training mode
    a batch norm leaves new running statistics, as PyTorch's does.

    Arguments:
    - `module`: an `nn.Module` on any device, called as module(x, **call);
    - `call`, `output`: keyword arguments beside x, and which output counts; see `read_model`;
    - `layout`: "NCHW", in which PyTorch's modules take images, or "NHWC"; images are (N, H, W, C) everywhere else;
    - `train`: `train()` or `eval()` for the copy; None for the mode that every part of the module is in.

    Raises `InputError` where it is no module, one without parameters, or one that cannot be copied.
    Source: the operations are those of `torchax`.
    """
    if not isinstance(module, torch().nn.Module):
        raise InputError(f"from_module takes an nn.Module, got {type(module).__name__}")
    how = read_call(call, None, output, layout, train)
    environment()  # refuses before anything is copied
    params = {n: _array(n, p) for n, p in module.named_parameters() if p.requires_grad}
    held = {n: _array(n, p) for n, p in module.named_parameters() if not p.requires_grad}
    buffers = {n: _array(n, b) for n, b in module.named_buffers()}
    frozen = _frozen(module)
    if how.train is not None:
        frozen.train(how.train)
    _check_mode(frozen)
    return from_parts(_parts(frozen, params, {**held, **buffers}, how), known_keys=False)


def _parts(module: Any, params: Mapping[str, Any], buffers: Mapping[str, Any], call: Call) -> Parts:
    functional = torch().func.functional_call

    def apply(params: Any, buffers: Any, x: Any) -> Any:
        def function(x: Any, **arguments: Any) -> Any:
            with running() as env:
                taken, weights = env.j2t_iso(jax.tree.map(jnp.asarray, (x, {**params, **buffers})))
                outputs = env.t2j_iso(functional(module, weights, (taken,), env.j2t_iso(arguments)))
                return outputs, {name: env.t2j_iso(weights[name]) for name in buffers}

        return call.run_with_state(function, x)

    return Parts((module, call.identity), apply, dict(params), dict(buffers))


def _array(name: str, tensor: Any) -> np.ndarray:
    """A copy of a tensor; bfloat16, which NumPy lacks, as float32."""
    if torch().nn.parameter.is_lazy(tensor):
        raise InputError(f"from_module: {name!r} has no shape yet; run the module once on an image")
    held = tensor.detach().cpu()
    return (held.float() if held.dtype == torch().bfloat16 else held).numpy().copy()


def _frozen(module: Any) -> Any:
    """A copy that holds no weights, tied ones still tied; tensors that are plain attributes are constants of it."""
    tensors = [*module.parameters(), *module.buffers()]
    empty = {id(t): _empty(t) for t in tensors}
    try:
        frozen = copy.deepcopy(module, empty)
    except Exception as error:  # the module's own attributes
        raise InputError(f"from_module: the module cannot be copied: {first_line(error)}") from error
    env = environment()
    for part in frozen.modules():
        for name, value in vars(part).items():
            if isinstance(value, torch().Tensor):
                setattr(part, name, env.j2t_iso(jnp.asarray(_array(name, value))))
    return frozen


def _empty(tensor: Any) -> Any:
    held = tensor.detach().to("meta")
    kind = torch().nn.Parameter
    return kind(held, requires_grad=tensor.requires_grad) if isinstance(tensor, kind) else held


def _check_mode(module: Any) -> None:
    """Refuse running statistics that average over all batches: their weight is a count, which is no constant."""
    for name, part in module.named_modules():
        if part.training and getattr(part, "track_running_stats", False) and part.momentum is None:
            raise InputError(
                f"from_module: {name or 'the module'!r} averages over all batches (momentum=None), which "
                "is not supported in training mode; give it a momentum, or call eval()"
            )
