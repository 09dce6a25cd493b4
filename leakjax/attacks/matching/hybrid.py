"""Hybrid (Chen & Campbell, arXiv 2210.13231): the layer-wise answer, then gradient matching by first-order descent.

With A x = b the first layer's system, as the layers after it left it, and w falling to 0,

    min_x  sum_p ||g_p(x) - g_p||^2 / ||g_p||^2  +  w ||A x - b||^2 / ||b||^2  +  w prior(x) / n

Nothing is exact here: the system is a soft constraint, for it is as wrong as the layers that led to it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from leakjax.attacks.layerwise.outcomes import outcomes
from leakjax.attacks.layerwise.path import Path
from leakjax.attacks.layerwise.pull_back import Given, Known, arrays, read_known
from leakjax.attacks.layerwise.recursion import follow
from leakjax.attacks.problem import DeviceLabels, Monitor, Outcome, Problem
from leakjax.constraints.priors import PRIORS
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.descent import descend

WEIGHTS = (1e-1, 1e-3, 1e-5)  # of the system and the prior, one descent each
STEPS = 400


def hybrid(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """Every victim's layer-wise image, moved by gradient matching where it is not determined layer by layer."""
    return outcomes(problem, [_match(problem, monitor, path) for path in follow(problem, monitor, pulling=False)])


def _match(problem: Problem, monitor: Monitor, path: Path) -> Path:
    if path.certain or path.source is None:
        return path
    monitor.tell(f"matching gradient {path.victim}")
    program = _program(
        problem.client,
        problem.segments[0],
        problem.input_range,
        problem.prior,
        problem.optimizer,
        problem.steps or STEPS,
    )
    sent = {p: to_device(g[path.victim]) for p, g in problem.gradients.items()}
    known = Known(path.source.x, path.source.dx, path.source.noise, path.victim)
    low, high = problem.input_range
    x = jnp.clip(to_device(path.x, problem.dtype), low, high)
    for weight in WEIGHTS:
        x = program(sent, arrays(problem, problem.segments[:1], known), to_device(path.labels), weight, x)
    return dataclasses.replace(path, x=np.asarray(x))


@keep(16)
def _program(
    gradient: Gradient,
    first: Segment,
    limits: tuple[float, float],
    name: str,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> Callable[..., Float[Array, "B *image"]]:
    low, high = limits
    prior = PRIORS[name]

    def squares(a: PyTree[Float[Array, "..."]], over: Float[Array, ""]) -> Float[Array, ""]:
        return optax.tree.norm(a, squared=True) / over

    def run(
        sent: Mapping[str, Float[Array, "..."]],
        given: Given,
        labels: DeviceLabels,
        weight: Float[Array, ""],
        start: Float[Array, "B *image"],
    ) -> Float[Array, "B *image"]:
        _, system = read_known((first,), *given)
        sizes = jax.tree.map(lambda g: jnp.sum(g**2) + jnp.finfo(g.dtype).tiny, sent)

        def objective(x: Float[Array, "B *image"]) -> Float[Array, ""]:
            found = gradient(given[0], x, labels)
            matching = sum(squares(found[p] - sent[p], sizes[p]) for p in sent)
            value = matching + weight * squares(system.function(x, None), system.size**2)
            return (
                value if prior is None else value + weight * jnp.sum(jax.vmap(prior)((x - low) / (high - low))) / x.size
            )

        return descend(objective, start, optimizer, steps=steps).x

    return jax.jit(run)
