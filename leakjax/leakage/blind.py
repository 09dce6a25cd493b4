"""Whether the derivatives that an audit is made of say what the gradient does, and what to look at otherwise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.client.update import mean_loss
from leakjax.metrics import PSNR_CAP
from leakjax.models.losses import LossSpec
from leakjax.models.reader import Model
from leakjax.runtime.programs import keep
from leakjax.segments.tracing import evaluation, jaxprs
from leakjax.segments.tracing.blindness import Spot, blind_spots, seen_through
from leakjax.segments.tracing.network import Gradient, Logits, Network
from leakjax.segments.tracing.primitives import ELEMENTWISE
from leakjax.segments.tracing.rules import RULES

STEPS = ((1e-3, 10.0), (1e-2, 10.0), (1e-1, 30.0))
"""Sizes of a change of the images, of their range, and the factor beyond its prediction that no smooth map explains."""
MOVED = 1e-3  # of a parameter's gradient: a smaller change is not held against the prediction
NOTHING = 1e-12  # of the largest parameter's gradient: a smaller one is zero but for rounding
_KEEPS_ORDER = frozenset({"reshape", "squeeze", "broadcast_in_dim", "expand_dims"})


class Front(NamedTuple):
    """A model that first rounds its images, entry by entry: `y` (B, *shape), what it makes of them; the `logits` of y;
    the `slope` of y by
    pixels in [0, 1], and the `psnr` of the picture that y gives back, both of the best line."""

    y: np.ndarray
    logits: Logits
    slope: float
    psnr: float


@keep(16)
def data_gradient(gradient: Gradient) -> Gradient:
    """The gradient as a function of the data, whose derivative passes through `stop_gradient`."""
    return seen_through(gradient)


def spots_of(gradient: Callable[..., Any], variables: Any, x: Any, labels: Any) -> tuple[Spot, ...]:
    """What hides the images from a derivative of the gradient."""
    return blind_spots(lambda fixed, x: gradient(fixed, x, labels), dict(variables), x)


def spots_of_model(model: Model, loss: LossSpec, x: Any, labels: Any) -> tuple[Spot, ...]:
    """The same of a model's own code, whose lines the spots name."""
    losses = mean_loss(model, loss)
    parts = {"params": dict(model.params), "buffers": dict(model.buffers)}
    return blind_spots(lambda v, x: jax.grad(losses)(v["params"], v["buffers"], x, labels), parts, x)


def rounded_front(model: Model, x: np.ndarray, limits: tuple[float, float]) -> Front | None:
    """The part of a model in which it acts on its images entry by entry, before any parameter; None without one."""
    structs = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in model.variables.items()}
    given = jax.ShapeDtypeStruct(x.shape, jnp.float64)
    graph = jaxprs.trace_by_path(model.apply, structs, given)
    end = _last_of_entries(graph, x.size)
    if end is None:
        return None
    before, after = graph.needed(end, [graph.input]), graph.needed(graph.output, [*graph.variables, end])
    weights = dict(zip(graph.variables, model.variables.values(), strict=True))
    y = np.asarray(evaluation.evaluate(before, {**weights, graph.input: jnp.asarray(x)}, end, RULES), float)
    shape = graph.structs[end].shape

    def logits(variables: Mapping[str, Any], y: Any, smoothing: Any = None) -> Any:
        del smoothing
        env = {v: variables[path] for v, path in zip(graph.variables, structs, strict=True)}
        return evaluation.evaluate(after, {**env, end: y.reshape(shape)}, graph.output, RULES)

    return Front(y.reshape(x.shape), logits, *_line(x, y.reshape(x.shape), limits))


def unpredicted(
    network: Network, gradient: Gradient, variables: Any, x: Any, labels: Any, width: float
) -> float | None:
    """By how much more than its derivative predicts a model moves with its images; None where they agree.

    For random signs d and sizes s, ||u(x + s d) - u(x)|| / (s ||J d||), u being the gradient, parameter by parameter,
    or, where the network has kinks (at which gradients jump, and logits do not), the logits. Curvature gives factors
    near 1, a jump one that grows as s falls. What is zero at x, or moves by less than `MOVED` of itself, is left out.
    """

    def looked_at(variables: Any, x: Any) -> Any:
        return {"": network.logits(variables, x)} if network.has_kinks else gradient(variables, x, labels)

    @jax.jit
    def moved(variables: Any, x: Any, d: Any) -> Any:
        here, along = jax.jvp(lambda x: looked_at(variables, x), (x,), (d,))
        there, norm = looked_at(variables, x + d), jnp.linalg.norm
        rows = {p: (there[p] - here[p], along[p], here[p]) for p in here}
        return {p: jnp.stack([norm(jnp.ravel(a)) for a in row]) for p, row in rows.items()}

    signs = jax.random.rademacher(jax.random.key(0), x.shape, x.dtype)
    worst = 0.0
    for size, factor in STEPS:
        found = np.stack([np.asarray(v) for v in moved(variables, x, size * width * signs).values()])
        change, predicted, _ = found[(found[:, 0] > MOVED * found[:, 2]) & (found[:, 2] > 0)].T
        beyond = change > factor * predicted
        ratio = change[beyond] / np.maximum(predicted[beyond], 1e-300)
        worst = max(worst, float(np.max(ratio, initial=0.0)))
    return worst or None


def silent(gradient: Mapping[str, Any]) -> list[str]:
    """The weights (arrays of two axes or more) whose gradient is zero, or rounding beside the largest."""
    sizes = {path: float(np.linalg.norm(np.ravel(g))) for path, g in gradient.items()}
    largest = max(sizes.values())
    return [p for p, size in sizes.items() if jnp.ndim(gradient[p]) >= 2 and size <= NOTHING * largest]


def _last_of_entries(graph: jaxprs.Graph, size: int) -> int | None:
    """The one value through which all data flow after the input was changed entry by entry alone."""
    live, weights = graph.dependents([graph.input]), graph.dependents(graph.variables)
    chain, used = {graph.input}, set()
    for equation in graph.needed(graph.output, [graph.input, *graph.variables]):
        data = [v for v in equation.inputs if isinstance(v, int) and v in live]
        if data and all(v in chain for v in data) and _by_entry(equation, graph, size, weights):
            chain.update(equation.outputs)
        else:
            used.update(v for v in data if v in chain)
    if len(used) != 1 or used == {graph.input}:
        return None
    (end,) = used
    return end if jnp.issubdtype(graph.structs[end].dtype, jnp.floating) else None


def _by_entry(equation: jaxprs.Equation, graph: jaxprs.Graph, size: int, weights: set[int]) -> bool:
    sizes = {int(np.prod(graph.structs[o].shape)) for o in equation.outputs}
    if sizes != {size} or any(isinstance(v, int) and v in weights for v in equation.inputs):
        return False
    return equation.name in ELEMENTWISE or equation.name in _KEEPS_ORDER


def _line(x: np.ndarray, y: np.ndarray, limits: Sequence[float]) -> tuple[float, float]:
    """(slope of y by x, PSNR of the image that y gives back by the best line)."""
    low, high = limits
    t, u = ((x - low) / (high - low)).ravel(), y.ravel()
    spread = float(np.var(u))
    covariance = float(np.mean((t - t.mean()) * (u - u.mean())))
    rest = float(np.var(t)) - (covariance**2 / spread if spread > 0 else 0.0)
    slope = abs(spread / covariance) if covariance else 1.0
    return slope, min(-10 * np.log10(max(rest, 10 ** (-PSNR_CAP / 10))), PSNR_CAP)


def looked_up(model: Model, gradient: Mapping[str, Any], x: Any) -> list[str]:
    """Where integers made of the data pick rows of a parameter: what the rows of its gradient then say."""
    structs = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in model.variables.items()}
    given = jax.ShapeDtypeStruct(x.shape, x.dtype)
    graph = jaxprs.trace_by_path(model.apply, structs, given)
    names, live = dict(zip(graph.variables, structs, strict=True)), graph.dependents([graph.input])
    picked = {e.inputs[0] for e in graph.equations if e.name == "gather" and set(e.inputs[1:]) & live}
    found = []
    for path in (names[v] for v in names if v in picked and names[v] in gradient):
        rows = np.asarray(gradient[path]).reshape(len(gradient[path]), -1)
        touched = int(np.sum(np.any(rows != 0, axis=1)))
        found.append(
            f"integers made of the data pick rows of {path!r}: the {touched} of {len(rows)} rows of its gradient that "
            "are not zero say which integers the data hold; recover_tokens reads the ids of a text"
        )
    return found
