"""The joint rows of a train-mode normalization N without its statistics, and of the affine layer F before it.

With z and dL/dz at the output of N known, and u the input of F:

    x = (z - b(t)) / a(t)              the fiber N^-1(z): affine in coefficients o of dx/dt_k, t the statistics
    F(u) = x,  N(x) = z                forward rows
    d/dtheta <dL/dx, F(u)> = g_F       gradient rows, dL/dx = (dN/dx)^T dL/dz
    d/dtheta <dL/dz, N(x)> = g_N

But for N(x) = z these rows are homogeneous in (u, x), and N hardly changes with the size of x: for batch norm by
1 - var((x - mean) / sigma) = eps / sigma^2. One direction is weak, the common size: rounding reaches it sigma^2 / eps
times as far as any other. It is handed on with u, and solved for again (c) at the normalization before, whose own rows
depend on it like on anything else: errors of size do not add up over layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from leakjax.constraints.layer import Rows, over_gradients, segment_rows
from leakjax.models.reader import Arrays
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.smoothing import rms
from leakjax.segments.tracing.statistics import Statistics, slope_and_bias

Everything = tuple[Rows, Float[Array, "..."]]
"""The rows of F with the gradient rows of N, and those of N(x) = z."""


class State(NamedTuple):
    """What is known behind N: x and dL/dx, the noise level of x, and k weak directions of both."""

    x: Float[Array, "..."]
    dx: Float[Array, "..."]
    noise: Float[Array, ""]
    weak_x: Float[Array, "k ..."]
    weak_dx: Float[Array, "k ..."]

    def along(self, c: Float[Array, " k"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """x and dL/dx, c along their weak directions."""
        return self.x + jnp.tensordot(c, self.weak_x, 1), self.dx + jnp.tensordot(c, self.weak_dx, 1)


class Point(NamedTuple):
    """What one vector of unknowns stands for: u, c, z and dL/dz at the output of N, x and dL/dx at its input."""

    u: Float[Array, "..."]
    c: Float[Array, " k"]
    z: Float[Array, "..."]
    dz: Float[Array, "..."]
    x: Float[Array, "..."]
    dx: Float[Array, "..."]


@dataclasses.dataclass(frozen=True, eq=False)
class Fiber:
    """The joint rows of `segment` (N) behind `before` (F), for arrays that may be traced.

    Unknowns are one vector w = (u, o, c - c_0), with t and c_0 the values `begin` that the fiber is laid out at.
    """

    before: Segment
    segment: Segment
    variables: Arrays
    state: State
    gradient: Mapping[str, Float[Array, "..."]]
    begin: Float[Array, " n"]

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Those of N."""
        assert self.segment.statistics is not None, "a normalization"
        return self.segment.statistics

    @functools.cached_property
    def parts(self) -> tuple[Float[Array, " t"], Float[Array, " k"]]:
        """t and c_0."""
        t, c = jnp.split(self.begin, [len(self.begin) - len(self.state.weak_x)])
        return t, c

    @functools.cached_property
    def origin(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """z and x at t and c_0."""
        t, c = self.parts
        z, _ = self.output(c)
        return z, self.undone(t, z)

    @functools.cached_property
    def columns(self) -> Float[Array, "n t"]:
        """dx/dt_k at t, flat, each of the size of x."""
        t, _ = self.parts
        z, x = self.origin
        columns = jax.jacfwd(lambda t: jnp.ravel(self.undone(t, z)))(t)
        return columns * (rms(x) / jax.vmap(rms, 1)(columns))[None]

    @functools.cached_property
    def packed(self) -> tuple[Float[Array, " n"], Callable[..., Any]]:
        """(w = 0, w -> u, o, c - c_0)."""
        zeros = jnp.zeros(self.before.input.shape, self.begin.dtype), *map(jnp.zeros_like, self.parts)
        return ravel_pytree(zeros)

    @functools.cached_property
    def over(self) -> dict[str, Float[Array, ""]]:
        """The weights of the gradient rows."""
        return over_gradients(self.gradient, [*self.before.paths, *self.segment.paths])

    def values(self, t: Float[Array, " t"]) -> dict[str, Float[Array, "..."]]:
        """A vector as the values of the statistics, by name."""
        structs = jax.eval_shape(self.statistics.measure, self.variables, self.segment.input)
        return ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), structs))[1](t)

    def output(self, c: Float[Array, " k"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """z and dL/dz, c along the weak directions of what is behind N."""
        x, dx = (a.reshape(self.segment.output.shape) for a in self.state.along(c))
        preimage = self.segment.activation.preimage(self.variables, x, self.state.noise)
        return preimage.value, preimage.slope * dx

    def undone(self, t: Float[Array, " t"], z: Float[Array, "..."]) -> Float[Array, "..."]:
        """x = (z - b(t)) / a(t)."""
        slope, bias = slope_and_bias(self.statistics, self.variables, self.segment.input, self.values(t))
        return (z - bias) / slope

    def missed(self) -> Float[Array, " t"]:
        """What t and c_0 miss of being the statistics of their own x."""
        measured = self.statistics.measure(self.variables, self.origin[1])
        return ravel_pytree(measured)[0] - self.parts[0]

    def at(self, w: Float[Array, " n"]) -> Point:
        """What w stands for."""
        (t, c0), (z0, x0) = self.parts, self.origin
        u, o, c = self.packed[1](w)
        z, dz = self.output(c0 + c)
        moved = jax.jvp(lambda z: self.undone(t, z), (z0,), (z - z0,))[1]
        x = x0 + (self.columns @ o).reshape(x0.shape) + moved
        return Point(u=u, c=c0 + c, z=z, dz=dz, x=x, dx=self.segment.cotangent(self.variables, x, dz))

    def rows(self, w: Float[Array, " n"]) -> Everything:
        """The weighted rows, 0 at a solution."""
        p, (z0, x0) = self.at(w), self.origin
        forward, of_before = segment_rows(self.before, self.variables, p.dx, p.u)
        again, own = segment_rows(self.segment, self.variables, p.dz, p.x)
        shown = {path: self.over[path] * (g - self.gradient[path]) for path, g in {**of_before, **own}.items()}
        return ((forward - p.x) / rms(x0), shown), (again - p.z) / rms(z0)

    def misfit(self, w: Float[Array, " n"]) -> Float[Array, ""]:
        """Root mean square of the rows; infinite where they are no numbers."""
        size = jnp.sqrt(2.0 * self.origin[1].size + sum(g.size for g in self.gradient.values()))
        left = optax.tree.norm(self.rows(w)) / size
        return jnp.where(jnp.isnan(left), jnp.inf, left)

    def size_direction(self, w: Float[Array, " n"]) -> Float[Array, " n"]:
        """The unit direction in which u and x, but for F(0), grow together."""
        p = self.at(w)
        constant = segment_rows(self.before, self.variables, p.dx, jnp.zeros_like(p.u))[0]
        o = jnp.linalg.lstsq(self.columns, jnp.ravel(p.x - constant))[0]
        direction = ravel_pytree((p.u, o, jnp.zeros_like(p.c)))[0]
        return direction / jnp.linalg.norm(direction)


def is_known(segment: Segment, variables: Arrays, state: State) -> Bool[Array, ""]:
    """Whether all of z and dL/dz at the output of a segment is known."""
    preimage = segment.activation.preimage(variables, state.x.reshape(segment.output.shape), state.noise)
    return jnp.all(preimage.known & preimage.slope_known)
