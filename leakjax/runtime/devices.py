"""Victims spread over devices: one program, a share of the victims on every device, the weights on all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "victims"


def spread(function: Callable[..., Any], devices: Sequence[Any], shared: int, split: int) -> Callable[..., Any]:
    """`function` on a one-dimensional mesh of `devices`; itself where none are named.

    Arguments:
    - `shared`: how many of its first arguments every device holds whole;
    - `split`: how many follow whose leading axis, as that of every result, is divided among the devices.

    Each device runs its own loops to their own end: shares never wait for each other, and a share is computed exactly
    as it would be alone.
    """
    if not devices:
        return function
    whole, part = (PartitionSpec(),) * shared, (PartitionSpec(AXIS),) * split
    return jax.shard_map(
        function, mesh=_mesh(devices), in_specs=whole + part, out_specs=PartitionSpec(AXIS), check_vma=False
    )


def placement(devices: Sequence[Any], *, split: bool) -> NamedSharding | None:
    """Where an argument of a `spread` function lies; None, which is JAX's own choice, where none are named."""
    if not devices:
        return None
    return NamedSharding(_mesh(devices), PartitionSpec(AXIS) if split else PartitionSpec())


def solved_together(victims: int, chunk: int, devices: Sequence[Any]) -> int:
    """Victims in one call of a program: `chunk` a device, fewer where there are not so many."""
    count = max(len(devices), 1)
    return count * min(chunk, -(-victims // count))


def _mesh(devices: Sequence[Any]) -> Mesh:
    return Mesh(np.asarray(devices, object), (AXIS,))
