"""Independent work on the host, one piece a core."""

import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from leakjax.runtime.programs import keep

ALONE = threading.Lock()
"""Held by a compiled program with loops that nothing checks afterwards: XLA's CPU client (jax 0.10 and 0.11) has
returned wrong numbers from two runs of one such program at once, on two cores and from some size on; one run alone has
been right always. What runs side by side without this lock is checked (`layerwise.chunks.run_chunks`)."""

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas_threads(count: int) -> AbstractContextManager[Any]:
    """Where the matrix library takes no more threads than `count`."""
    return _libraries().limit(limits=count, user_api="blas")


@keep(1)
def _libraries() -> ThreadpoolController:
    """The libraries that have threads of their own; to look for them takes milliseconds."""
    return ThreadpoolController()


def side_by_side(run: Callable[[T], R], tasks: Iterable[T]) -> list[R]:
    """`run` of every task, as many at a time as there are cores, each with its share of the matrix library's threads.

    Threads of several matrix products at once wait for each other and burn several times the work.
    """
    tasks = list(tasks)
    lanes = min(len(tasks), cores())
    if lanes <= 1:
        return [run(task) for task in tasks]
    with blas_threads(max(1, cores() // lanes)), concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        return list(pool.map(run, tasks))
