"""A train-mode normalization whose statistics nobody sent, undone together with the layer before it (`fiber`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from leakjax.attacks.layerwise.fiber import State
from leakjax.attacks.layerwise.joint_solution import Programs, programs_of
from leakjax.attacks.layerwise.normalized import undo
from leakjax.attacks.layerwise.path import Path, Weak
from leakjax.attacks.layerwise.waiting import wait
from leakjax.attacks.problem import Problem
from leakjax.constraints.pull_back import push_forward
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.solvers.linear import lsmr_condition

_STEPS = 30
"""Of Newton's method for the first values of the statistics; ten serve as a rule."""

_OPEN = 1e-9
"""Share of the largest singular value under which a direction, as the mean of a channel, is open; eps / sigma^2 of a
channel is far above it, rounding far below."""


def undo_unsent(problem: Problem, position: int, path: Path) -> Path:
    """`path` before the normalization at `position`; waiting where its rows and those before do not determine it."""
    if path.anchor is not None or not _applies(problem, position):
        return wait(problem, position, path)
    before, segment = problem.segments[position - 1 : position + 1]
    programs, variables = programs_of(before, segment), dict(problem.variables)
    state = _state(position, path)
    if not programs.known(variables, state):
        return wait(problem, position, path)
    gradient = {p: to_device(problem.gradients[p][path.victim]) for s in (before, segment) for p in s.paths}
    begin = _begin(programs, variables, state, _typical(problem, position))
    found = programs.solve(variables, state, gradient, to_device(begin))
    if not found.residual <= problem.tolerances.matched:
        return wait(problem, position, path)
    anchored = path
    path = dataclasses.replace(path, x=np.asarray(found.x), dx=np.asarray(found.dx))
    path = undo(problem, position, path, {name: np.asarray(t) for name, t in found.values.items()})
    if not found.probe.lost <= problem.tolerances.probe:
        return dataclasses.replace(wait(problem, position, anchored), x=path.x, dx=path.dx)
    condition = lsmr_condition(found.probe) / float(found.weakness)
    info = dataclasses.replace(
        path.layers[0],
        solver="lsmr",
        steps=int(found.steps),
        condition=condition,
        residual=max(path.layers[0].residual, float(found.residual)),
    )
    weak = Weak(position - 2, np.asarray(found.weak_x), np.asarray(found.weak_dx))
    return dataclasses.replace(path, layers=(info, *path.layers[1:]), weak=weak)


def _applies(problem: Problem, position: int) -> bool:
    """Whether the segment before is an affine layer, with nothing in between, and memory holds the fiber."""
    if position == 0:
        return False
    before, segment = problem.segments[position - 1 : position + 1]
    plain = before.linear and before.activation.name == "identity" and not before.normalizes and bool(before.paths)
    assert segment.statistics is not None, "a normalization"
    structs = jax.eval_shape(segment.statistics.measure, dict(problem.variables), segment.input)
    count = sum(a.size for a in structs.values())
    return plain and fits_in_memory(4 * count * segment.input.size * np.dtype(problem.dtype).itemsize)


def _state(position: int, path: Path) -> State:
    """What is known behind the segment at `position`, with the weak direction of it, where there is one."""
    weak = path.weak if path.weak is not None and path.weak.position == position else None
    none = np.zeros((0, *path.x.shape), path.x.dtype)
    along = (none, none) if weak is None else (weak.x[None], weak.dx[None])
    return State(*map(to_device, (path.x, path.dx, path.noise, *along)))


def _typical(problem: Problem, position: int) -> Float[np.ndarray, " t"]:
    """The statistics of noise, where Newton's method begins."""
    noise = np.random.default_rng(0).uniform(*problem.input_range, size=problem.segments[0].input.shape)
    segments, variables = problem.segments[: position + 1], dict(problem.variables)

    def measure(x: jax.Array) -> jax.Array:
        statistics = segments[-1].statistics
        assert statistics is not None, "a normalization"
        xs, _, _ = push_forward(segments, variables, x)
        return ravel_pytree(statistics.measure(variables, xs[-1].reshape(segments[-1].input.shape)))[0]

    return np.asarray(measure(jnp.asarray(noise, problem.dtype)))


def _begin(
    programs: Programs, variables: Arrays, state: State, typical: Float[np.ndarray, " t"]
) -> Float[np.ndarray, " n"]:
    """(t, c): the statistics that are those of the x that they give, as near to the `typical` ones as that leaves
    open; these themselves where rounding left none."""
    tc = np.concatenate([typical, np.zeros(len(state.weak_x), typical.dtype)])
    count, best, least = len(typical), tc, np.inf
    for _ in range(_STEPS):
        left, jacobian = map(np.asarray, programs.missed(variables, state, to_device(tc)))
        sizes = np.maximum(np.abs(tc[:count]), np.finfo(tc.dtype).tiny)
        missing = float(np.linalg.norm(left / sizes))
        if not missing < least:
            break
        best, least = tc, missing
        scale = np.concatenate([sizes, np.ones(len(tc) - count)])
        tc = tc - scale * np.linalg.lstsq(jacobian * scale / sizes[:, None], left / sizes, rcond=_OPEN)[0]
    return best
