"""Where the recursion starts: dL/dz and the input of the last segment, and the label, from its gradient alone.

With a bias (any parameter b of the last affine map with d f / d b constant and of full rank): dz solves
(df/db)^T dz = g_b. Without: g = B(dz, x) is bilinear and of rank one, known up to x -> t x, dz -> dz / t; the scalar t
and the label y solve t dL/dz(f(t x), y) = dz (R-GAP, arXiv 2010.07733, section 3.2, for one logistic output).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Shaped

from leakjax.attacks.heads.rays import ray_of, scalar_roots
from leakjax.attacks.heads.wanted import Wanted, told
from leakjax.constraints.layer import layer_system, loss_pull
from leakjax.models.activations import Preimage
from leakjax.models.losses import LossSpec
from leakjax.models.reader import Arrays
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import LsmrSolution, solve_lsmr
from leakjax.solvers.lsmr import lsmr


class HeadCandidate(NamedTuple):
    """One explanation of a head's gradient: the label, dL/dz, the segment's input x, and how far off it is.

    `residual` = ||dL/dz(f(x), y) - dz|| / ||dz||, 0 where any numbers may be the target; `label` is -1 where the
    `target` is no class, or where nothing is known of it.
    """

    victim: int
    label: int
    dz: Float[np.ndarray, "..."]
    x: Float[np.ndarray, "..."]
    residual: float
    target: Shaped[np.ndarray, "..."] | None = None


class HeadReading(NamedTuple):
    """Candidates of all victims, and the linear solutions behind them (leading axis: victims)."""

    candidates: list[HeadCandidate]
    solution: LsmrSolution


def bias_path(segment: Segment, variables: Arrays) -> str | None:
    """The parameter whose gradient determines dz, or the sum of a batch's, whatever x is; None if there is none.

    It has a constant d f / d b of full row rank.
    """
    outputs = int(np.prod(segment.output.shape[1:]))
    points = np.random.default_rng(0).normal(size=(2, *segment.input.shape)).astype(segment.input.dtype)
    for path in segment.paths:
        size = int(np.prod(variables[path].shape))
        if not outputs <= size <= 4 * outputs:
            continue
        first, second = (np.asarray(_bias_slope(segment, path)(dict(variables), x)) for x in points)
        if np.array_equal(first, second) and np.linalg.matrix_rank(first) == outputs:
            return path
    return None


@keep(64)
def _bias_slope(segment: Segment, path: str) -> Callable[..., Any]:
    """(variables, x) -> d f_0 / d b, (outputs of example 0, entries of b)."""

    def slope(variables: Arrays, x: Array) -> Float[Array, "K b"]:
        def output(b: Array) -> Array:
            return jnp.ravel(segment.function({**variables, path: b}, x)[0])

        by = jax.jacobian(output)(variables[path])
        return by.reshape(len(by), -1)

    return jax.jit(slope)


def read_head(
    segment: Segment,
    variables: Arrays,
    gradients: Mapping[str, Float[Any, "V ..."]],
    loss: LossSpec,
    *,
    wanted: Wanted,
    tolerance: float,
    accept: float,
    count: int | None = None,
) -> HeadReading:
    """All candidates (label, dz, x) of every victim, or of the first `count`, where the others fill a program up.

    Arguments: `gradients` of the last segment's parameters with a leading victim axis; `wanted`, the targets to try;
    `tolerance`, of the linear solves; `accept`, the largest `residual` with which a candidate without bias stands.
    Where nothing is known of the target, a head without bias leaves the scale of x open, and its sign: dz has length 1.
    """
    path = bias_path(segment, variables)
    arrays = {p: np.asarray(gradients[p]) for p in segment.paths}
    if path is not None:
        dz, solution = jax.device_get(_with_bias(segment, path, tolerance)(dict(variables), arrays))
        if wanted.given is None and not wanted.classes:
            return HeadReading([_explained(v, dz[v], solution.x[v], -1) for v in range(len(dz))[:count]], solution)
        classes = np.asarray(wanted.classes, int)
        tried = np.broadcast_to(classes, (len(dz), classes.size)) if wanted.given is None else wanted.given[:, None]
        off = np.asarray(_mismatch(segment, loss)(dict(variables), solution.x, dz, tried))
        candidates = []
        for v in range(len(dz))[:count]:
            least = float(np.min(off[v]))
            best = np.flatnonzero(off[v] <= (max(1e-9, 3 * least) if least < 1e-3 else least))
            for k in best:
                candidates.append(_explained(v, dz[v], solution.x[v], tried[v, k], float(off[v, k])))
        return HeadReading(candidates, solution)
    direction, solution = jax.device_get(_rank_one(segment, tolerance)(dict(variables), arrays))
    if wanted.free:
        return HeadReading(_either_sign(segment, variables, direction[:count], solution.x), solution)
    candidates = []
    for v, roots in enumerate(scalar_roots(segment, variables, loss, direction, solution.x, wanted, count)):
        best = min((root.residual for root in roots), default=np.inf)
        for t, tag, residual in roots:
            if residual <= max(accept, 10 * best):
                dz, x = (direction[v] / t).astype(direction.dtype), solution.x[v] * solution.x.dtype.type(t)
                candidates.append(_explained(v, dz, x, tag, residual))
    return HeadReading(candidates, solution)


def _explained(
    victim: int, dz: Float[np.ndarray, "..."], x: Float[np.ndarray, "..."], tag: Any, residual: float = 0.0
) -> HeadCandidate:
    label, target = told(tag)
    return HeadCandidate(victim=victim, label=label, dz=dz, x=x, residual=residual, target=target)


def _either_sign(
    segment: Segment, variables: Arrays, dz: Float[np.ndarray, "V ..."], x: Float[np.ndarray, "V ..."]
) -> list[HeadCandidate]:
    """(dz, x) and (-dz, -x) of every victim, of which nothing tells the scale; their target is dL/d(outputs)."""
    found = []
    for v, one in enumerate(dz):
        for sign in (1, -1):
            z = segment.function(dict(variables), jnp.asarray(sign * x[v]))
            slope = np.asarray(segment.activation.slope(dict(variables), z))
            target = np.ravel(sign * one / np.where(slope != 0, slope, 1.0))
            found.append(_explained(v, sign * one, sign * x[v], target))
    return found


def read_input(
    segment: Segment, variables: Arrays, gradient: Mapping[str, Float[Any, "..."]], tolerance: float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(dz, x) of one gradient of a head with bias: dL/dz as it was sent, and the input, whatever factor dz has."""
    path = bias_path(segment, variables)
    assert path is not None, "the head has no bias"
    arrays = {p: np.asarray(gradient[p])[None] for p in segment.paths}
    dz, solution = _with_bias(segment, path, tolerance)(dict(variables), arrays)
    return dz[0], solution.x[0]


def read_ray(
    segment: Segment, variables: Arrays, gradient: Mapping[str, Float[Any, "..."]], loss: LossSpec, tolerance: float
) -> tuple[
    Float[Array, "..."], Float[Array, "..."], Callable[[Float[Array, " T"], Shaped[Array, "..."]], Float[Array, "T K"]]
]:
    """Of one gradient of a head without bias: dz / ||dz||, f(x) - f(0), and (t (T,), target) ->
    t dL/dz(f(t x), target), (T, K)."""
    arrays = {p: np.asarray(gradient[p])[None] for p in segment.paths}
    direction, solution = _rank_one(segment, tolerance)(dict(variables), arrays)
    return direction[0], *ray_of(segment, variables, loss, solution.x[0])


def unknown_output(segment: Segment, dtype: Any) -> Preimage:
    """Of an output of which nothing is known: no forward row counts."""
    zeros = jnp.zeros(segment.output.shape, dtype)
    return Preimage(zeros, zeros.astype(bool), zeros, jnp.ones_like(zeros, bool))


def _input_from_gradient(
    segment: Segment,
    variables: Arrays,
    dz: Float[Array, "..."],
    gradient: Mapping[str, Float[Array, "..."]],
    tolerance: float,
) -> LsmrSolution:
    system = layer_system(segment, variables, unknown_output(segment, dz.dtype), dz, gradient)
    return solve_lsmr(system.operator, system.vector, tolerance=tolerance, max_steps=500)


@keep(32)
def _with_bias(
    segment: Segment, path: str, tolerance: float
) -> Callable[..., tuple[Float[Array, "..."], LsmrSolution]]:
    def solve(
        variables: Arrays, gradient: Mapping[str, Float[Array, "..."]]
    ) -> tuple[Float[Array, "..."], LsmrSolution]:
        zero = jnp.zeros(segment.input.shape, segment.input.dtype)
        outputs = int(np.prod(segment.output.shape))

        def output(b: Float[Array, "..."]) -> Float[Array, " K"]:
            return jnp.ravel(segment.function({**variables, path: b}, zero))

        slope = jax.jacobian(output)(variables[path]).reshape(outputs, -1)
        dz = jnp.linalg.lstsq(slope.T, jnp.ravel(gradient[path]))[0].reshape(segment.output.shape)
        return dz, _input_from_gradient(segment, variables, dz, gradient, tolerance)

    return jax.jit(vmap_several(solve, (None, 0)))


@keep(32)
def _mismatch(segment: Segment, loss: LossSpec) -> Callable[..., Float[Array, "V L"]]:
    def off(
        variables: Arrays, x: Float[Array, "..."], dz: Float[Array, "..."], labels: Shaped[Array, "L ..."]
    ) -> Float[Array, " L"]:
        z = segment.function(variables, x)
        pulls = jax.vmap(lambda y: loss_pull(segment, variables, loss, z, y[None]))(labels)
        return jnp.linalg.norm((pulls - dz[None]).reshape(len(labels), -1), axis=1) / jnp.linalg.norm(dz)

    return jax.jit(vmap_several(off, (None, 0, 0, 0)))


@keep(32)
def _rank_one(segment: Segment, tolerance: float) -> Callable[..., tuple[Float[Array, "..."], LsmrSolution]]:
    """Factors of g = B(dz, x), ||dz|| = 1, by alternating least squares: one round is exact where B is a product."""

    def direction_of(
        variables: Arrays, x: Float[Array, "..."], gradient: Mapping[str, Float[Array, "..."]]
    ) -> Float[Array, "..."]:
        weights = {p: variables[p] for p in segment.paths}
        pull = jax.vjp(lambda w: segment.function({**variables, **w}, x), weights)[1]
        struct = jax.ShapeDtypeStruct(segment.output.shape, x.dtype)
        operator = lx.FunctionLinearOperator(lambda u: pull(u)[0], struct)
        return lsmr(operator, gradient, tolerance=tolerance, max_steps=200).x

    def factor(
        variables: Arrays, gradient: Mapping[str, Float[Array, "..."]]
    ) -> tuple[Float[Array, "..."], LsmrSolution]:
        gradient = {p: gradient[p] for p in segment.paths}

        def improve(dz: Float[Array, "..."], _: None) -> tuple[Float[Array, "..."], LsmrSolution]:
            solution = _input_from_gradient(segment, variables, dz / jnp.linalg.norm(dz), gradient, tolerance)
            return direction_of(variables, solution.x, gradient), solution

        dz = jax.random.normal(jax.random.key(2), segment.output.shape, segment.input.dtype)
        dz, solutions = jax.lax.scan(improve, dz, None, length=3)
        solution, size = jax.tree.map(lambda a: a[-1], solutions), jnp.linalg.norm(dz)
        return dz / size, solution._replace(x=solution.x * size)

    return jax.jit(vmap_several(factor, (None, 0)))
