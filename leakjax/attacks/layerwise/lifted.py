"""A nonlinear segment solved stage by stage: one linear system after another, last stage first.

With z and dL/dz at hand, the last stage's rows are linear in x and y_1 ... y_m together. Often they determine y_m (the
weights of the convolution behind it see it many times); with y_m also e_m and dL/de_m are known, and so is what the
stage before it says: R-GAP's recursion inside a residual block.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from leakjax.attacks.layerwise.pull_back import Known, arrays
from leakjax.attacks.problem import Problem
from leakjax.constraints.stages import lifted_rows, look_inside
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.solvers.lsmr import lsmr

STEPS = 4000


class Lifted(NamedTuple):
    """`inside`: y_m, y_{m-1}, ... as far as each is determined; x of least norm and dL/dx where all are; the share of
    a random x that the rows lose."""

    inside: tuple[Float[np.ndarray, "..."], ...]
    x: Float[np.ndarray, "..."] | None = None
    dx: Float[np.ndarray, "..."] | None = None
    lost: float = 1.0


def lift(problem: Problem, segment: Segment, known: Known) -> Lifted | None:
    """What is inside `segment`, and its input, from its stages; None where it has none."""
    if not segment.stages:
        return None
    given, inside = arrays(problem, [segment], known), []
    for k in reversed(range(len(segment.stages))):
        solve = _program(segment, k, problem.tolerances.solve)
        *_, lost = solve(*given, inside, to_device(True))
        if k > 0 and not lost <= _determined(problem.dtype):
            break
        value, dx, _ = solve(*given, inside, to_device(False))
        if k == 0:
            return Lifted(tuple(inside), np.asarray(value), np.asarray(dx), float(lost))
        inside.append(np.asarray(value))
    return Lifted(tuple(inside))


def _determined(dtype: Any) -> float:
    """The share of a random value that may be lost where the rows determine it."""
    return max(1e-6, 100 * float(jnp.finfo(dtype).eps))


@keep(64)
def _program(
    segment: Segment, k: int, tolerance: float
) -> Callable[..., tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, ""]]]:
    """(x or y_k, dL/d of it, share lost) from the rows of stages k and later; of a random right-hand side
    where `random`."""

    def solve(
        variables: Arrays,
        x_next: Float[Array, "..."],
        dx_next: Float[Array, "..."],
        noise: Float[Array, ""],
        gradient: Mapping[str, Float[Array, "..."]],
        inside: Sequence[Float[Array, "..."]],
        random: Bool[Array, ""],
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, ""]]:
        preimage = segment.activation.preimage(variables, x_next.reshape(segment.output.shape), noise)
        dz = preimage.slope * dx_next.reshape(segment.output.shape)
        seen = look_inside(segment, variables, preimage, dz, inside)
        rows, _ = lifted_rows(segment, variables, seen, gradient)
        flat, unravel = ravel_pytree([jnp.zeros_like(c) for c in seen.cotangents])
        at_zero, tangent = jax.linearize(lambda v: rows(unravel(v)), flat)
        operator = lx.FunctionLinearOperator(tangent, jax.ShapeDtypeStruct(flat.shape, flat.dtype))
        probe = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
        side = jax.tree.map(lambda a, b: jnp.where(random, b, -a), at_zero, operator.mv(probe))

        def lost(answer: Float[Array, " n"]) -> Float[Array, ""]:
            wanted = unravel(probe)[k]
            return jnp.linalg.norm(unravel(answer)[k] - wanted) / jnp.linalg.norm(wanted)

        answer = lsmr(
            operator,
            side,
            tolerance=jnp.where(random, max(1e-10, 50 * float(jnp.finfo(flat.dtype).eps)), tolerance),
            max_steps=STEPS,
            enough=lambda v: random & (lost(v) <= _determined(flat.dtype)),
        )
        return unravel(answer.x)[k], seen.cotangents[k], lost(answer.x)

    return jax.jit(solve)
