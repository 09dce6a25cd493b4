"""One step of the recursion without iterations on the whole layer: by the small matrix of its gradient block, by the
factor of its weights, or by both.

Every answer is checked by the layer's own equations, as LSMR's are: its residual over all rows, and a random input that
must come back from what the layer would show of it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from leakjax.attacks.layerwise.system import build_system, slope_floor
from leakjax.attacks.problem import Problem
from leakjax.constraints.channel_reading import read_channels
from leakjax.constraints.channels import Channels, channel_matrix
from leakjax.constraints.layer import LayerSystem, Rows
from leakjax.models.reader import Arrays
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.devices import spread
from leakjax.runtime.memory import available_bytes
from leakjax.runtime.programs import Shelf, keep
from leakjax.segments.chain import Segment
from leakjax.solvers.banded import BandedFactor, factor_gram, solve_banded
from leakjax.solvers.kronecker import BlockSolution, solve_blocks, solve_full, spectrum
from leakjax.solvers.linear import largest_singular_value, relative_residual

MOST_POSITIONS = 512
"""Positions up to which K1's spectrum is found: 9 n^3 operations, 1.2 GFLOP, about as many as 600 steps of LSMR."""

_POWER = 6  # steps of an inverse power iteration from a random start: the least singular value to a few per cent
_PRODUCTS = 32  # inputs that F^T F is applied to at once
_SHARE = 8  # of the free memory, what one factor may take


class Factor(NamedTuple):
    """The factor of F^T F, and the least singular value of F."""

    banded: BandedFactor
    least: Float[Array, ""]


class _Kind(NamedTuple):
    """A segment that is solved through its `channels`; whether their K1 has `full` column rank by itself."""

    channels: Channels
    full: bool


class Route(NamedTuple):
    """How a segment is solved: through its channels, or by the `factor` of its weights."""

    kind: _Kind | None
    factor: Factor | None


class DirectSolution(NamedTuple):
    """Of one system: x, its relative residual and what a random probe lost; what its condition is estimated from.

    `largest`: singular value of A; `least`: of what was solved at once; `steps`: of LSMR on the
    rest, for the system and for the probe; `recorded`, those whose `alphas` and `betas` are given.
    """

    x: Float[Array, "..."]
    residual: Float[Array, ""]
    lost: Float[Array, ""]
    largest: Float[Array, ""]
    least: Float[Array, ""]
    steps: Int[Array, " 2"]
    recorded: Int[Array, " 2"]
    alphas: Float[Array, "2 max_steps"]
    betas: Float[Array, "2 max_steps"]


def routes(problem: Problem, segments: Sequence[Segment]) -> dict[Segment, Route]:
    """The segments that are solved directly, and how. Only float64, for clients of that precision: the noise of others
    is weighed by a least-squares solution of all rows at once, which a solution block by block is not."""
    if problem.solver != "auto" or not slope_floor(problem):
        return {}
    linear = [s for s in segments if s.linear and s.paths]
    found = {}
    readings = read_channels(linear, problem.variables, MOST_POSITIONS) if linear else []
    for segment, reading in zip(linear, readings, strict=True):
        if "gradient" not in problem.blocks(segment):
            continue
        if reading is not None and reading.channels.sizes(segment.input.shape)[0] <= MOST_POSITIONS:
            found[segment] = Route(_Kind(reading.channels, bool(reading.full)), None)
        elif "forward" in problem.blocks(segment):
            factor = _factor(problem, segment)
            if factor is not None:
                found[segment] = Route(None, factor)
    return found


_FACTORS: Shelf[Factor | None] = Shelf(16)


def _factor(problem: Problem, segment: Segment) -> Factor | None:
    """The factor of the segment's weights, made once for them."""
    shape = segment.input.shape
    if len(shape) < 3 or np.prod(segment.output.shape) < np.prod(shape):
        return None
    if segment.activation.is_flat(dict(problem.variables), problem.dtype):
        return None
    key = (segment, _digest(problem.variables))
    if key in _FACTORS:
        return _FACTORS.get(key)
    program, one = _gram(segment), shape[1:]

    def product(v: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
        padded = np.concatenate([v, np.zeros((-len(v) % _PRODUCTS, v.shape[1]))])
        parts = [program(dict(problem.variables), part) for part in padded.reshape(-1, _PRODUCTS, *one)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(v)].reshape(len(v), -1)

    banded = factor_gram(product, one, available_bytes() // _SHARE)
    if banded is None:
        return _FACTORS.put(key, None)
    return _FACTORS.put(key, Factor(banded, _least(banded, int(np.prod(one)))))


def _digest(variables: Arrays) -> bytes:
    found = hashlib.blake2b()
    for path in sorted(variables):
        found.update(path.encode())
        found.update(np.ascontiguousarray(variables[path]).tobytes())
    return found.digest()


@keep(32)
def _gram(segment: Segment) -> Any:
    """F^T F on inputs of the first example; the others are alike."""

    def gram(variables: Arrays, v: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
        def of_one(v: Float[Array, "..."]) -> Float[Array, "..."]:
            zero = jnp.zeros(segment.input.shape, v.dtype)
            _, tangent = jax.linearize(lambda x: segment.function(variables, x), zero)
            return jax.linear_transpose(tangent, zero)(tangent(zero.at[0].set(v)))[0][0]

        return jax.vmap(of_one)(v)

    return jax.jit(gram)


@jax.jit
def _inverse_power(banded: BandedFactor, start: Float[Array, "n 1"]) -> Float[Array, ""]:
    def step(v: Float[Array, "n 1"], _: None) -> tuple[Float[Array, "n 1"], Float[Array, ""]]:
        v = solve_banded(banded, v / jnp.linalg.norm(v))
        return v, jnp.linalg.norm(v)

    return jax.lax.scan(step, start, None, length=_POWER)[1][-1]


def _least(banded: BandedFactor, unknowns: int) -> Float[Array, ""]:
    start = np.random.default_rng(0).normal(size=(unknowns, 1))
    return 1.0 / jnp.sqrt(_inverse_power(banded, jnp.asarray(start, banded.inverse.dtype)))


@keep(128)
def lowered(
    segment: Segment, kind: _Kind | None, floor: float, blocks: tuple[str, ...], devices: tuple[Any, ...]
) -> Any:
    """The jitted step of a segment: (variables, factor, x, dx, noise, tolerance, gradient) -> (solution, dL/dx), of
    several clients at once."""

    def step(
        variables: Arrays,
        factor: Factor | None,
        x: Float[Array, "..."],
        dx: Float[Array, "..."],
        noise: Float[Array, ""],
        tolerance: Float[Array, ""],
        gradient: Mapping[str, Float[Array, "..."]],
    ) -> tuple[DirectSolution, Float[Array, "..."]]:
        dz, system = build_system(segment, variables, x, dx, noise, gradient, floor, blocks)
        product = system.operator.mv
        probe = jax.random.normal(jax.random.key(0), segment.input.shape, dz.dtype)
        sides = jax.tree.map(lambda b, r: jnp.stack([b, r]), system.vector, product(probe))
        if kind is not None:
            answer = _by_channels(segment, kind, product, sides, probe)
        else:
            assert factor is not None
            answer = _by_factor(segment, variables, factor, system, sides, probe)
        found = DirectSolution(
            x=answer.x[0],
            residual=relative_residual(system.operator, system.vector, answer.x[0]),
            lost=jnp.linalg.norm(answer.x[1] - probe) / jnp.linalg.norm(probe),
            largest=answer.largest,
            least=answer.least,
            steps=answer.steps,
            recorded=answer.recorded,
            alphas=answer.alphas,
            betas=answer.betas,
        )
        pulled = jax.vjp(lambda x: segment.function(variables, x), found.x)[1](dz)[0]
        return found, pulled

    return jax.jit(spread(vmap_several(step, (None, None, 0, 0, 0, 0, 0)), devices, shared=2, split=5))


class _Answer(NamedTuple):
    """The inputs of both sides, and the rest as `DirectSolution` has it."""

    x: Float[Array, "2 ..."]
    largest: Float[Array, ""]
    least: Float[Array, ""]
    steps: Int[Array, " 2"]
    recorded: Int[Array, " 2"]
    alphas: Float[Array, "2 max_steps"]
    betas: Float[Array, "2 max_steps"]


def _by_channels(
    segment: Segment,
    route: _Kind,
    product: Callable[[Float[Array, "..."]], Rows],
    sides: Rows,
    probe: Float[Array, "..."],
) -> _Answer:
    shape, (channels, full) = segment.input.shape, route
    small = channel_matrix(channels, lambda x: product(x)[1], shape, probe.dtype)
    rows, positions = small.shape

    def forward(parts: Float[Array, "p c"]) -> Float[Array, "..."]:
        return product(channels.join(parts, shape))[0]

    start = channels.split(probe)
    largest = largest_singular_value(lambda parts: (forward(parts), small @ parts), start)
    b = jax.vmap(channels.gather)(sides[1])
    if full:
        together = jnp.moveaxis(b, 0, 1).reshape(rows, -1)
        parts, least = solve_full(small, together, start[:, :1])
        parts = jnp.moveaxis(parts.reshape(positions, 2, -1), 1, 0)
        steps, record = jnp.zeros(2, jnp.int32), jnp.zeros((2, 1), small.dtype)
        x = jax.vmap(lambda p: channels.join(p, shape))(parts)
        return _Answer(x=x, largest=largest, least=least, steps=steps, recorded=steps, alphas=record, betas=record)
    seen = spectrum(small)
    most_weak = min(positions, max(positions - rows, 0) + positions // 4 + 1)

    def solve(a: Float[Array, "..."], b: Float[Array, "m c"]) -> BlockSolution:
        return solve_blocks(forward, small, seen, a, b, most_weak=most_weak)

    both = jax.vmap(solve)(sides[0], b)
    x = jax.vmap(lambda parts: channels.join(parts, shape))(both.x)
    return _Answer(
        x=x,
        largest=largest,
        least=both.least[0],
        steps=both.steps,
        recorded=both.recorded,
        alphas=both.alphas,
        betas=both.betas,
    )


def _by_factor(
    segment: Segment,
    variables: Arrays,
    factor: Factor,
    system: LayerSystem,
    sides: Rows,
    probe: Float[Array, "..."],
) -> _Answer:
    zero = jnp.zeros(segment.input.shape, system.weight.dtype)
    _, tangent = jax.linearize(lambda x: segment.function(variables, x), zero)
    adjoint = jax.linear_transpose(tangent, zero)
    over = jnp.where(system.weight > 0, 1.0 / jnp.where(system.weight > 0, system.weight, 1.0), 0.0)

    def solve(rows: Float[Array, "2 ..."]) -> Float[Array, "2 ..."]:
        right = jax.vmap(lambda r: adjoint(r)[0])(rows)
        examples, size = zero.shape[0], int(np.prod(zero.shape[1:]))
        columns = right.reshape(2 * examples, size).T
        return solve_banded(factor.banded, columns).T.reshape(2, *zero.shape)

    right = over[None] * sides[0]
    x = solve(right)
    x = x + solve(right - jax.vmap(tangent)(x))
    none, nothing = jnp.zeros(2, jnp.int32), jnp.zeros((2, 1), zero.dtype)
    largest = largest_singular_value(system.operator.mv, probe)
    least = factor.least * jnp.min(system.weight)
    return _Answer(x=x, largest=largest, least=least, steps=none, recorded=none, alphas=nothing, betas=nothing)
