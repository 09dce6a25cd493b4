"""One step of the recursion without iterations on the whole layer: by the small matrix of its gradient block, by the
factor of its weights, or by both.

Every answer is checked by the layer's own equations, as LSMR's are: its residual over all rows, and a random input that
must come back from what the layer would show of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from leakjax.attacks.layerwise.routes import Kind
from leakjax.attacks.layerwise.system import build_system
from leakjax.constraints.channels import channel_matrix
from leakjax.constraints.layer import LayerSystem, Rows
from leakjax.models.reader import Arrays
from leakjax.segments.chain import Segment
from leakjax.solvers.banded import solve_banded
from leakjax.solvers.kronecker import BlockSolution, solve_blocks, solve_full, spectrum
from leakjax.solvers.lapack import eigh
from leakjax.solvers.linear import largest_singular_value, relative_residual
from leakjax.solvers.normal_factor import NormalFactor

_TOLERANCES = ((1e-8, 1e-8), (1e-8, 1.0))
"""Of two rounds of LSMR on what K1 leaves, for the system and for the probe. The second gives the last digits, in as
many steps as a single round would take for them; the probe needs none."""

_SEEN = 1e-7  # of the largest singular value: what counts as seen by the rows that close weak directions
_ROUNDS = 3
"""Of a factor's solve, each with the weak directions closed: rounding, what the shift of the factor left, and the last
digits."""


class Estimates(NamedTuple):
    """Of one system: what its condition is estimated from.

    `largest`: singular value of A; `least`: of what was solved at once; `steps`: of LSMR on the rest, for the system
    and for the probe; `recorded`, those whose `alphas` and `betas` are given.
    """

    largest: Float[Array, ""]
    least: Float[Array, ""]
    steps: Int[Array, " 2"]
    recorded: Int[Array, " 2"]
    alphas: Float[Array, "2 max_steps"]
    betas: Float[Array, "2 max_steps"]


class DirectSolution(NamedTuple):
    """Of one system: x, its relative residual, what a random probe lost, and `estimates` of its condition."""

    x: Float[Array, "..."]
    residual: Float[Array, ""]
    lost: Float[Array, ""]
    estimates: Estimates


def _without_steps(largest: Float[Array, ""], least: Float[Array, ""]) -> Estimates:
    none, nothing = jnp.zeros(2, jnp.int32), jnp.zeros((2, 1), largest.dtype)
    return Estimates(largest=largest, least=least, steps=none, recorded=none, alphas=nothing, betas=nothing)


def direct_step(
    segment: Segment, kind: Kind | None, floor: float, blocks: tuple[str, ...]
) -> Callable[..., tuple[DirectSolution, Float[Array, "..."]]]:
    """The step of a segment for one client: (variables, factor, x, dx, noise, tolerance, gradient) -> (solution,
    dL/dx). Its tolerances are its own."""

    def step(
        variables: Arrays,
        factor: NormalFactor | None,
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
            both, estimates = _by_channels(segment, kind, product, sides, probe)
        else:
            assert factor is not None
            both, estimates = _by_factor(segment, variables, factor, system, sides, probe)
        found = DirectSolution(
            x=both[0],
            residual=relative_residual(system.operator, system.vector, both[0]),
            lost=jnp.linalg.norm(both[1] - probe) / jnp.linalg.norm(probe),
            estimates=estimates,
        )
        pulled = segment.cotangent(variables, found.x, dz)
        return found, pulled

    return step


def _by_channels(
    segment: Segment,
    kind: Kind,
    product: Callable[[Float[Array, "..."]], Rows],
    sides: Rows,
    probe: Float[Array, "..."],
) -> tuple[Float[Array, "2 ..."], Estimates]:
    """(the inputs of both sides, what the condition is estimated from)."""
    shape, (channels, full) = segment.input.shape, kind
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
        return jax.vmap(lambda p: channels.join(p, shape))(parts), _without_steps(largest, least)
    seen = spectrum(small)
    most_weak = min(positions, max(positions - rows, 0) + positions // 4 + 1)

    def solve(given: tuple[Float[Array, "..."], Float[Array, "m c"], Float[Array, " rounds"]]) -> BlockSolution:
        return solve_blocks(forward, small, seen, *given, most_weak=most_weak)

    given = (sides[0], b, jnp.asarray(_TOLERANCES, small.dtype))
    one_by_one = jax.default_backend() == "cpu"  # an accelerator is kept busy by both sides together
    both = jax.lax.map(solve, given) if one_by_one else jax.vmap(lambda *one: solve(one))(*given)
    x = jax.vmap(lambda parts: channels.join(parts, shape))(both.x)
    return x, Estimates(
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
    factor: NormalFactor,
    system: LayerSystem,
    sides: Rows,
    probe: Float[Array, "..."],
) -> tuple[Float[Array, "2 ..."], Estimates]:
    """(the inputs of both sides, what the condition is estimated from)."""
    zero, size = jnp.zeros(segment.input.shape, system.weight.dtype), math.prod(segment.input.shape[1:])
    _, tangent = jax.linearize(lambda x: segment.function(variables, x), zero)
    adjoint = jax.linear_transpose(tangent, zero)
    over = jnp.where(system.weight > 0, 1.0 / jnp.where(system.weight > 0, system.weight, 1.0), 0.0)

    def solve(rows: Float[Array, "2 ..."]) -> Float[Array, "2 ..."]:
        """F^+ of unweighted forward rows, but for the weak directions."""
        right = jax.vmap(lambda r: adjoint(r)[0])(rows)
        columns = solve_banded(factor.banded, right.reshape(2 * len(zero), size).T)
        columns = columns - factor.weak @ (factor.weak.T @ columns)
        return columns.T.reshape(2, *zero.shape)

    close, least = _closing(system, factor, zero)
    x = jnp.zeros((2, *zero.shape), zero.dtype)
    for _ in range(_ROUNDS if close is not None else _ROUNDS - 1):
        left = jax.tree.map(lambda side, row: side - row, sides, jax.vmap(system.operator.mv)(x))
        x = x + solve(over[None] * left[0])
        if close is not None:
            x = x + jax.vmap(close)(jax.tree.map(lambda s, row: s - row, sides, jax.vmap(system.operator.mv)(x)))
    largest = largest_singular_value(system.operator.mv, probe)
    strong = factor.least * jnp.min(system.weight)
    smallest = strong if least is None else jnp.minimum(strong, least)
    return x, _without_steps(largest, smallest)


def _closing(
    system: LayerSystem, factor: NormalFactor, zero: Float[Array, "..."]
) -> tuple[Callable[[Rows], Float[Array, "..."]] | None, Float[Array, ""] | None]:
    """(what the rows left over say of the weak directions, the least singular value that these rows see of them)."""
    count = factor.weak.shape[1]
    if not count:
        return None, None
    one = factor.weak.T.reshape(count, *zero.shape[1:])
    basis = jnp.concatenate([jnp.zeros((count, *zero.shape), zero.dtype).at[:, b].set(one) for b in range(len(zero))])
    rows = jax.vmap(lambda v: ravel_pytree(system.operator.mv(v))[0])(basis)
    values, turn = eigh(rows @ rows.T)
    kept = values > _SEEN**2 * values[-1]
    inverse = (turn * jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0)[None]) @ turn.T

    def close(left: Rows) -> Float[Array, "..."]:
        flat = ravel_pytree(left)[0]
        c = inverse @ (rows @ flat)
        c = c + inverse @ (rows @ (flat - rows.T @ c))
        return jnp.tensordot(c, basis, 1)

    return close, jnp.sqrt(jnp.where(kept[0], values[0], 0.0))
