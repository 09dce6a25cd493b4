"""Gradient matching by first-order descent, as the papers before this project do it: one program, several recipes.

    min_u  distance(d/dtheta (1/B) sum_b loss(model(x_b), y_b), g) + prior(x),    u = x or (x, l), y = softmax(l)

from standard normal noise, several starts side by side, the one with the least residual kept.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from leakjax.attacks.adaptive import tell
from leakjax.attacks.matching.outcome import Found, matched_outcomes
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.batching import vmap_several
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient
from leakjax.solvers.descent import descend
from leakjax.solvers.jacobian import inverse_norms

Gradients = Mapping[str, Float[Any, "..."]]
Limits = tuple[float, float]
Answer = tuple[Float[Array, "B ..."], Int[Array, " B"], Float[Array, ""], Int[Array, ""]]
"""x, labels, ||r|| / size and steps."""


class Recipe(NamedTuple):
    """What a paper descends on, and how.

    - `distance(found, sent)`: of two gradients; `optimizer(steps, limits)`, for a number of steps and the input range;
    - `steps`: the paper's own number; `patience`: those that may bring nothing before the descent ends, None for all;
    - `prior(x)`: added to the distance; `boxed`: whether images are kept in the input range.
    """

    distance: Callable[[Gradients, Gradients], Float[Array, ""]]
    optimizer: Callable[[int | Int[Array, ""], Limits], optax.GradientTransformation]
    steps: int
    patience: int | None = None
    prior: Callable[[Float[Array, "B *space C"]], Float[Array, ""]] | None = None
    boxed: bool = False


def squared_distance(found: Gradients, sent: Gradients) -> Float[Array, ""]:
    """sum_p ||found_p - sent_p||^2."""
    return optax.tree.norm(optax.tree.sub(dict(found), dict(sent)), squared=True)


def cosine_distance(found: Gradients, sent: Gradients) -> Float[Array, ""]:
    """1 - <found, sent> / (||found|| ||sent||), over all parameters together."""
    found, sent = dict(found), dict(sent)
    return jnp.asarray(1.0 - optax.tree.vdot(found, sent) / (optax.tree.norm(found) * optax.tree.norm(sent)))


def soften(logits: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Soft labels: softmax(l), or the logistic function where there is one output."""
    return jax.nn.sigmoid(logits) if logits.shape[1] == 1 else jax.nn.softmax(logits)


def harden(logits: Float[Array, "B K"]) -> Int[Array, " B"]:
    """The label that each row of logits stands for: its largest entry, or the sign of the only one."""
    return jnp.where(logits[:, 0] > 0, 1, 0) if logits.shape[1] == 1 else jnp.argmax(logits, axis=1)


def match_by_descent(
    problem: Problem, monitor: Monitor, recipe: Recipe, labels: Int[np.ndarray, "V B"] | None
) -> list[Outcome]:
    """Every victim's gradient matched by a recipe, with known `labels`, or none: then they are unknowns too.

    `problem.starts` noises a victim, that depend on `problem.seed` and its position alone; `problem.chunk` victims at a
    time. Returns an `Outcome` an example.
    """
    program = _program(problem.client, recipe, problem.input_range)
    steps = to_device(problem.steps or recipe.steps)
    size, found = min(problem.chunk, problem.victims), []
    for first in range(0, problem.victims, size):
        monitor.tell(f"matching gradients {first} to {min(first + size, problem.victims) - 1}")
        rows = np.minimum(np.arange(first, first + size), problem.victims - 1)
        sent = {p: to_device(g[rows], problem.dtype) for p, g in problem.gradients.items()}
        tags = None if labels is None else to_device(labels[rows])
        noise = [_noise(problem, int(victim), labels is None) for victim in rows]
        starts = jax.tree.map(lambda *parts: to_device(np.stack(parts), problem.dtype), *noise)
        answer = jax.tree.map(np.asarray, program(dict(problem.variables), steps, sent, tags, starts))
        found += [Found(*(part[k] for part in answer)) for k in range(min(size, problem.victims - first))]
    outcomes = []
    for victim, one in enumerate(found):
        monitor.tell(f"looking at gradient {victim}")
        one = Found(one.x, one.labels, float(one.residual), int(one.steps))
        outcomes += matched_outcomes(problem, tell(problem, victim), [one])
    return outcomes


def _noise(problem: Problem, victim: int, soft: bool) -> dict[str, Float[np.ndarray, "S B ..."]]:
    """(S, B, ...) images and, where they are unknowns, (S, B, K) logits of labels, from N(0, 1)."""
    generators = [np.random.default_rng((problem.seed, victim, start)) for start in range(problem.starts)]
    noise = {"x": np.stack([generator.normal(size=problem.batch_shape) for generator in generators])}
    if soft:
        batch = jax.ShapeDtypeStruct(problem.batch_shape, problem.dtype)
        shape = jax.eval_shape(problem.network.logits, dict(problem.variables), batch).shape
        noise["label"] = np.stack([generator.normal(size=shape) for generator in generators])
    return noise


@keep(16)
def _program(gradient: Gradient, recipe: Recipe, limits: Limits) -> Callable[..., tuple[Shaped[Array, "V ..."], ...]]:
    """Compiled: (variables, steps, sent, labels, starts) -> (x, labels, residual, steps), by victim."""

    def of_victim(
        variables: Arrays,
        steps: Int[Array, ""],
        sent: Gradients,
        labels: Int[Array, " B"] | None,
        starts: Mapping[str, Float[Array, "S B ..."]],
    ) -> Answer:
        optimizer = recipe.optimizer(steps, limits)
        over, size = inverse_norms(sent), jnp.sqrt(float(len(sent)))

        def objective(u: Mapping[str, Float[Array, "B ..."]]) -> Float[Array, ""]:
            targets = soften(u["label"]) if labels is None else labels
            value = recipe.distance(gradient(variables, u["x"], targets), sent)
            return value if recipe.prior is None else value + recipe.prior(u["x"])

        def from_start(u: Mapping[str, Float[Array, "B ..."]]) -> Answer:
            end = descend(objective, u, optimizer, steps=steps, patience=recipe.patience or steps)
            x = jnp.clip(end.x["x"], *limits) if recipe.boxed else end.x["x"]
            tags = harden(end.x["label"]) if labels is None else labels
            misfit = jax.tree.map(lambda w, g, s: w * (g - s), over, gradient(variables, x, tags), sent)
            return x, tags, optax.tree.norm(misfit) / size, end.steps

        tried = vmap_several(from_start, (0,))(starts)
        best = jnp.argmin(jnp.nan_to_num(tried[2], nan=jnp.inf))
        return *(part[best] for part in tried[:3]), jnp.sum(tried[3])  # type: ignore[return-value]

    return jax.jit(vmap_several(of_victim, (None, None, 0, 0, 0)))
