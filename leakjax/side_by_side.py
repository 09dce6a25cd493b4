"""Independent work on the host, one piece a core."""

import concurrent.futures
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(run: Callable[[T], R], tasks: Iterable[T]) -> list[R]:
    """`run` of every task, as many at a time as there are cores, each with its share of the matrix library's threads.

    Threads of several matrix products at once wait for each other and burn several times the work.
    """
    tasks = list(tasks)
    lanes = min(len(tasks), cores())
    if lanes <= 1:
        return [run(task) for task in tasks]
    share = threadpool_limits(limits=max(1, cores() // lanes), user_api="blas")
    with share, concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        return list(pool.map(run, tasks))
