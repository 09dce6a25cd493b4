"""torchax, which runs PyTorch's operations on JAX arrays, made ready for every torch that the extra `torch` allows."""

import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from leakjax.errors import InputError, first_line

_INSTALL = 'pip install "leakjax[torch]"'

LOCK = threading.RLock()
"""Held while a module runs: its weights are swapped for traced ones, and modes of torch are set."""


def torch() -> Any:
    """PyTorch, or `InputError` with what installs it."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InputError(f"PyTorch modules need PyTorch and torchax: {_INSTALL} ({first_line(error)})") from None


@functools.cache
def environment() -> Any:
    """The one `torchax.tensor.Environment` in which modules run; the caller's own is left as it is.

    torchax 0.0.13 lists operations that later torches no longer have: overloads of named tensors (2.13), a second
    cholesky (2.14). Nobody calls them, so that each stands as a placeholder while torchax fills its tables.
    """
    attention = torch().backends.mha
    fast = attention.get_fastpath_enabled()
    with LOCK, _absent_operations():
        try:
            found = importlib.import_module("torchax.tensor").Environment()
        except ImportError as error:
            raise InputError(f"PyTorch modules need torchax: {_INSTALL} ({first_line(error)})") from None
        finally:
            attention.set_fastpath_enabled(fast)  # torchax turns it off for the whole process
    found.override_op_definition(torch().nn.functional.batch_norm, functools.partial(_batch_norm, found))
    return found


@contextmanager
def running() -> Iterator[Any]:
    """The environment, entered by one thread at a time; random numbers drawn inside raise `InputError`.

    Ranks are promoted, as PyTorch broadcasts.
    """
    env, attention, key = environment(), torch().backends.mha, jax.random.key(0)
    with LOCK, torch().no_grad():
        fast = attention.get_fastpath_enabled()
        attention.set_fastpath_enabled(False)
        try:
            with _unwarned(), jax.numpy_rank_promotion("allow"), env.override_property(prng=key), env:
                yield env
                drawn = env.prng_key is not key
        finally:
            attention.set_fastpath_enabled(fast)
    if drawn:
        raise InputError(
            "the module draws random numbers (dropout or stochastic depth in training mode), which JAX cannot repeat; "
            "call eval() on the parts that draw"
        )


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without JAX's warning that torchax asks for 64-bit integers, PyTorch's default, where JAX has 32 bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype int64", UserWarning)
        yield


class _Absent:
    """In place of an operation, or an overload of one, that this torch does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent()


@contextmanager
def _absent_operations() -> Iterator[None]:
    ops = torch()._ops
    known = {kind: kind.__getattr__ for kind in (ops._OpNamespace, ops.OpOverloadPacket)}

    def tolerant(getter: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def found(self: Any, name: str) -> Any:
            try:
                return getter(self, name)
            except AttributeError:
                if name.startswith("__"):
                    raise
                return _Absent()

        return found

    for kind, getter in known.items():
        kind.__getattr__ = tolerant(getter)
    try:
        yield
    finally:
        for kind, getter in known.items():
            kind.__getattr__ = getter


def _batch_norm(
    env: Any,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """`torch.nn.functional.batch_norm`, new running statistics included, which torchax computes and drops.

    y = (x - m) / sqrt(v + eps) * weight + bias, with the batch's own mean m and biased variance v in training mode,
    and r' = (1 - momentum) r + momentum s for s = m and s = the unbiased variance.
    """
    x, mean, var, scale, shift = env.t2j_iso((input, running_mean, running_var, weight, bias))
    axes, spread = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
    if training:
        count = x.size // x.shape[1]
        own = jnp.mean(x, axes), jnp.var(x, axes)
        for buffer, old, new in (
            (running_mean, mean, own[0]),
            (running_var, var, own[1] * count / max(count - 1, 1)),
        ):
            if buffer is not None:
                buffer.copy_(env.j2t_iso((1 - momentum) * old + momentum * jax.lax.stop_gradient(new)))
        mean, var = own
    y = (x - mean.reshape(spread)) * jax.lax.rsqrt(var.reshape(spread) + eps)
    y = y if scale is None else y * scale.reshape(spread)
    return env.j2t_iso(y if shift is None else y + shift.reshape(spread))
