"""May another label map, with another image, have the very same gradient? Asked of an answer whose map was found.

Two things would say so: directions of (image, map) that the gradient leaves open, by the rank of its derivative in
both, the map's classes relaxed to numbers; and moves of the image together with its map. A gradient that leaves the
joint directions open may still have one map of whole classes alone, but no rank proves that.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from leakjax.attacks.adaptive import predicted
from leakjax.attacks.certificates.moves import Move, moves
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.models.losses import labels_of
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.jacobian import inverse_norms, row_space

_OPEN = (
    "the gradient determines {rank} of the {unknowns} numbers of the image and its label map together, classes taken "
    "for numbers: another map with another image may have the same gradient"
)
_UNRANKED = "the image and its label map are too many unknowns for a rank: whether others have this gradient is open"
_MOVED = "the image and its label map, moved together ({names}), have the same gradient"
_ANY_SIZE = ("sign", "sign about mid-range", "flip", "rotation", "transposition")
"""Moves that are the same of an image and of a map of another size."""


def with_open_maps(problem: Problem, monitor: Monitor, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes, with the reasons why other label maps may have the same gradient; of given maps as they are."""
    if not problem.maps_unknown or problem.examples > 1:
        return outcomes
    return [_checked(problem, monitor, outcome) for outcome in outcomes]


def _checked(problem: Problem, monitor: Monitor, outcome: Outcome) -> Outcome:
    best = outcome.candidates[0] if outcome.candidates else None
    if best is None or best.target is None:
        return outcome
    if outcome.psnr_estimate is None and not best.gradient_residual <= problem.tolerances.matched:
        return outcome
    monitor.tell("looking for other label maps")
    classes = np.asarray(best.target)
    names = _joint_moves(problem, best.image, classes)
    if names:
        return dataclasses.replace(outcome, open_map=_MOVED.format(names=", ".join(names)))
    rank, unknowns = joint_rank(problem, best.image, classes)
    if rank == unknowns:
        return outcome
    words = _UNRANKED if rank is None else _OPEN.format(rank=rank, unknowns=unknowns)
    return dataclasses.replace(outcome, open_map=words)


def joint_rank(
    problem: Problem, x: Float[np.ndarray, "*image"], classes: Int[np.ndarray, "*space"]
) -> tuple[int | None, int]:
    """(rank of d g / d (x, y), unknowns) at an image with its map; y (*space, K) moves within sum_k y_k = 1.

    H W C + H W (K - 1) unknowns, one a position for one logit. None where that many do not fit into memory, or in
    float32, whose squares of small singular values drown in rounding.
    """
    columns = problem.outputs // classes.size
    free = labels_of(columns) - 1
    unknowns = x.size + classes.size * free
    if np.dtype(problem.dtype) != np.float64 or not fits_in_memory(6 * 8 * unknowns**2):
        return None, unknowns
    products = _joint(predicted(problem), columns)
    given = dict(problem.variables), to_device(x[None], problem.dtype), to_device(classes[None])
    rows = sum(g[0].size for g in problem.gradients.values())
    return row_space(lambda v: products(*given, to_device(v)), rows, unknowns).rank, unknowns


@keep(16)
def _joint(gradient: Gradient, columns: int) -> Callable[..., Float[Array, "k n"]]:
    """(variables, x, classes, v (k, n)) -> J^T J v of every row, J by (x, t), weighted by 1 / ||g_p||."""

    def products(
        variables: Arrays, x: Float[Array, "1 *image"], classes: Int[Array, "1 *space"], v: Float[Array, "k n"]
    ) -> Float[Array, "k n"]:
        free = labels_of(columns) - 1
        over = jax.lax.stop_gradient(inverse_norms(gradient(variables, x, classes)))

        def weighted(u: Float[Array, " n"]) -> dict[str, Array]:
            t = u[x.size :].reshape(*classes.shape, free)
            if columns == 1:
                shares = classes[..., None].astype(x.dtype) + t
            else:
                whole = jax.nn.one_hot(classes, columns, dtype=x.dtype)
                shares = whole + jnp.concatenate([-jnp.sum(t, axis=-1, keepdims=True), t], axis=-1)
            return optax.tree.mul(over, gradient(variables, x + u[: x.size].reshape(x.shape), shares))

        zero = jnp.zeros(v.shape[1], x.dtype)
        tangent = jax.linearize(weighted, zero)[1]
        adjoint = jax.linear_transpose(tangent, zero)
        return jax.lax.map(lambda d: adjoint(tangent(d))[0], v, batch_size=16)

    return jax.jit(products)


def _joint_moves(problem: Problem, x: Float[np.ndarray, "*image"], classes: Int[np.ndarray, "*space"]) -> list[str]:
    """Names of the moves that change the image or its map, and leave the gradient as it is when they move both."""
    two = labels_of(problem.outputs // classes.size) == 2
    tried = [
        (name, *pair)
        for name, *pair in _moved_pairs(x, classes, problem.input_range, two=two)
        if problem.in_range(pair[0]) and (np.max(np.abs(pair[0] - x)) > problem.gap or np.any(pair[1] != classes))
    ]
    if not tried:
        return []
    names, images, maps = zip(*tried, strict=True)
    here = to_device(x[None], problem.dtype), to_device(classes[None])
    stacks = to_device(np.stack(images), problem.dtype), to_device(np.stack(maps))
    away = _norms(predicted(problem))(dict(problem.variables), *here, *stacks)
    same = np.asarray(away) <= problem.tolerances.same_at_most
    return list(dict.fromkeys(name for name, kept in zip(names, same, strict=True) if kept))


def _moved_pairs(
    x: Float[np.ndarray, "*image"], classes: Int[np.ndarray, "*space"], limits: tuple[float, float], *, two: bool
) -> Iterator[tuple[str, Float[np.ndarray, "*image"], Int[np.ndarray, "*space"]]]:
    """(name, image, map) of every move of both on the finer grid of the two, the coarser one's entries repeated there;
    where neither grid divides the other, of those moves that every size has.

    A sign turns the classes over where there are `two`: an odd network has logits -z of -x, and softmax(-z) is
    softmax(z) with its classes exchanged.
    """
    space, coarse = x.shape[:-1], classes.shape
    if len(space) != len(coarse):
        return
    grid = tuple(map(max, space, coarse))
    fits = all(g % a == 0 for sizes in (space, coarse) for g, a in zip(grid, sizes, strict=True))
    several = np.repeat(classes[..., None], x.shape[-1], axis=-1)
    for move in moves((*(grid if fits else space), x.shape[-1]), limits):
        if not fits and move.name not in _ANY_SIZE:
            continue
        image, moved, zeros, ones = (
            _on_grid(move, a, grid if fits else a.shape[:-1])
            for a in (x, several, np.zeros(several.shape), np.ones(several.shape))
        )
        turned = ones < zeros
        moved = np.where(turned, 1 - several if two else several, moved)[..., 0].astype(classes.dtype)
        if image.shape == x.shape and moved.shape == classes.shape:
            yield move.name, image, moved


def _on_grid(move: Move, a: Shaped[np.ndarray, "*space C"], grid: tuple[int, ...]) -> Shaped[np.ndarray, "*space C"]:
    """An array moved on a finer grid, of which every step-th entry is kept."""
    steps = [g // n for g, n in zip(grid, a.shape[:-1], strict=True)]
    for axis, step in enumerate(steps):
        a = np.repeat(a, step, axis=axis)
    return move.apply(a)[tuple(slice(None, None, step) for step in steps)]


@keep(16)
def _norms(gradient: Gradient) -> Callable[..., Float[Array, " N"]]:
    """(variables, x, classes, xs (N, *image), maps (N, *space)) -> ||g(x_k, map_k) - g|| / ||g||."""

    def norms(
        variables: Arrays,
        x: Float[Array, "1 *image"],
        classes: Int[Array, "1 *space"],
        xs: Float[Array, "N *image"],
        maps: Int[Array, "N *space"],
    ) -> Float[Array, " N"]:
        here = gradient(variables, x, classes)

        def away(one: tuple[Array, Array]) -> Float[Array, ""]:
            there = gradient(variables, one[0][None], one[1][None])
            return optax.tree.norm(optax.tree.sub(there, here))

        return jax.lax.map(away, (xs, maps)) / optax.tree.norm(here)

    return jax.jit(norms)
