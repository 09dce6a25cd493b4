"""What an attacker who is told the defense makes of it: what to predict, which entries to compare, and how much.

| defense | prediction | entries compared | weight |
|---|---|---|---|
| gaussian, laplace, dp_sgd | the gradient (dp_sgd: every example's, clipped) | all | 1 / sigma |
| clip | the clipped gradient | all | 1 / norm, parameter by parameter |
| top_k | the gradient | those sent | 1 / norm |
| soteria | the gradient | all but features sent as 0 | 1 / norm |
| qsgd | the gradient | all | 1 / quantization step |
| sign | the gradient | those of another sign than sent | 1 / rms of the prediction |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.problem import Computed, Problem
from leakjax.constraints.priors import DEVIATION
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient, client_update, example_gradients
from leakjax.solvers.jacobian import inverse_norms

MARGIN = 1.05  # of the noise's expected size
NOTHING = 1e-8
"""Of the norm of what was sent: a block below it, as the gradient of a bias before a batch norm, is rounding (1e-16 in
float64), which is then 1e-8 of a row at most and hides no match."""
ROUNDINGS, MOST = 1e2, 1e-4
"""The same in a client's own roundings: such a block (1e-9 of all, in float32) adds 1e-2 of them, `matched` is 1e3. No
more than `MOST` of all, under which half precision has rounding alone."""
HINT = 1e-3  # what the prior weighs beside entries that are known exactly, before it is let go


class Sent(NamedTuple):
    """What the compiled programs compare with: a gradient, the weights of its entries (scalars by parameter, or
    arrays), and the prior's weight (0 for none; None where it is left out of the program)."""

    gradient: dict[str, Float[Array, "..."]]
    weights: dict[str, Float[Array, "..."]]
    prior: Float[Array, ""] | None = None


class Told(NamedTuple):
    """What was sent, to compare with; ||r|| / size that is as good as the truth's; whether noise remains in it (then
    the prior stays to the end); whether signs alone are compared."""

    sent: Sent
    matched: float
    noisy: bool = False
    signs: bool = False


def certifiable(problem: Problem) -> bool:
    """Whether what was sent still determines an image exactly, where its rank says so: no noise, no rounding."""
    return problem.defense is None or not problem.defense.server.lossy


def predicted(problem: Problem) -> Gradient:
    """(variables, x, labels, smoothing=None) -> what is sent, but for what is random, masked or rounded."""
    defense = problem.defense
    if defense is None or defense.server.predict is None:
        names = tuple(problem.statistics)
        return with_measured(problem.client, problem.network.measure, names, _scale(problem) if names else 1.0)
    each = example_gradients(problem.network.logits, problem.loss, tuple(problem.gradients))
    return defense.server.predict(problem.client, each, defense.values)


def as_computed(problem: Problem, computed: Computed) -> Gradient:
    """`predicted` of an undefended client, by its own code."""
    gradient, names = client_update(computed.apply, problem.loss, tuple(problem.gradients)), tuple(problem.statistics)
    return with_measured(gradient, computed.network().measure, names, _scale(problem)) if names else gradient


def dummy_gradient(problem: Problem) -> Gradient:
    """`predicted`, as signs where only these are sent: what labels are read from."""
    found = predicted(problem)
    return _signs(found) if sends_signs(problem) else found


def sends_signs(problem: Problem) -> bool:
    """Whether the attack is told that signs alone were sent."""
    return problem.defense is not None and problem.defense.server.signs


def tell(problem: Problem, victim: int) -> Told:
    """What to compare for one victim."""
    sent, least = all_sent(problem, victim), _least(problem)
    plain = Told(Sent(sent, _weights(problem, inverse_norms(sent, least))), problem.tolerances.matched)
    if problem.defense is None:
        return plain
    server = problem.defense.server
    if server.signs:
        return plain._replace(signs=True, noisy=True, sent=plain.sent._replace(prior=_prior(problem, HINT)))
    if server.kept is not None:
        masks = server.kept(sent, tuple(sent) if problem.chain is None else problem.segments[-1].paths)
        weights = {p: w * masks[p] for p, w in plain.sent.weights.items()}
        return plain._replace(sent=Sent(sent, weights, _prior(problem, HINT * _root(problem))))
    sigmas = noise_of(problem, victim)
    return plain if sigmas is None or not any(sigmas.values()) else _weighted(problem, sent, sigmas)


def _weights(problem: Problem, each: dict[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
    """`each` weight, that of a statistic less by as much as its rounding is more than a gradient's own."""
    u, rounded = problem.tolerances.rounding, problem.statistics_rounding
    return {p: w * min(1.0, u / rounded[p]) if p in rounded else w for p, w in each.items()}


def _least(problem: Problem) -> float:
    return max(NOTHING, min(ROUNDINGS * problem.tolerances.rounding, MOST))


def all_sent(problem: Problem, victim: int) -> dict[str, Float[Array, "..."]]:
    """What a victim sent: its gradient, and the statistics that its new buffers showed, times a factor that makes them
    as large as a gradient (what is nothing beside the others counts as rounding)."""
    gradient = {p: to_device(g[victim]) for p, g in problem.gradients.items()}
    return gradient | {name: to_device(_scale(problem) * t[victim]) for name, t in problem.statistics.items()}


def _scale(problem: Problem) -> float:
    """||gradients|| / ||statistics|| to a power of 2**8: exact, and one for all clients of a model, whose programs have
    it compiled in."""
    sizes = [np.sqrt(sum(np.sum(np.square(a)) for a in d.values())) for d in (problem.gradients, problem.statistics)]
    return float(2.0 ** (8 * np.round(np.log2(sizes[0] / sizes[1]) / 8))) if all(sizes) else 1.0


def _weighted(problem: Problem, sent: dict[str, Float[Array, "..."]], sigmas: dict[str, float]) -> Told:
    """Rows k (g - s) / sigma and k u / deviation, k such that ||(s / sigma)|| k is the size of the residual."""
    over = {p: 1.0 / s if s else 0.0 for p, s in sigmas.items()}
    total = float(np.sqrt(sum(over[p] ** 2 * float(jnp.sum(g**2)) for p, g in sent.items())))
    k = float(np.sqrt(len(sent))) / total
    entries = sum(g.size for p, g in sent.items() if over[p])
    weights = {p: to_device(k * over[p], problem.dtype) for p in sent}
    matched = max(problem.tolerances.matched, MARGIN * k * float(np.sqrt(entries / len(sent))))
    return Told(Sent(sent, weights, _prior(problem, k)), matched, noisy=True)


def noise_of(problem: Problem, victim: int) -> dict[str, float] | None:
    """The standard deviation of the noise that the defense adds, by parameter; None where it adds none."""
    defense = problem.defense
    deviation = None if defense is None else defense.server.deviation
    if defense is None or deviation is None:
        return None
    return dict(deviation(defense.values, all_sent(problem, victim), problem.examples))


def _root(problem: Problem) -> float:
    return float(np.sqrt((len(problem.gradients) + len(problem.statistics)) / np.prod(problem.batch_shape)))


def _prior(problem: Problem, k: float) -> Float[Array, ""] | None:
    """The weight of amplitudes of the image's own scale, `DEVIATION` of the range each; None without a prior."""
    low, high = problem.input_range
    return None if problem.prior == "none" else to_device(k / (DEVIATION * (high - low)), problem.dtype)


@keep(32)
def with_measured(gradient: Gradient, measure: Any, names: tuple[str, ...], scale: float) -> Gradient:
    """`gradient` and, under `names`, `scale` times the statistics of the data that were sent beside it."""
    if not names:
        return gradient

    def both(variables: Any, x: Any, *given: Any) -> dict[str, Array]:
        measured = measure(variables, x)
        return {**gradient(variables, x, *given), **{name: scale * measured[name] for name in names}}

    return both


@keep(32)
def _signs(gradient: Gradient) -> Gradient:
    return lambda *given: jax.tree.map(jnp.sign, gradient(*given))
