"""ONE store of what is traced and compiled: every function that makes a program keeps its results here.

A program belongs to an architecture, not to weights or gradients: its key is the function that computes it (a model's
`apply`, a `Segment`), shapes and dtypes. What else is kept says so: factors belong to a model's weights (a digest of
them is the key). Nothing in the store holds a gradient. Each keeper holds its latest results; `clear_caches` empties
them all.
"""

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

_CLEAR: list[Callable[[], None]] = []


def clear_caches() -> None:
    """Forget every program that leakjax has traced or compiled in this process; the next call makes its own again.

    Long processes that go through many architectures give memory back by this. Programs that other code compiled, or
    that stand on disk in JAX's compilation cache, stay.
    """
    for clear in _CLEAR:
        clear()


def quickly(devices: Sequence[Any] = ()) -> dict[str, Any] | None:
    """Compiler options of programs that run too seldom to be optimized: on CPUs without XLA's own optimization, which
    takes most of the time of a compilation; elsewhere None, as usual.

    `devices` that they run on, () for JAX's default. For outermost programs alone: JAX takes no options inside another.
    """
    platform = devices[0].platform if devices else jax.default_backend()
    return _QUICK if platform == "cpu" else None


def keep(most: int) -> Callable[[F], F]:
    """A decorator: the results for the `most` latest arguments are kept, and returned when these are met again."""

    def keeping(function: F) -> F:
        store = functools.lru_cache(maxsize=most)(function)
        _CLEAR.append(store.cache_clear)
        return store  # type: ignore[return-value]

    return keeping


class Shelf(Generic[T]):
    """Results that are found under a key that the caller makes; at most `most` of them, the oldest go first.

    Another thread may drop a result at any time: ask by `get` alone, and hold on to what it gives.
    """

    def __init__(self, most: int):
        self._most = most
        self._kept: dict[Hashable, T] = {}
        self._lock = threading.Lock()
        _CLEAR.append(self._kept.clear)

    def get(self, key: Hashable) -> T | None:
        """What is kept under `key`, or None."""
        return self._kept.get(key)

    def put(self, key: Hashable, value: T) -> T:
        """Keep `value`, and return it."""
        with self._lock:
            while len(self._kept) >= self._most:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[key] = value
        return value
