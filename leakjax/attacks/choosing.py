"""Where information is missing, a prior chooses: the likeliest image among all that explain the gradient.

The images that explain it fill a set {u: r(u) = 0}, flat where one layer's linear system is all that is known of u, and
curved behind a pulled-back one. From a point of it the prior is minimized within the null space N of dr/du,

    min_c prior(u + N c),

and Newton steps of least norm lead back to r = 0, until the prior no longer falls.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from leakjax.attacks.path import Path
from leakjax.attacks.problem import Monitor, Problem
from leakjax.attacks.pull_back import Known, arrays, read_known
from leakjax.memory import fits_in_memory
from leakjax.priors import PRIORS
from leakjax.segments import Segment
from leakjax.solvers.descent import descend
from leakjax.solvers.linear import materialize
from leakjax.solvers.null_projection import NullProjection, null_projection

LARGEST = 4000
ROUNDS, STEPS = 8, 300
RETURNING, HALVINGS = 60, 6
_ENOUGH = 3e-3  # of the prior, gained in a round
OPTIMIZER = optax.lbfgs(memory_size=10)


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
    surface = _surface(problem, segments, Known(anchor.x, anchor.dx, anchor.noise, path.victim))
    x, guess = np.asarray(path.x, float).ravel(), n - (path.layers[0].rank or n)
    low, high = problem.input_range
    if max(low - x.min(), x.max() - high) > high - low:  # a start that far out is no image
        x = np.full(n, 0.5 * (low + high))
    tight = max(10 * path.layers[0].residual, 1e-12)  # as well as the image that was there
    best: _Point | None = None
    for _ in range(ROUNDS if len(segments) > 1 else 1):
        space = null_projection(surface.jacobian(x), guess)
        point = None if space is None else surface.settle(x, space)
        if point is None:
            break
        if point.residual > tight:  # too far for one Jacobian
            x = point.x
            continue
        moved = surface.walk(point, tight)
        worse = best is not None and not moved.prior < (1 - _ENOUGH) * best.prior
        best = moved if best is None or moved.prior < best.prior else best
        if worse:
            break
        x = best.x
    if best is None:
        return path
    layers = (dataclasses.replace(path.layers[0], residual=best.residual), *path.layers[1:])
    x, seen = (a.reshape(path.x.shape) for a in (best.x, best.space.seen))
    return dataclasses.replace(path, x=x.astype(path.x.dtype), layers=layers, seen=None if path.seen is None else seen)


class _Point(NamedTuple):
    """u with r(u) = 0, the relative residual that is left, its prior, and what dr/du leaves open there, or near."""

    x: np.ndarray
    residual: float
    prior: float
    space: NullProjection


class _Surface(NamedTuple):
    """The set r(u) = 0: r(u) / size, dr/du / size, the prior, and the way to its least value in a null space."""

    residual: Callable[[np.ndarray], np.ndarray]
    jacobian: Callable[[np.ndarray], np.ndarray]
    prior: Callable[[np.ndarray], float]
    fall: Callable[[np.ndarray, NullProjection], np.ndarray]

    def settle(self, x: np.ndarray, space: NullProjection) -> _Point:
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


def _surface(problem: Problem, segments: tuple[Segment, ...], known: Known) -> _Surface:
    given = arrays(problem, segments, known)
    residual, jacobian, prior, fall = _programs(segments, problem.input_shape, problem.input_range, problem.prior)
    return _Surface(
        lambda x: np.asarray(residual(given, x)),
        lambda x: np.asarray(jacobian(given, x)),
        lambda x: float(prior(x)),
        lambda x, space: np.asarray(fall(x, space.basis, space.null)),
    )


@functools.lru_cache(maxsize=16)
def _programs(segments: tuple[Segment, ...], shape: tuple[int, ...], limits: tuple[float, float], name: str) -> Any:
    low, high = limits
    likely: Any = PRIORS[name]

    def residual(given: Any, x: Array) -> Array:
        _, found = read_known(segments, *given)
        return ravel_pytree(found.function(x.reshape(segments[0].input.shape), None))[0] / found.size

    def jacobian(given: Any, x: Array) -> Array:
        r, tangent = jax.linearize(lambda x: residual(given, x), x)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(x.shape, x.dtype))
        if r.size > x.size:
            return materialize(operator, r)[0]
        return materialize(operator.transpose(), x)[0].T

    def prior(x: Array) -> Array:
        return likely((x.reshape(shape) - low) / (high - low))

    def fall(x: Array, basis: Array, null: bool) -> Array:
        def within(y: Array) -> Array:
            return basis.T @ y if null else y - basis.T @ (basis @ y)

        found = descend(
            lambda y: prior(x + within(y)), jnp.zeros(len(basis) if null else x.size, x.dtype), OPTIMIZER, steps=STEPS
        )
        return within(found.x)

    return jax.jit(residual), jax.jit(jacobian), jax.jit(prior), jax.jit(fall, static_argnums=2)
