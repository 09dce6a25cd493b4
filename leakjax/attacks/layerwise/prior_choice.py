"""Where information is missing, a prior chooses: the likeliest image among all that explain the gradient.

The images that explain it fill a set {u: r(u) = 0}, flat where one layer's linear system is all that is known of u, and
curved behind a pulled-back one. From a point of it the prior is minimized within the null space N of dr/du,

    min_c prior(u + N c) + w ||h (act(f(u + N c) +- margin) - x_next)||^2 / ||x_next||^2,

and Newton steps of least norm lead back to r = 0, until the prior no longer falls. The second term holds what is known
of entries h whose preimage is not: behind a ReLU's zero lies some z <= 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from leakjax.attacks.layerwise.path import Path
from leakjax.attacks.layerwise.pull_back import Given, Known, arrays, read_known
from leakjax.attacks.problem import Monitor, Problem
from leakjax.constraints.priors import PRIORS
from leakjax.constraints.pull_back import push_forward
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.solvers.descent import descend
from leakjax.solvers.linear import materialize
from leakjax.solvers.null_projection import NullProjection, null_projection

LARGEST = 4000
ROUNDS, STEPS, CURVED_STEPS = 8, 1500, 100
RETURNING, HALVINGS = 60, 6
HIDDEN = (300.0, 1e4, 1e6)  # weights of entries that a mask hides, heavier where they do not stay hidden
MARGIN = 0.02  # how far from the mask's edge they are kept
_HIDDEN = 1e-16  # what they may show, squared and relative
_ENOUGH = 3e-3  # of the prior, gained in a round


def choose(problem: Problem, monitor: Monitor, path: Path) -> Path:
    """`path` with its image moved to where the prior is least among those that match as well, where it is left open.

    The image stays as it is where it is too large for dense matrices, or no image is found that matches.
    """
    anchor, n = path.source, path.x.size
    if anchor is None or path.layers[0].status != "deficient" or PRIORS[problem.prior] is None:
        return path
    segments = problem.segments[: anchor.position + 1]
    rows = sum(problem.gradients[p][0].size for s in segments for p in s.paths) + int(
        np.prod(segments[-1].output.shape)
    )
    if n > LARGEST or not fits_in_memory(8 * 5 * rows * n):
        return path
    monitor.tell(f"choosing what {segments[-1].name} leaves open")
    known = Known(anchor.x, anchor.dx, anchor.noise, path.victim)
    surface = _surface(problem, segments, known, HIDDEN[0])
    own, guess = np.asarray(path.x, float).ravel(), 0 if path.layers[0].rank is None else n - path.layers[0].rank
    low, high = problem.input_range
    far = max(low - own.min(), own.max() - high) > high - low  # no image: the middle of the range is a better start
    tight = max(10 * path.layers[0].residual, 1e-12)  # as well as the image that was there
    rounds = ROUNDS if len(segments) > 1 else 1
    starts = [np.full(n, 0.5 * (low + high)), own] if far else [own]
    found = (_best(surface, start, guess, tight, rounds) for start in starts if np.all(np.isfinite(start)))
    best = next((point for point in found if point is not None), None)
    for weight in HIDDEN[1:]:
        if best is None or surface.shown(best.x) <= _HIDDEN:
            break
        surface = _surface(problem, segments, known, weight)
        best = _best(surface, best.x, guess, tight, rounds) or best
    if best is None:
        return path
    layers = (dataclasses.replace(path.layers[0], residual=best.residual), *path.layers[1:])
    x, seen = (a.reshape(path.x.shape) for a in (best.x, best.space.seen))
    return dataclasses.replace(path, x=x.astype(path.x.dtype), layers=layers, seen=None if path.seen is None else seen)


def _best(surface: "_Surface", x: Float[np.ndarray, " n"], guess: int, tight: float, rounds: int) -> "_Point | None":
    """The likeliest point that the rounds reach from x; None where none of them meets r = 0 as tightly as asked."""
    best, residual = None, np.inf
    for _ in range(rounds):
        space = null_projection(surface.jacobian(x), guess)
        if space is None:
            break
        point = surface.settle(x, space)
        if point.residual > tight:  # too far for one Jacobian
            if best is not None or point.residual > 0.5 * residual:
                break
            x, residual = point.x, point.residual
            continue
        moved = surface.walk(point, tight)
        if best is not None and not moved.prior < (1 - _ENOUGH) * best.prior:
            return moved if moved.prior < best.prior else best
        best, x = moved, moved.x
    return best


class _Point(NamedTuple):
    """u with r(u) = 0, the relative residual that is left, its prior, and what dr/du leaves open there, or near."""

    x: Float[np.ndarray, " n"]
    residual: float
    prior: float
    space: NullProjection


class _Surface(NamedTuple):
    """The set r(u) = 0: r(u) / size, dr/du / size, the prior, the way to its least value in a null space, and what
    entries show that a mask should hide."""

    residual: Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, " m"]]
    jacobian: Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, "m n"]]
    prior: Callable[[Float[np.ndarray, " n"]], float]
    fall: Callable[[Float[np.ndarray, " n"], NullProjection], Float[np.ndarray, " n"]]
    shown: Callable[[Float[np.ndarray, " n"]], float]

    def settle(self, x: Float[np.ndarray, " n"], space: NullProjection) -> _Point:
        """Steps of least norm with one Jacobian, as long as the residual falls by a fourth."""
        r = self.residual(x)
        for _ in range(RETURNING):
            trial = x - space.solve(r)
            new = self.residual(trial)
            if not np.linalg.norm(new) < 0.75 * np.linalg.norm(r):
                break
            x, r = trial, new
        return _Point(x, float(np.linalg.norm(r)), self.prior(x), space)

    def walk(self, point: _Point, matched: float) -> _Point:
        """Towards the least prior in the null space, as far as there is a way back to r = 0 that leaves it lower."""
        move = self.fall(point.x, point.space)
        for halving in range(HALVINGS):
            moved = self.settle(point.x + 0.5**halving * move, point.space)
            if moved.residual <= matched and moved.prior < point.prior:
                return moved
        return point


def _surface(problem: Problem, segments: tuple[Segment, ...], known: Known, weight: float) -> _Surface:
    given = arrays(problem, segments, known)
    programs = _programs(segments, problem.input_shape, problem.input_range, problem.prior, problem.optimizer)
    residual, jacobian, prior, fall, shown = programs
    return _Surface(
        residual=lambda x: np.asarray(residual(given, x)),
        jacobian=lambda x: np.asarray(jacobian(given, x)),
        prior=lambda x: float(prior(given, x, weight)),
        fall=lambda x, space: np.asarray(fall(given, x, weight, space.basis, space.null)),
        shown=lambda x: float(shown(given, x)),
    )


@keep(16)
def _programs(
    segments: tuple[Segment, ...],
    shape: tuple[int, ...],
    limits: tuple[float, float],
    name: str,
    optimizer: optax.GradientTransformation,
) -> tuple[
    Callable[..., Float[Array, " m"]],
    Callable[..., Float[Array, "m n"]],
    Callable[..., Float[Array, ""]],
    Callable[..., Float[Array, " n"]],
    Callable[..., Float[Array, ""]],
]:
    low, high = limits
    likely: Any = PRIORS[name]
    steps = STEPS if len(segments) == 1 else CURVED_STEPS  # a curved set is left behind soon

    def residual(given: Given, x: Float[Array, " n"]) -> Float[Array, " m"]:
        _, found = read_known(segments, *given)
        return ravel_pytree(found.function(x.reshape(segments[0].input.shape), None))[0] / found.size

    def jacobian(given: Given, x: Float[Array, " n"]) -> Float[Array, "m n"]:
        r, tangent = jax.linearize(lambda x: residual(given, x), x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        if r.size > x.size:
            return materialize(operator, r)[0]
        return materialize(operator.transpose(), x)[0].T

    top = segments[-1]

    def hidden(given: Given, x: Float[Array, " n"], margin: float) -> Float[Array, ""]:
        variables, x_next, _, noise, _ = given
        x_next = x_next.reshape(top.output.shape)
        known = top.activation.preimage(variables, x_next, noise).known
        z = push_forward(segments, variables, x.reshape(segments[0].input.shape))[1][-1]
        scale = jnp.sqrt(jnp.maximum(jnp.mean(x_next**2), jnp.finfo(x.dtype).tiny))
        inside = (top.activation.function(variables, z + side * margin * scale) for side in (-1, 1))
        return sum(jnp.sum(jnp.where(known, 0.0, x - x_next) ** 2) for x in inside) / scale**2

    def prior(given: Given, x: Float[Array, " n"], weight: Float[Array, ""]) -> Float[Array, ""]:
        images = (x.reshape(-1, *shape) - low) / (high - low)
        return jnp.sum(jax.vmap(likely)(images)) + weight * hidden(given, x, MARGIN)

    def fall(
        given: Given, x: Float[Array, " n"], weight: Float[Array, ""], basis: Float[Array, "r n"], null: bool
    ) -> Float[Array, " n"]:
        def within(y: Float[Array, " c"]) -> Float[Array, " n"]:
            return basis.T @ y if null else y - basis.T @ (basis @ y)

        found = descend(
            lambda y: prior(given, x + within(y), weight),
            jnp.zeros(len(basis) if null else x.size, x.dtype),
            optimizer,
            steps=steps,
        )
        return within(found.x)

    def shown(given: Given, x: Float[Array, " n"]) -> Float[Array, ""]:
        return hidden(given, x, 0.0)

    return jax.jit(residual), jax.jit(jacobian), jax.jit(prior), jax.jit(fall, static_argnums=4), jax.jit(shown)
