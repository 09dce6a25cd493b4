"""Moves of an image that a network may not see: what symmetries are looked for, by name.

A network without positions has the same gradient for its patches in any order; one with circular padding and pooling
for a shifted image; an even one for -x. Each move is tried on an answer; nothing is assumed of the network.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Image = Float[np.ndarray, "*space C"]

NEIGHBORS = 12
"""Swaps of neighboring patches that are tried for one patch size: where each holds, so do their products."""


CELLS = 4
"""Patches of one size that are flipped, or whose sign is changed, one at a time."""


class Move(NamedTuple):
    """A `name` for the reader ("shift", "patch order (4x4)"), and what it does to one example."""

    name: str
    apply: Callable[[Image], Image]


def moves(shape: tuple[int, ...], input_range: tuple[float, float]) -> Iterator[Move]:
    """All moves of examples of `shape` (*space, channels), or (features,), that are worth a gradient each."""
    space = tuple(range(len(shape) - 1)) or (0,)
    middle = float(sum(input_range))
    yield Move("sign", np.negative)
    if middle:
        yield Move("sign about mid-range", lambda x: middle - x)
    for axis in space:
        step = 1
        while step < shape[axis]:
            yield Move("shift", functools.partial(np.roll, shift=step, axis=axis))
            step *= 2
        yield Move("shift", functools.partial(np.roll, shift=-1, axis=axis))
        yield Move("flip", functools.partial(np.flip, axis=axis))
    if len(space) == 2:
        yield Move("rotation", functools.partial(np.flip, axis=(0, 1)))
        if shape[0] == shape[1]:
            yield Move("transposition", functools.partial(np.swapaxes, axis1=0, axis2=1))
            yield Move("rotation", functools.partial(np.rot90, axes=(0, 1)))
    for sizes in _patch_sizes(tuple(shape[axis] for axis in space)):
        shown = "x".join(map(str, sizes))
        name = f"order of patches ({'x'.join(map(str, sizes))})" if max(sizes) > 1 else "order of positions"
        counts = tuple(shape[axis] // size for axis, size in zip(space, sizes, strict=True))
        for one, other in _neighbors(counts):
            yield Move(name, functools.partial(_swap, sizes=sizes, one=one, other=other))
            for axis in space if max(sizes) > 1 else ():
                yield Move(f"{name} and flips", functools.partial(_swap, sizes=sizes, one=one, other=other, flip=axis))
        for cell in itertools.islice(np.ndindex(*counts), CELLS):
            for axis in space if max(sizes) > 1 else ():
                flipped = functools.partial(_swap, sizes=sizes, one=cell, other=cell, flip=axis)
                yield Move(f"flips of patches ({shown})", flipped)
            yield Move("signs of parts", functools.partial(_signed, sizes=sizes, cell=cell, middle=0.0))
            if middle:
                yield Move("signs of parts", functools.partial(_signed, sizes=sizes, cell=cell, middle=middle))
    for axis in space:
        for step in (2, 3, 4):
            if shape[axis] % step == 0 and shape[axis] > step:
                for phase in range(step - 1):
                    options = {"axis": axis, "step": step, "phase": phase}
                    yield Move("order of interlaced positions", functools.partial(_swap_interlaced, **options))
    if len(shape) > 1:
        for pair in itertools.islice(itertools.combinations(range(shape[-1]), 2), 2 * NEIGHBORS):
            yield Move("order of channels", functools.partial(_swap_channels, pair=pair))
        for channel in range(min(shape[-1], NEIGHBORS)):
            yield Move("signs of parts", functools.partial(_signed_channel, channel=channel, middle=0.0))


def _patch_sizes(space: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes that divide the space into two patches or more; the same along all axes, and whole rows or columns."""
    found = [(size,) * len(space) for size in range(1, max(space) // 2 + 1) if all(n % size == 0 for n in space)]
    if len(space) == 2:
        found += [(space[0], 1), (1, space[1])]
    return [sizes for sizes in found if math.prod(n // s for n, s in zip(space, sizes, strict=True)) > 1]


def _neighbors(counts: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Up to `NEIGHBORS` pairs of neighboring cells, spread over the whole grid."""
    pairs = []
    for cell in np.ndindex(*counts):
        for axis in range(len(counts)):
            if cell[axis] + 1 < counts[axis]:
                pairs.append((cell, tuple(c + (k == axis) for k, c in enumerate(cell))))
    if len(pairs) <= NEIGHBORS:
        return pairs
    return [pairs[k] for k in np.linspace(0, len(pairs) - 1, NEIGHBORS).astype(int)]


def _swap(
    x: Image, *, sizes: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...], flip: int | None = None
) -> Image:
    def part(cell: tuple[int, ...]) -> Image:
        found = x[_window(sizes, cell)]
        return found if flip is None else np.flip(found, axis=flip)

    moved = np.array(x)
    moved[_window(sizes, one)], moved[_window(sizes, other)] = part(other), part(one)
    return moved


def _window(sizes: tuple[int, ...], cell: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(c * s, (c + 1) * s) for c, s in zip(cell, sizes, strict=True))


def _signed(x: Image, *, sizes: tuple[int, ...], cell: tuple[int, ...], middle: float) -> Image:
    moved = np.array(x)
    moved[_window(sizes, cell)] = middle - moved[_window(sizes, cell)]
    return moved


def _signed_channel(x: Image, *, channel: int, middle: float) -> Image:
    moved = np.array(x)
    moved[..., channel] = middle - moved[..., channel]
    return moved


def _swap_interlaced(x: Image, *, axis: int, step: int, phase: int) -> Image:
    order = np.arange(x.shape[axis])
    order[phase::step], order[phase + 1 :: step] = order[phase + 1 :: step].copy(), order[phase::step].copy()
    return np.take(x, order, axis=axis)


def _swap_channels(x: Image, *, pair: tuple[int, int]) -> Image:
    order = np.arange(x.shape[-1])
    order[list(pair)] = order[list(pair)[::-1]]
    return x[..., order]
