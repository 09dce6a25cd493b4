"""Label maps that nobody gave: relaxed beside the image, then rounded; the gradient at the rounded map judges them.

    min over x, t of || w (d/dtheta loss(model(x), y(t)) - g) ||^2 + tau^2 || (x, t) ||^2,    tau falling to 0

y(t) = softmax(0, t) at every position: classes relaxed on the simplex, K - 1 numbers a position. In the last stage
y = (1 - sum t, t) instead, which has no flat ends where a wrong class is sure. As many equations as
the gradient has entries stand against H W C + H W (K - 1) unknowns. The map is rounded after every tau, and where
rounding changes little the image is matched with it, which alone says whether the map is right.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from leakjax.attacks.adaptive import Sent, Told
from leakjax.attacks.matching.outcome import compare, given
from leakjax.attacks.matching.residual import Compare, DenseRows, residual_of, with_derivatives
from leakjax.attacks.problem import Monitor, Problem
from leakjax.constraints.priors import from_natural, to_natural
from leakjax.errors import InputError
from leakjax.models.losses import labels_of, read_loss
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.programs import keep
from leakjax.solvers.dense_newton import Rows, dense_levenberg_marquardt

STAGES = ((1e-2, 12, False), (1e-3, 12, False), (0.0, 60, True))
"""tau, relative to a gradient whose parameters have norm 1 each, with the steps at most, and whether y is linear."""

STEEP = 4.0
"""y = softmax(STEEP t): a unit of t takes a class from even to sure."""

SURE = 0.9
"""The mean share of the likeliest class above which a map is as good as rounded."""


class Relaxed(NamedTuple):
    """An image x (B, *image), its map rounded (*space), and the mean share of the chosen classes."""

    x: Float[np.ndarray, "B ..."]
    classes: Int[np.ndarray, "..."]
    sure: float


def classes_of(problem: Problem) -> int:
    """How many classes a position may have."""
    return labels_of(problem.outputs // int(np.prod(problem.target_shape)))


def can_relax(problem: Problem) -> bool:
    """Whether the label map is unknown, and the loss takes shares of classes in its place."""
    if not problem.maps_unknown or problem.examples > 1 or problem.local_steps > 1:
        return False
    outputs = (*problem.target_shape, problem.outputs // int(np.prod(problem.target_shape)))
    shape = jax.ShapeDtypeStruct(outputs, problem.dtype)
    try:
        return jax.eval_shape(read_loss(problem.loss), shape, shape).shape == ()
    except Exception:  # the caller's own loss, of integers alone
        return False


def relaxed_maps(
    problem: Problem, monitor: Monitor, told: Told, starts: Iterable[Float[np.ndarray, "S B ..."]]
) -> Iterator[Relaxed]:
    """A rounded map and its image of every start, as soon as rounding changes little, else as far as it goes.

    Raises `InputError` where the dense steps do not fit into memory.
    """
    free = classes_of(problem) - 1
    unknowns = int(np.prod(problem.input_shape)) + int(np.prod(problem.target_shape)) * free
    rows = sum(g[0].size for g in problem.gradients.values()) + unknowns
    if not fits_in_memory(8 * (2 * unknowns * rows + 4 * unknowns**2)):
        raise InputError(
            f"an image and its label map, {unknowns} unknowns, take more memory than this machine has free; give the "
            "maps (labels=...)"
        )
    columns = problem.outputs // int(np.prod(problem.target_shape))
    shape = tuple(problem.target_shape), free, columns
    programs = [_map_rows(compare(problem, told), *shape, linear) for linear in (False, True)]
    variables, sent, _ = given(problem, told, np.zeros(1, int))
    for stack in starts:
        middle = to_device(np.full_like(stack[0], 0.5 * sum(problem.input_range)))
        amplitudes = np.ravel(to_natural(to_device(stack[0]) - middle))
        u = np.concatenate([amplitudes, np.zeros(unknowns - amplitudes.size, amplitudes.dtype)])
        for ridge, steps, linear in STAGES:
            if linear:
                u = np.concatenate([u[: amplitudes.size], np.ravel(_shares(_numbers(problem, u, free))[..., 1:])])
            known = variables, sent, middle, to_device(np.asarray(ridge, problem.dtype))
            solution = dense_levenberg_marquardt(
                Rows(*(functools.partial(program, *known) for program in programs[linear])),  # type: ignore[arg-type]
                u,
                size=float(np.sqrt(len(told.sent.gradient))),
                tolerance=10 * problem.tolerances.solve,
                max_steps=steps,
                tell=monitor.tell,
            )
            u = solution.x
            found = _rounded(problem, middle, u, free, linear)
            monitor.tell(f"label map: sure of {100 * found.sure:.0f} % at ridge {ridge:g}")
            if found.sure > SURE or linear:
                yield found
                break


def _rounded(
    problem: Problem, middle: Float[Array, "B ..."], u: Float[np.ndarray, " n"], free: int, linear: bool
) -> Relaxed:
    x = middle + from_natural(to_device(u[: middle.size].reshape(middle.shape), problem.dtype))
    shares = np.asarray(_shares(_numbers(problem, u, free), linear))
    return Relaxed(np.asarray(x), shares.argmax(axis=-1), float(shares.max(axis=-1).mean()))


def _numbers(problem: Problem, u: Float[np.ndarray, " n"], free: int) -> Float[Array, "*space k"]:
    """t of u = (x, t)."""
    return to_device(u[int(np.prod(problem.input_shape)) :].reshape(*problem.target_shape, free), problem.dtype)


def _shares(t: Float[Array, "... k"], linear: bool = False) -> Float[Array, "... K"]:
    """softmax(0, t), each class but the first with a number of its own; or (1 - sum t, t)."""
    if linear:
        return jnp.concatenate([1.0 - jnp.sum(t, axis=-1, keepdims=True), t], axis=-1)
    return jax.nn.softmax(STEEP * jnp.concatenate([jnp.zeros((*t.shape[:-1], 1), t.dtype), t], axis=-1))


@keep(16)
def _map_rows(compare: Compare, space: tuple[int, ...], free: int, columns: int, linear: bool) -> DenseRows:
    """Compiled, of (variables, sent, middle, ridge, u): r, (r, J^T), and with a direction d r''(d, d); u = (x, t).

    The loss takes the shares of the last `columns` classes: all, or with one logit that of class 1.
    """

    def row(
        variables: Arrays, sent: Sent, middle: Float[Array, "B ..."], ridge: Float[Array, ""], u: Float[Array, " n"]
    ) -> Float[Array, " m"]:
        x = middle + from_natural(u[: middle.size].reshape(middle.shape))
        shares = _shares(u[middle.size :].reshape(1, *space, free), linear)
        found = residual_of(compare, variables, sent, shares[..., -columns:])(x)
        return jnp.concatenate([ravel_pytree(found)[0], ridge * u])

    return with_derivatives(row)
