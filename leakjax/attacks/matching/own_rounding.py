"""What a client's own precision does to what it sends, seen at the answer: the same code in both precisions.

    n = g_32(x) - g_64(x)        x the answer, moved a little for every draw

Rounding is no independent noise in the entries of a gradient: what a layer's outputs lost goes through all that follows
and looks like another image's gradient, so that a best fit leaves little of it. Computed, it has the right structure.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from leakjax.attacks.adaptive import Told, as_computed, predicted
from leakjax.attacks.matching.outcome import given
from leakjax.attacks.problem import Labels, Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient

_AWAY = 1e-4
"""Of the range, by which the answer is moved: many roundings in float32, and little beside what any layer curves by."""

Draw = Callable[[np.random.Generator], dict[str, Float[np.ndarray, "..."]]]


def rounding_of(problem: Problem, told: Told, labels: Labels, x: Float[np.ndarray, "B *image"]) -> Draw | None:
    """Draws of what the client's rounding adds to everything that was sent, by name; None where its own code is not at
    hand, or computes as this attack does.

    Gradients to which weight decay is added are rounded once more, and so are statistics, when they are mixed into the
    running ones; see `with_mixing`.
    """
    if problem.computed is None:
        return None
    variables, _, tags = given(problem, told, labels)
    width = problem.input_range[1] - problem.input_range[0]
    differ = _difference(as_computed(problem, problem.computed), predicted(problem), problem.computed.dtype)
    unit = float(jnp.finfo(problem.computed.dtype).eps) / 12**0.5  # of the last digit: its rounding is uniform
    decayed = {p: unit * np.hypot(d, d + np.asarray(told.sent.gradient[p])) for p, d in problem.computed.decay.items()}

    def draw(rng: np.random.Generator) -> dict[str, Float[np.ndarray, "..."]]:
        near = x + _AWAY * width * rng.normal(size=x.shape)
        noise = {p: np.asarray(n) for p, n in differ(variables, to_device(near), tags).items()}
        return {p: n + decayed[p] * rng.normal(size=n.shape) if p in decayed else n for p, n in noise.items()}

    return draw


def with_mixing(problem: Problem, told: Told, draw: Draw) -> Draw:
    """`draw`, and what the statistics that were sent lost when they were mixed into the running ones: normal errors of
    `Problem.statistics_rounding`."""
    sent = told.sent.gradient
    norms = {name: (sent[name].shape, float(np.linalg.norm(sent[name]))) for name in problem.statistics if name in sent}

    def both(rng: np.random.Generator) -> dict[str, Float[np.ndarray, "..."]]:
        noise = draw(rng)
        for name, (shape, norm) in norms.items():
            deviation = problem.statistics_rounding[name] * norm / max(np.prod(shape), 1) ** 0.5
            noise[name] = noise.get(name, 0.0) + deviation * rng.normal(size=shape)
        return noise

    return both


@keep(16)
def _difference(rounded: Gradient, exact: Gradient, dtype: str) -> Gradient:
    """(variables, x, labels) -> what computing in `dtype` changes; its inputs are numbers of that dtype."""

    def narrow(a: jax.Array) -> jax.Array:
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def difference(variables: Arrays, x: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        low = jax.tree.map(narrow, (dict(variables), x, labels))
        same = jax.tree.map(lambda a, b: a.astype(b.dtype), low, (dict(variables), x, labels))
        return jax.tree.map(lambda a, b: a.astype(b.dtype) - b, rounded(*low), exact(*same))

    return jax.jit(difference)
