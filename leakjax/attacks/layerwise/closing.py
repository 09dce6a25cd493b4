"""A path with a deficient layer, closed by the null-space coordinates that the activation before it admits."""

import dataclasses

import numpy as np
from jaxtyping import Float

from leakjax.attacks.layerwise.kinks import Solved
from leakjax.attacks.layerwise.null_coordinates import applies, close_null_space
from leakjax.attacks.layerwise.path import Anchor, Path, layer_info, noise_level
from leakjax.attacks.layerwise.ranks import layer_null_space, matrix_shape
from leakjax.attacks.problem import Problem
from leakjax.segments.chain import Segment

Nulls = dict[int, tuple[Path, Float[np.ndarray, "n r"] | None]]
"""By victim: a path, and the null space of its layer's system."""


def close(problem: Problem, position: int, solved: Solved, k: int, path: Path, nulls: Nulls) -> Path | None:
    """The path with a deficient layer closed by the activation before it, or None where that does not close it.

    A layer that its own equations match, but that stays open in some directions, is returned waiting, from there.
    """
    if problem.pull_back != "auto":
        return None
    before, segment = problem.segments[position - 1 : position + 1]
    solution, state = solved.solution, solved.state
    if not applies(problem, before, segment, matrix_shape(problem, segment)[0]):
        return None
    residual = float(solution.residual[k])
    null = _null_space(problem, segment, solved, k, path, nulls)
    if null is None or null.shape[1] == 0:
        return None
    x = np.asarray(solution.x[k]).ravel()
    found = close_null_space(problem, before, null, x, noise_level(problem, x, residual))
    if found is None or not found.residual <= problem.tolerances.matched:
        return None
    pairs = ((float(solution.condition[k]), residual), (found.condition, found.residual))
    condition, residual = max(pairs, key=lambda pair: pair[0] * pair[1])
    steps = int(solution.steps[k]) + found.steps
    info = layer_info(problem, segment.name, x.size, x.size, condition, residual, steps)
    anchor = None if found.whole else Anchor(position, state.x[k], state.dx[k], float(state.noise[k]))
    info = dataclasses.replace(info, status="pulled_back" if info.status == "determined" else info.status)
    info = dataclasses.replace(info, pull_back_depth=1, rank=x.size if found.whole else None, solver="pull_back")
    x = found.x.astype(state.x.dtype).reshape(segment.input.shape)
    noise = noise_level(problem, x, residual)
    seen = np.ones(x.shape) if found.whole else None
    return dataclasses.replace(
        path, x=x, dx=solved.dx[k], noise=noise, layers=(info, *path.layers), seen=seen, anchor=anchor
    )


def _parallel(a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]) -> bool:
    """Whether a and b are the same but for rounding and a scale above 0."""
    along, size = float(np.vdot(b, a)), float(np.vdot(b, b))
    return along > 0 and bool(np.linalg.norm(a - along / size * b) <= 1e-10 * np.linalg.norm(a))


def _null_space(
    problem: Problem, segment: Segment, solved: Solved, k: int, path: Path, nulls: Nulls
) -> Float[np.ndarray, "n r"] | None:
    """`layer_null_space` of path k, or that of the victim's other path where x and dL/dx differ by a scale alone and
    the activation is homogeneous, its slopes the same at any scale (the head's second root)."""
    other, null = nulls.get(path.victim, (None, None))
    homogeneous = segment.activation.is_homogeneous(problem.variables, problem.dtype)
    if other is None or not (homogeneous and _parallel(other.x, path.x) and _parallel(other.dx, path.dx)):
        null = layer_null_space(problem, segment, solved.state, k, path.victim, float(solved.solution.lost[k]))
        nulls[path.victim] = path, null
    return null
