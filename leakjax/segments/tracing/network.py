"""A model as a function of a batch, whether it can be read as segments or not: what full gradient matching needs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from leakjax.models.differentiable import check_differentiable
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.reader import Arrays, Model
from leakjax.runtime.programs import keep
from leakjax.segments.tracing import evaluation, jaxprs, kinds
from leakjax.segments.tracing.rules import RULES
from leakjax.segments.tracing.smoothing import smoother
from leakjax.segments.tracing.statistics import reductions
from leakjax.segments.tracing.tokens import Tokens, read_tokens

Logits = Callable[..., Float[Array, "B K"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A model at one batch size: `logits`, the least floating precision of its own code, whether it has kinks.

    `logits(variables, x, smoothing=None)`; a smoothing s > 0 makes every kink smooth over s times what it acts on.
    `tokens`: where weights meet the tokens of one example (`tracing.tokens`); none for batches.
    `measure(variables, x)`: the sums over the data that the logits depend on, by name (`statistics.reductions`).
    """

    logits: Logits
    precision: Any
    has_kinks: bool
    measure: Callable[..., dict[str, Array]] = lambda variables, x: {}
    tokens: Tokens | None = None


Gradient = Callable[..., dict[str, Array]]


def read_network(model: Model, input_shape: Sequence[int], examples: int, dtype: Any) -> Network:
    """A model's logits for batches (examples, *input_shape) of `dtype`, convolutions as patches times a matrix.

    One function for all models of one architecture, so that what is compiled for it serves them all.
    """
    return _read(model.apply, model.structs, tuple(input_shape), examples, str(jnp.dtype(dtype)))


@keep(32)
def _read(apply: Any, structs: Any, input_shape: tuple[int, ...], examples: int, dtype: str) -> Network:
    paths = [path for path, _, _ in structs]
    arrays = {path: jax.ShapeDtypeStruct(shape, kind) for path, shape, kind in structs}
    x = jax.ShapeDtypeStruct((examples, *input_shape), dtype)
    graph = jaxprs.trace_by_path(apply, arrays, x)
    equations = graph.needed(graph.output, [*graph.variables, graph.input])

    smooth = smoother(graph, graph.input, graph.output)

    def logits(variables: Arrays, x: Float[Any, "B ..."], smoothing: Any = None) -> Float[Array, "B K"]:
        env = {i: variables[path] for i, path in zip(graph.variables, paths, strict=True)}
        if smoothing is not None:
            return smooth({**env, graph.input: x}, smoothing)
        return evaluation.evaluate(equations, {**env, graph.input: x}, graph.output, RULES)

    def measure(variables: Arrays, x: Float[Any, "B ..."]) -> dict[str, Array]:
        env = {i: variables[path] for i, path in zip(graph.variables, paths, strict=True)}
        values = evaluation.evaluate_all(equations, {**env, graph.input: x}, RULES)
        return {name: values[v] for v, name in reductions(graph).items()}

    check_differentiable(logits, arrays, x)
    return Network(
        logits=logits,
        precision=kinds.dtype_of_least_precision(graph),
        has_kinks=kinds.has_choices(graph),
        measure=measure,
        tokens=read_tokens(graph, paths) if examples == 1 else None,
    )


@keep(32)
def batch_gradient(logits: Logits, loss: LossSpec, paths: tuple[str, ...]) -> Gradient:
    """(variables, x, labels) -> {path: d/dtheta (1/B) sum_b loss(logits(x)_b, y_b)} for the parameters `paths`.

    Labels are integers, or rows of soft labels. A fourth argument, where given, is the smoothing of `logits`.
    """

    def gradient(
        variables: Arrays,
        x: Float[Any, "B ..."],
        labels: Int[Any, " B"] | Float[Any, "B K"],
        smoothing: Any = None,
    ) -> dict[str, Array]:
        def mean_loss(params: Arrays) -> Array:
            weights = {**variables, **params}
            z = logits(weights, x) if smoothing is None else logits(weights, x, smoothing)
            return jnp.mean(jax.vmap(read_loss(loss))(z, labels))

        return jax.grad(mean_loss)({path: variables[path] for path in paths})

    return gradient


@keep(32)
def client_update(
    logits: Logits, loss: LossSpec, paths: tuple[str, ...], local_steps: int = 1, learning_rate: float | None = None
) -> Gradient:
    """(variables, x, labels) -> {path: what an undefended client sends}: `batch_gradient`, or after k local steps

        (theta_0 - theta_k) / learning_rate = sum_{j < k} g(theta_j),   theta_{j+1} = theta_j - learning_rate g(theta_j)

    unrolled, so that it is differentiated through all steps. Every step takes the same whole batch. A fourth argument,
    where given, is the smoothing of `logits`.

    Reference: FedAvg, McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1 (one local batch).
    """
    gradient = batch_gradient(logits, loss, paths)
    if local_steps == 1:
        return gradient
    rate = float(learning_rate or 0.0)

    def update(
        variables: Arrays, x: Float[Any, "B ..."], labels: Int[Any, " B"] | Float[Any, "B K"], smoothing: Any = None
    ) -> dict[str, Array]:
        def step(sums: dict[str, Array], _: None) -> tuple[dict[str, Array], None]:
            here = {p: (variables[p] - rate * sums[p]).astype(variables[p].dtype) for p in paths}
            g = gradient({**variables, **here}, x, labels, smoothing)
            return {p: sums[p] + g[p] for p in paths}, None

        zeros = {p: jnp.zeros_like(variables[p]) for p in paths}
        return jax.lax.scan(step, zeros, None, length=local_steps)[0]

    return update


@keep(32)
def example_gradients(logits: Logits, loss: LossSpec, paths: tuple[str, ...]) -> Gradient:
    """(variables, x, labels) -> {path: (B, *parameter) d/dtheta loss(logits(x)_b, y_b)}, every example's own."""

    def gradients(
        variables: Arrays, x: Float[Any, "B ..."], labels: Int[Any, " B"] | Float[Any, "B K"], smoothing: Any = None
    ) -> dict[str, Array]:
        def losses(params: Arrays) -> Array:
            weights = {**variables, **params}
            z = logits(weights, x) if smoothing is None else logits(weights, x, smoothing)
            return jax.vmap(read_loss(loss))(z, labels)

        return jax.jacrev(losses)({path: variables[path] for path in paths})

    return gradients
