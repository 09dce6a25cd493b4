"""One step of the recursion by LSMR on the whole layer."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Array, Bool, Float

from leakjax.attacks.layerwise.system import build_system
from leakjax.models.reader import Arrays
from leakjax.segments.chain import Segment
from leakjax.solvers.linear import LsmrSolution, solve_side

MOST_STEPS = 6000


def max_steps(segment: Segment) -> int:
    """Bound on LSMR steps: a few times the unknowns, capped; batches share equations and are worse conditioned."""
    return int(min(4 * max(int(np.prod(segment.input.shape)), 100), MOST_STEPS * min(segment.input.shape[0], 3)))


def lsmr_step(
    segment: Segment, dtype: str, floor: float, blocks: tuple[str, ...]
) -> Callable[..., tuple[LsmrSolution, Float[Array, "..."]]]:
    """The step of a segment for one client: (variables, random, x, dx, noise, tolerance, gradient) -> (solution,
    dL/dx); `random` asks for the probe instead of the system."""

    def step(
        variables: Arrays,
        random: Bool[Array, ""],
        x: Float[Array, "..."],
        dx: Float[Array, "..."],
        noise: Float[Array, ""],
        tolerance: Float[Array, ""],
        gradient: Mapping[str, Float[Array, "..."]],
    ) -> tuple[LsmrSolution, Float[Array, "..."]]:
        dz, system = build_system(segment, variables, x, dx, noise, gradient, floor, blocks)
        rounds = 1 if dtype == "float64" else 3
        solution = solve_side(
            system.operator, system.vector, random, tolerance=tolerance, max_steps=max_steps(segment), rounds=rounds
        )
        pulled = segment.cotangent(variables, solution.x, dz)
        return solution, pulled

    return step
