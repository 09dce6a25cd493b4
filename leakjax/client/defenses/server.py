"""What a server that knows a defense can make of what was sent: to predict, to compare, and how much.

Each defense of the table carries one `Server`. An adaptive attack asks it, and asks for no defense by name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.client.defenses.clipping import clip
from leakjax.runtime.programs import keep
from leakjax.segments.tracing.network import Gradient

Values = Mapping[str, float]
Sent = Mapping[str, Array]


class Server(NamedTuple):
    """What is known of what a defense does, with the `values` of its parameters.

    - `predict(gradient, each, values)`: what is sent but for what is random, masked or rounded, as a function of
      (variables, x, labels, smoothing=None); `gradient` is the client's, `each` the gradients of single examples;
    - `deviation(values, sent, examples)`: standard deviation of the noise in the entries of each parameter, 0 where
      nothing can be said of one; None for a defense without noise;
    - `kept(sent, head)`: 1 where an entry is the client's own, 0 where the defense put a 0; `head` are the parameters
      of the last layer;
    - `signs`: signs alone are sent; `rescales`: gradients are multiplied by a factor of the client's;
    - `layers`: whether entries are still those of a layer's gradient, up to noise, so that layers can be solved;
    - `known_sigma(values)`: noise that is in every entry alike, whoever is told of it.
    """

    predict: Callable[[Gradient, Gradient, Values], Gradient] | None = None
    deviation: Callable[[Values, Sent, int], Mapping[str, float]] | None = None
    kept: Callable[[Sent, Sequence[str]], Mapping[str, Array]] | None = None
    signs: bool = False
    rescales: bool = False
    layers: bool = True
    known_sigma: Callable[[Values], float] | None = None

    @property
    def lossy(self) -> bool:
        """Whether noise or rounding remains in what was sent, so that no image is determined exactly."""
        return self.signs or self.deviation is not None


def even(sigma: Callable[[Values, int], float]) -> Callable[[Values, Sent, int], Mapping[str, float]]:
    """The same deviation in every entry: sigma(values, examples)."""
    return lambda values, sent, examples: dict.fromkeys(sent, sigma(values, examples))


def quantized(values: Values, sent: Sent, examples: int) -> Mapping[str, float]:
    """Of stochastic rounding to levels: step^2 E[f (1 - f)] = step^2 / 6, uniform about a level; the smallest magnitude
    but 0 is one step."""
    del values, examples

    def step(g: np.ndarray) -> float:
        sizes = np.abs(g[g != 0])
        return float(sizes.min()) if sizes.size else 0.0

    return {p: step(np.asarray(g)) / 6**0.5 for p, g in sent.items()}


def not_zero(sent: Sent, head: Sequence[str]) -> Mapping[str, Array]:
    """The entries that were sent."""
    del head
    return {p: (g != 0).astype(g.dtype) for p, g in sent.items()}


def live_features(sent: Sent, head: Sequence[str]) -> Mapping[str, Array]:
    """All but the rows and columns of the head's matrices that are 0 throughout."""
    return {p: _live(g) if p in head and g.ndim == 2 else jnp.ones_like(g) for p, g in sent.items()}


def _live(g: Float[Array, "a b"]) -> Float[Array, "a b"]:
    live = (g != 0).any(axis=1)[:, None] & (g != 0).any(axis=0)[None]
    return live.astype(g.dtype)


def clipped(gradient: Gradient, each: Gradient, values: Values) -> Gradient:
    """The whole gradient, clipped."""
    del each
    return _clipped(gradient, values["norm"])


def clipped_each(gradient: Gradient, each: Gradient, values: Values) -> Gradient:
    """The mean of every example's gradient, clipped."""
    del gradient
    return _clipped_each(each, values["clip"])


def _clip(g: Any, norm: float) -> Any:
    transformation = clip(norm)
    return transformation.update(g, transformation.init(g))[0]


@keep(32)
def _clipped(gradient: Gradient, norm: float) -> Gradient:
    def of(*given: Any) -> dict[str, Array]:
        return _clip(gradient(*given), norm)

    return of


@keep(32)
def _clipped_each(gradients: Gradient, norm: float) -> Gradient:
    def of(*given: Any) -> dict[str, Array]:
        each = jax.vmap(lambda g: _clip(g, norm))(gradients(*given))
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), each)

    return of
