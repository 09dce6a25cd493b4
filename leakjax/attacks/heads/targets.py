"""Targets that may be any numbers: what dL/dz at the head says of them, and what it leaves open.

Where a loss compares the outputs with numbers that nobody but the client knows, dL/dz may be anything: it is taken from
the head's bias as it was sent, and the target is what explains it. The images behind it do not depend on which loss it
was: they are solved as under <z, t>, whose dL/dz is t itself. A head without bias gives dz up to a factor only, of
either sign.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from leakjax.attacks.heads.single import bias_path, read_input
from leakjax.attacks.heads.unique import is_affine, is_monotone, solve_bits
from leakjax.attacks.problem import Problem
from leakjax.constraints.layer import loss_pull
from leakjax.constraints.pull_back import push_forward
from leakjax.errors import InputError
from leakjax.models.losses import UNKNOWN, LossSpec
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment

_STEPS = 40  # of Newton's method: one for losses whose dL/dz is affine in the target
_HALVINGS = 8  # of a step that overshoots, as toward the flat ends of log cosh
_FIT = 1e-6  # of dL/dz: what a target may leave of it and still be told
_SHARE = 1e-3  # off 0 and off their sum by more, what a gradient in float32 gives are no probabilities
_FLAT = 1e-10  # of the largest singular value: directions of the target below it leave dL/dz as it is


def freed(problem: Problem) -> Problem:
    """The problem with dL/dz of every gradient as its target, where any numbers may be one, or where a bias shows dL/dz
    and labels are zeros and ones, which are read when the image is known."""
    if not (problem.free or problem.several) or problem.chain is None or problem.examples > 1:
        return problem
    head = problem.segments[-1]
    if not (head.linear and head.paths):
        return problem
    biased = bias_path(head, problem.variables) is not None
    if (problem.several or problem.target_kind == "classes") and not biased:
        return problem
    targets = tuple(_pull_of(problem, head, victim) for victim in range(problem.victims)) if biased else ()
    return dataclasses.replace(
        problem, loss=UNKNOWN, target_kind="values", target_shape=(problem.outputs,), targets=targets
    )


def shares_positions(problem: Problem) -> bool:
    """Whether the head is one for all positions of a label map: its gradient is a sum over them, and shows neither its
    input nor dL/dz."""
    if problem.target_kind != "classes" or problem.chain is None:
        return False
    head = problem.segments[-1]
    return not (head.linear and head.paths) or bias_path(head, problem.variables) is None


def _pull_of(problem: Problem, head: Segment, victim: int) -> Float[np.ndarray, " K"]:
    """t with act'(z) t = dz, dL/dz as it was sent."""
    gradient = {p: problem.gradients[p][victim] for p in head.paths}
    dz, x = read_input(head, problem.variables, gradient, problem.tolerances.solve)
    z = head.function(dict(problem.variables), to_device(x))
    t = solve_target(head, UNKNOWN, problem.variables, z, dz, (problem.outputs,), fit=np.inf)
    assert t is not None
    return t


def pull_at(
    problem: Problem, x: Float[np.ndarray, "*image"], target: Shaped[np.ndarray, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(z, dL/dz) of the last layer for an image x with its target, under the problem's loss."""
    variables = dict(problem.variables)
    z = push_forward(problem.segments, variables, to_device(x[None], problem.dtype))[1][-1]
    tags = np.asarray(target)[None]
    tags = to_device(tags, problem.dtype if tags.dtype.kind == "f" else None)
    return z, loss_pull(problem.segments[-1], variables, problem.loss, z, tags)


def solve_target(
    head: Segment,
    loss: LossSpec,
    variables: Arrays,
    z: Float[Array, "..."],
    dz: Float[Array, "..."],
    shape: Sequence[int],
    *,
    fit: float = _FIT,
    shares: bool = False,
) -> Float[np.ndarray, "..."] | None:
    """The one target t of `shape` with dL/dz(z, t) = dz; None where none comes nearer than `fit`, relatively, or where
    others may explain dz as well (`heads.unique`).

    By Newton's method from the outputs, each step of minimum norm and halved until it comes nearer. A cross entropy
    says nothing of the sum of its target: that of probabilities, `shares` of 1, is known.
    """
    pull, slope = _pull(head, loss, tuple(shape))
    outputs = np.asarray(head.activation.function(dict(variables), z), float)
    sent, t = (
        np.ravel(dz).astype(float),
        outputs.reshape(shape) if outputs.size == math.prod(shape) else np.zeros(shape),
    )
    size = float(np.linalg.norm(sent)) or 1.0

    def left_at(t: Float[np.ndarray, "..."]) -> Float[np.ndarray, " K"]:
        return sent - np.asarray(pull(dict(variables), z, to_device(t, z.dtype)), float)

    def slope_at(t: Float[np.ndarray, "..."]) -> Float[np.ndarray, "K n"]:
        found = np.asarray(slope(dict(variables), z, to_device(t, z.dtype)), float).reshape(sent.size, -1)
        if not np.all(np.isfinite(found)):
            raise ValueError("dL/dz has no derivative by its target here")
        return found

    try:
        left, by = left_at(t), slope_at(t)
        for _ in range(_STEPS):
            step = np.linalg.lstsq(by, left, rcond=_FLAT)[0].reshape(shape)
            tried = [(np.linalg.norm(left_at(t + s * step)), s) for s in 0.5 ** np.arange(_HALVINGS)]
            least, s = min(tried)
            if not least < 0.5 * np.linalg.norm(left):
                break
            t, left = t + s * step, left_at(t + s * step)
            by = slope_at(t)
        if not np.linalg.norm(left) <= fit * size:
            return None
        if loss != UNKNOWN and not is_monotone(loss):
            far = 1.0 + float(np.max(np.abs(outputs), initial=0.0)) + float(np.max(np.abs(t), initial=0.0))
            if not is_affine(slope_at, t, far):
                return None
    except (InputError, TypeError, ValueError, np.linalg.LinAlgError):  # the loss takes no such target
        return None
    return _the_only(t, by, shares=shares)


def _the_only(
    t: Float[np.ndarray, "..."], slope: Float[np.ndarray, "K n"], *, shares: bool
) -> Float[np.ndarray, "..."] | None:
    """t where `slope` leaves no direction open; of probabilities, where it leaves one in which all entries grow, those
    that sum to 1; None elsewhere."""
    _, values, turn = np.linalg.svd(slope)
    open_rows = turn[np.append(values, np.zeros(len(turn) - len(values))) <= _FLAT * values[0]]
    if len(open_rows):
        along = open_rows[0] * np.sign(open_rows[0].sum())
        if not shares or len(open_rows) > 1 or along.size < 2 or np.min(along) <= _FLAT:
            return None
        t = t + ((1.0 - t.sum()) / along.sum() * along).reshape(t.shape)
    return None if shares and (t.min() < -_SHARE or abs(t.sum() - 1.0) > _SHARE) else t


def solve_labels(
    head: Segment,
    loss: LossSpec,
    variables: Arrays,
    z: Float[Array, "..."],
    dz: Float[Array, "..."],
    shape: Sequence[int],
    *,
    scaled: bool,
    fit: float,
) -> tuple[Int[np.ndarray, "..."] | None, float]:
    """The zeros and ones of `shape` that alone explain dz, and the factor of it; see `unique.solve_bits`."""
    pulls = _pulls_of(head, loss, tuple(shape))

    def pull(targets: Float[np.ndarray, "L ..."]) -> Float[np.ndarray, "L K"]:
        return np.asarray(pulls(dict(variables), z, to_device(targets.astype(np.int64))), float)

    return solve_bits(pull, np.ravel(dz).astype(float), shape, scaled=scaled, fit=fit)


@keep(32)
def _pulls_of(head: Segment, loss: LossSpec, shape: tuple[int, ...]) -> Callable[..., Float[Array, "L K"]]:
    """(variables, z, targets (L, ...)) -> dL/dz of each, flat."""

    def pulls(variables: Arrays, z: Float[Array, "..."], targets: Int[Array, "L ..."]) -> Float[Array, "L K"]:
        return jax.lax.map(lambda t: jnp.ravel(loss_pull(head, variables, loss, z, t.reshape(1, *shape))), targets)

    return jax.jit(pulls)


@keep(32)
def _pull(
    head: Segment, loss: LossSpec, shape: tuple[int, ...]
) -> tuple[Callable[..., Float[Array, " K"]], Callable[..., Float[Array, "K ..."]]]:
    """(variables, z, t) -> dL/dz, flat, and its derivative by t."""

    def pull(variables: Arrays, z: Float[Array, "..."], t: Float[Array, "..."]) -> Float[Array, " K"]:
        return jnp.ravel(loss_pull(head, variables, loss, z, t.reshape(1, *shape)))

    return jax.jit(pull), jax.jit(jax.jacobian(pull, argnums=2))
