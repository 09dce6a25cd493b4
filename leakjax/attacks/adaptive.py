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

from leakjax.attacks.problem import Problem
from leakjax.client.defenses import Setting
from leakjax.client.defenses.clipping import clip
from leakjax.constraints.priors import DEVIATION
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient, example_gradients
from leakjax.solvers.jacobian import inverse_norms

LOSSY = ("dp_sgd", "gaussian", "laplace", "qsgd", "sign")
MARGIN = 1.05  # of the noise's expected size
HINT = 1e-3  # what the prior weighs beside entries that are known exactly, before it is let go


class Sent(NamedTuple):
    """What the compiled programs compare with: a gradient, the weights of its entries (scalars by parameter, or
    arrays), and the prior's weight (0 for none; None where it is left out of the program)."""

    gradient: dict[str, Array]
    weights: dict[str, Array]
    prior: Array | None = None


class Told(NamedTuple):
    """What was sent, to compare with; ||r|| / size that is as good as the truth's; whether noise remains in it (then
    the prior stays to the end); whether signs alone are compared."""

    sent: Sent
    matched: float
    noisy: bool = False
    signs: bool = False


def certifiable(problem: Problem) -> bool:
    """Whether what was sent still determines an image exactly, where its rank says so: no noise, no rounding."""
    return problem.defense is None or problem.defense.name not in LOSSY


def predicted(problem: Problem) -> Gradient:
    """(variables, x, labels, smoothing=None) -> what is sent, but for what is random, masked or rounded."""
    defense = problem.defense
    if defense is not None and defense.name == "clip":
        return clipped(problem.client, defense.values["norm"])
    if defense is not None and defense.name == "dp_sgd":
        each = example_gradients(problem.network.logits, problem.loss, tuple(problem.gradients))
        return _clipped_each(each, defense.values["clip"])
    return problem.client


def dummy_gradient(problem: Problem) -> Gradient:
    """`predicted`, as signs where only these are sent: what labels are read from."""
    found = predicted(problem)
    return _signs(found) if problem.defense is not None and problem.defense.name == "sign" else found


def tell(problem: Problem, victim: int) -> Told:
    """What to compare for one victim."""
    sent = {p: jnp.asarray(g[victim]) for p, g in problem.gradients.items()}
    plain = Told(Sent(sent, inverse_norms(sent)), problem.matched)
    defense = problem.defense
    if defense is None or defense.name == "clip":
        return plain
    if defense.name == "sign":
        return plain._replace(signs=True, noisy=True, sent=plain.sent._replace(prior=_prior(problem, HINT)))
    if defense.name in ("top_k", "soteria"):
        masks = _kept(problem, sent, defense)
        weights = {p: w * masks[p] for p, w in plain.sent.weights.items()}
        return plain._replace(sent=Sent(sent, weights, _prior(problem, HINT * _root(problem))))
    sigmas = _sigmas(problem, sent, defense)
    if not any(sigmas.values()):
        return plain
    return _weighted(problem, sent, sigmas)


def _weighted(problem: Problem, sent: dict[str, Array], sigmas: dict[str, float]) -> Told:
    """Rows k (g - s) / sigma and k u / deviation, k such that ||(s / sigma)|| k is the size of the residual."""
    over = {p: 1.0 / s if s else 0.0 for p, s in sigmas.items()}
    total = float(np.sqrt(sum(over[p] ** 2 * float(jnp.sum(g**2)) for p, g in sent.items())))
    k = float(np.sqrt(len(sent))) / total
    entries = sum(g.size for p, g in sent.items() if over[p])
    weights = {p: jnp.asarray(k * over[p], problem.dtype) for p in sent}
    matched = max(problem.matched, MARGIN * k * float(np.sqrt(entries / len(sent))))
    return Told(Sent(sent, weights, _prior(problem, k)), matched, noisy=True)


def noise_of(problem: Problem, victim: int) -> dict[str, float] | None:
    """The standard deviation of the noise that the defense adds, by parameter; None where it adds none."""
    if problem.defense is None or problem.defense.name not in LOSSY or problem.defense.name == "sign":
        return None
    return _sigmas(problem, {p: jnp.asarray(g[victim]) for p, g in problem.gradients.items()}, problem.defense)


def _sigmas(problem: Problem, sent: dict[str, Array], defense: Setting) -> dict[str, float]:
    """The noise's standard deviation, by parameter; 0 for a parameter of which nothing can be said."""
    if defense.name == "qsgd":  # uniform about a level: step^2 E[f (1 - f)] = step^2 / 6
        return {p: _least(np.asarray(g)) / 6**0.5 for p, g in sent.items()}
    values = defense.values
    sigma = {
        "gaussian": lambda: values["sigma"],
        "laplace": lambda: 2**0.5 * values["scale"],
        "dp_sgd": lambda: values["clip"] * values["noise_multiplier"] / problem.examples,
    }[defense.name]()
    return dict.fromkeys(sent, sigma)


def _least(g: np.ndarray) -> float:
    """The smallest magnitude but 0: one level of a quantized gradient."""
    sizes = np.abs(g[g != 0])
    return float(sizes.min()) if sizes.size else 0.0


def _kept(problem: Problem, sent: dict[str, Array], defense: Setting) -> dict[str, Array]:
    """1 where an entry is what the client's gradient is; 0 where the defense put a 0."""
    if defense.name == "top_k":
        return {p: (g != 0).astype(g.dtype) for p, g in sent.items()}
    head = tuple(sent) if problem.chain is None else problem.segments[-1].paths
    return {p: _full(g) if p in head and g.ndim == 2 else jnp.ones_like(g) for p, g in sent.items()}


def _full(g: Float[Array, "a b"]) -> Float[Array, "a b"]:
    """0 in the rows and the columns that are 0 throughout."""
    live = (g != 0).any(axis=1)[:, None] & (g != 0).any(axis=0)[None]
    return live.astype(g.dtype)


def _root(problem: Problem) -> float:
    return float(np.sqrt(len(problem.gradients) / np.prod(problem.batch_shape)))


def _prior(problem: Problem, k: float) -> Array | None:
    """The weight of amplitudes of the image's own scale, `DEVIATION` of the range each; None without a prior."""
    low, high = problem.input_range
    return None if problem.prior == "none" else jnp.asarray(k / (DEVIATION * (high - low)), problem.dtype)


def _clip(g: Any, norm: float) -> Any:
    transformation = clip(norm)
    return transformation.update(g, transformation.init(g))[0]


@keep(32)
def clipped(gradient: Gradient, norm: float) -> Gradient:
    """The gradient as it is clipped to a norm."""

    def of(*given: Any) -> dict[str, Array]:
        return _clip(gradient(*given), norm)

    return of


@keep(32)
def _clipped_each(gradients: Gradient, norm: float) -> Gradient:
    def clipped(*given: Any) -> dict[str, Array]:
        each = jax.vmap(lambda g: _clip(g, norm))(gradients(*given))
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), each)

    return clipped


@keep(32)
def _signs(gradient: Gradient) -> Gradient:
    return lambda *given: jax.tree.map(jnp.sign, gradient(*given))
