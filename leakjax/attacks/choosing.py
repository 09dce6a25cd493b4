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
from leakjax.solvers.row_space import RowSpace, row_space

LARGEST = 4000
ROUNDS, STEPS = 12, 150
SETTLING, RETURNING, HALVINGS = 12, 6, 6
ROUNDED = 1e-12  # a residual below it is rounding
_ENOUGH = 1e-3  # of the prior, gained in a round
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
    own = np.asarray(path.x, float).ravel()
    starts = [own] if len(segments) == 1 else [np.full(n, np.mean(problem.input_range)), own]
    found = next((point for start in starts if (point := surface.settle(start, problem.matched)) is not None), None)
    if found is None:
        return path
    for _ in range(ROUNDS if len(segments) > 1 else 1):
        moved = surface.walk(found)
        settled = None if moved is None else surface.settle(moved, problem.matched)
        if settled is None or not settled.prior < found.prior:
            break
        gained, found = 1 - settled.prior / found.prior, settled
        if gained <= _ENOUGH:
            break
    layers = (dataclasses.replace(path.layers[0], residual=found.residual), *path.layers[1:])
    x, seen = (a.reshape(path.x.shape) for a in (found.x, found.space.seen))
    return dataclasses.replace(path, x=x.astype(path.x.dtype), layers=layers, seen=None if path.seen is None else seen)


class _Point(NamedTuple):
    """u with r(u) = 0, the relative residual that is left, its prior, and the row space of dr/du there."""

    x: np.ndarray
    residual: float
    prior: float
    space: RowSpace


class _Surface(NamedTuple):
    """The set r(u) = 0: r(u) / size, dr/du / size, the prior, and the least prior within a tangent space."""

    residual: Callable[[np.ndarray], np.ndarray]
    jacobian: Callable[[np.ndarray], np.ndarray]
    prior: Callable[[np.ndarray], float]
    fall: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def settle(self, x: np.ndarray, matched: float) -> _Point | None:
        """The point that Newton steps of least norm reach from x; None where they do not match."""
        r, space = self.residual(x), row_space(self.jacobian(x))
        for _ in range(SETTLING):
            x, r, fell = self._return(x, r, space)
            if np.linalg.norm(r) <= ROUNDED or not fell:
                break
            space = row_space(self.jacobian(x))
        size = float(np.linalg.norm(r))
        return _Point(x, size, self.prior(x), space) if size <= matched else None

    def walk(self, point: _Point) -> np.ndarray | None:
        """Along the tangent space to the least prior, as far as steps back with the same row space find a lower one."""
        move = self.fall(point.x, point.space.rows)
        for halving in range(HALVINGS):
            x = point.x + 0.5**halving * move
            x, r, _ = self._return(x, self.residual(x), point.space)
            if np.linalg.norm(r) < 1e-3 and self.prior(x) < point.prior:
                return x
        return None

    def _return(self, x: np.ndarray, r: np.ndarray, space: RowSpace) -> tuple[np.ndarray, np.ndarray, bool]:
        """Steps of least norm with one row space, as long as the residual falls at least by a fourth."""
        for step in range(RETURNING):
            trial = x - space.solve(r)
            new = self.residual(trial)
            if not np.linalg.norm(new) < 0.75 * np.linalg.norm(r):
                return x, r, step > 0
            x, r = trial, new
        return x, r, True


def _surface(problem: Problem, segments: tuple[Segment, ...], known: Known) -> _Surface:
    given = arrays(problem, segments, known)
    residual, jacobian, prior, fall = _programs(segments, problem.input_shape, problem.input_range, problem.prior)
    return _Surface(
        lambda x: np.asarray(residual(given, x)),
        lambda x: np.asarray(jacobian(given, x)),
        lambda x: float(prior(x)),
        lambda x, rows: np.asarray(fall(x, rows)),
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

    def fall(x: Array, rows: Array) -> Array:
        def within(y: Array) -> Array:
            return y - rows.T @ (rows @ y)

        found = descend(lambda y: prior(x + within(y)), jnp.zeros_like(x), OPTIMIZER, steps=STEPS)
        return within(found.x)

    return tuple(jax.jit(f) for f in (residual, jacobian, prior, fall))
