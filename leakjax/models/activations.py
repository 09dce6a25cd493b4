"""Activations: elementwise functions, their inverses, and which entries an output determines.

An `Activation` is a function read from a model. Its inverse is closed-form where the function is recognized by its
values (`ACTIVATIONS`), and bracketed root finding on its monotone pieces otherwise. `Activation.preimage` returns what
an output says about its input, with masks: nothing is guessed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from leakjax.errors import InputError, unknown_name
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep

Function = Callable[[Array], Array]


class Preimage(NamedTuple):
    """What an activation's output x = act(z) says about its input z, entry by entry.

    - `value`: z where `known`, 0 elsewhere;
    - `known`: whether x determines z within the noise;
    - `slope`: act'(z) where `slope_known`, 0 elsewhere;
    - `slope_known`: whether x determines act'(z) (ReLU's zeros: the slope, 0, is known and z is not).
    """

    value: Float[Array, "..."]
    known: Bool[Array, "..."]
    slope: Float[Array, "..."]
    slope_known: Bool[Array, "..."]


@dataclasses.dataclass(frozen=True)
class ActivationKind:
    """A named activation: `function(z, p)`, its inverse, and where its parameter p = -function(z, p) can be read.

    `domain(p)` is the open interval of outputs on which `inverse` holds; outputs outside it (ReLU's zeros, a saturated
    tanh) leave z unknown and have slope 0.
    """

    function: Callable[[Any, Any], Any]
    inverse: Callable[[Any, Any], Any]
    domain: Callable[[Any], tuple[float, float]]
    default: float | None = None
    fit_at: float | None = None


def _whole(_: Any) -> tuple[float, float]:
    return (-np.inf, np.inf)


def _above(low: float) -> Callable[[Any], tuple[float, float]]:
    return lambda _: (low, np.inf)


def _selu(z: Any, _: Any) -> Any:
    return jax.nn.selu(z)


_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717

ACTIVATIONS: Mapping[str, ActivationKind] = {
    "identity": ActivationKind(lambda z, _: z, lambda x, _: x, _whole),
    "relu": ActivationKind(lambda z, _: jax.nn.relu(z), lambda x, _: x, _above(0.0)),
    "leaky_relu": ActivationKind(
        function=lambda z, a: jax.nn.leaky_relu(z, a),
        inverse=lambda x, a: jnp.where(x >= 0, x, x / a),
        domain=_whole,
        default=0.2,
        fit_at=-1.0,
    ),
    "elu": ActivationKind(
        function=lambda z, a: jax.nn.elu(z, a),
        inverse=lambda x, a: jnp.where(x > 0, x, jnp.log1p(jnp.where(x > 0, 0.0, x) / a)),
        domain=lambda a: (-a, np.inf),
        default=1.0,
        fit_at=-1e3,
    ),
    "selu": ActivationKind(
        _selu,
        lambda x, _: jnp.where(
            x > 0, x / _SELU_SCALE, jnp.log1p(jnp.where(x > 0, 0.0, x) / (_SELU_SCALE * _SELU_ALPHA))
        ),
        lambda _: (-_SELU_SCALE * _SELU_ALPHA, np.inf),
    ),
    "celu": ActivationKind(
        function=lambda z, a: jax.nn.celu(z, a),
        inverse=lambda x, a: jnp.where(x > 0, x, a * jnp.log1p(jnp.where(x > 0, 0.0, x) / a)),
        domain=lambda a: (-a, np.inf),
        default=1.0,
        fit_at=-1e6,
    ),
    "softplus": ActivationKind(lambda z, _: jax.nn.softplus(z), lambda x, _: x + jnp.log(-jnp.expm1(-x)), _above(0.0)),
    "sigmoid": ActivationKind(
        lambda z, _: jax.nn.sigmoid(z), lambda x, _: jnp.log(x) - jnp.log1p(-x), lambda _: (0.0, 1.0)
    ),
    "tanh": ActivationKind(lambda z, _: jnp.tanh(z), lambda x, _: jnp.arctanh(x), lambda _: (-1.0, 1.0)),
    "hard_tanh": ActivationKind(lambda z, _: jax.nn.hard_tanh(z), lambda x, _: x, lambda _: (-1.0, 1.0)),
    "soft_sign": ActivationKind(
        lambda z, _: jax.nn.soft_sign(z), lambda x, _: x / (1 - jnp.abs(x)), lambda _: (-1.0, 1.0)
    ),
    "gelu": ActivationKind(lambda z, _: jax.nn.gelu(z), lambda x, _: x, _whole),
    "silu": ActivationKind(lambda z, _: jax.nn.silu(z), lambda x, _: x, _whole),
}
"""Activations by name: the choices of `--activation` and, but for the non-monotone `gelu` and `silu`, the closed-form
inverses."""

_PIECEWISE = ("gelu", "silu")
_MOST_PIECES = 32


class Piece(NamedTuple):
    """An interval [low, high] on which a function falls (`trend` -1), is constant (0) or rises (1)."""

    low: float
    high: float
    trend: int


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function z -> x with its inverse.

    - `name`: `ACTIVATIONS`' name with its parameter where recognized, else "elementwise";
    - `function(variables, z)`: the function, evaluated from the model itself;
    - `kind`, `parameter`: the recognized closed form, or None;
    - `parametric`: whether the function depends on the model's variables;
    - `pieces`: for the others, the intervals on which the function falls (-1), is constant (0) or rises (1).
    """

    name: str
    function: Callable[[Any, Any], Any]
    kind: ActivationKind | None = None
    parameter: float | None = None
    pieces: tuple[Piece, ...] = ()
    parametric: bool = False

    @property
    def has_masks(self) -> bool:
        """Whether some outputs leave the input unknown (ReLU's zeros, saturation)."""
        return self.kind is None or any(np.isfinite(self.kind.domain(self.parameter)))

    def is_flat(self, variables: Any, dtype: Any) -> bool:
        """Whether act' = 0 on a part of [-3, 3] (a ReLU's zeros), so that many inputs are unknown."""
        if not self.has_masks:
            return False
        grid = np.linspace(-3.0, 3.0, 16).astype(dtype)  # an even number: no point at 0
        return bool(np.any(np.asarray(_slopes(self)(variables, grid)) == 0))

    def slope(self, variables: Any, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """act'(z), by a vector-Jacobian product."""
        return jax.vjp(lambda z: self.function(variables, z), z)[1](jnp.ones_like(z))[0]

    def reach(self, variables: Any, dtype: Any) -> tuple[float, float]:
        """(least, greatest) value of the function, as sampled on [-1000, 1000]; infinite where it still grows there.

        Of the closed form, where the function was recognized as one.
        """
        if self.kind is not None:
            return _reach_of_kind(self.kind, self.parameter, np.dtype(dtype))
        return _reach(lambda z: _compiled(self.function)(variables, z), dtype)

    def is_piecewise_linear(self, variables: Any, dtype: Any) -> bool:
        """Whether act'' = 0 at every point of a sample of [-40, 40] that meets no kink."""
        grid = to_device(np.random.default_rng(0).uniform(-1, 1, 64) * np.geomspace(1e-2, 40, 64), dtype)
        _, second = jax.jvp(lambda z: self.slope(variables, z), (grid,), (jnp.ones_like(grid),))
        return bool(jnp.all(second == 0))

    def is_homogeneous(self, variables: Any, dtype: Any) -> bool:
        """Whether act(t z) = t act(z) for t > 0, at a sample of scales and of [-40, 40]."""
        grid = to_device(np.random.default_rng(0).uniform(-1, 1, 64) * np.geomspace(1e-2, 40, 64), dtype)
        value = self.function(variables, grid)
        tolerance = 100 * float(jnp.finfo(dtype).eps)
        scales = (0.3, 2.0)
        return all(bool(jnp.allclose(self.function(variables, t * grid), t * value, tolerance, 0.0)) for t in scales)

    def preimage(self, variables: Any, x: Float[Array, "..."], noise: Float[Array, ""] | float = 0.0) -> Preimage:
        """Invert x = act(z) within the `noise` (an absolute level of x's error, same unit as x)."""
        if self.kind is not None:
            low, high = self.kind.domain(self.parameter)
            known = (x > low + noise) & (x < high - noise)
            inside = jnp.where(known, x, self.function(variables, jnp.ones_like(x) * 0.5))
            value = self.kind.inverse(inside, self.parameter)
            slope_known = jnp.ones_like(known)
        else:
            value, known, slope_known = self._search(variables, x, noise)
        slope = jnp.where(known, self.slope(variables, jnp.where(known, value, 1.0)), 0.0)
        return Preimage(jnp.where(known, value, 0.0), known, slope, slope_known)

    def _search(self, variables: Any, x: Array, noise: Any) -> tuple[Array, Array, Array]:
        function = functools.partial(self.function, variables)
        value, candidates, flat = jnp.zeros_like(x), jnp.zeros(x.shape, jnp.int32), jnp.zeros(x.shape, bool)
        for piece in self.pieces:
            ends = function(jnp.asarray([piece.low, piece.high], x.dtype))
            if piece.trend == 0:
                flat |= jnp.abs(x - ends[0]) <= noise
                continue
            inside = (x > jnp.min(ends) + noise) & (x < jnp.max(ends) - noise)
            value = jnp.where(inside, _bisect(function, piece, x), value)
            candidates += inside
        known = (candidates == 1) & ~flat
        return value, known, known | (flat & (candidates == 0))


_GRID = np.concatenate([-np.geomspace(40.0, 1e-3, 100), [0.0], np.geomspace(1e-3, 40.0, 100)])
"""Where functions are compared: finest near 0, as far as a logistic function leaves its ends in float32."""


@keep(64)
def _slopes(activation: Activation) -> Callable[[Any, Any], Array]:
    return jax.jit(activation.slope)


@keep(128)
def _compiled(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Array]:
    return jax.jit(function)


@keep(128)
def _on_grid(kind: ActivationKind, parameter: float | None, dtype: Any) -> Float[np.ndarray, " G"]:
    return np.asarray(kind.function(to_device(_GRID, dtype), parameter), float)


@keep(128)
def _reach_of_kind(kind: ActivationKind, parameter: float | None, dtype: Any) -> tuple[float, float]:
    return _reach(lambda z: kind.function(z, parameter), dtype)


def _reach(function: Function, dtype: Any) -> tuple[float, float]:
    grid = np.concatenate([-np.geomspace(1e3, 1e-3, 600), [0.0], np.geomspace(1e-3, 1e3, 600)])
    values = np.asarray(function(to_device(grid, dtype)), float)
    growing = {float(values[k]) for k, other in ((0, 1), (-1, -2)) if abs(values[k] - values[other]) > 1.0}
    low, high = float(np.min(values)), float(np.max(values))
    return -np.inf if low in growing else low, np.inf if high in growing else high


@keep(128)
def preimage_program(activation: Activation) -> Callable[[Any, Any, Any], Preimage]:
    """`activation.preimage` as ONE compiled program (variables, x, noise), for whoever calls it outside of others."""
    return jax.jit(activation.preimage)


def build_activation(
    function: Callable[[Any, Any], Any], variables: Any, dtype: Any, *, parametric: bool = False
) -> Activation:
    """Read an elementwise function: recognize it by its values, or split its domain into monotone pieces.

    Arguments: `function(variables, z)`; `variables`, concrete; `dtype`, the floating dtype z will have; `parametric`,
    whether the function depends on `variables` (then it is never taken for a closed form).
    """
    apply = jax.jit(functools.partial(function, variables))
    points = [kind.fit_at for kind in ACTIVATIONS.values() if kind.fit_at is not None]
    everywhere = np.asarray(apply(to_device(np.concatenate([_GRID, points]), dtype)), float)
    values, at = everywhere[: len(_GRID)], dict(zip(points, everywhere[len(_GRID) :], strict=True))
    tolerance = 100 * float(jnp.finfo(dtype).eps)
    for name, kind in ACTIVATIONS.items():
        if parametric or name in _PIECEWISE:
            continue
        p = None
        if kind.fit_at is not None:
            p = -float(at[kind.fit_at])
            if not np.isfinite(p) or p <= 0:
                continue
        reference = _on_grid(kind, p, np.dtype(dtype))
        if np.all(np.abs(reference - values) <= tolerance * np.maximum(1e-3, np.abs(values))):
            return Activation(name if p is None else f"{name}:{p:.6g}", function, kind, p)
    return Activation(
        name="elementwise",
        function=function,
        kind=None,
        parameter=None,
        pieces=_monotone_pieces(apply, dtype),
        parametric=parametric,
    )


def parse_activation(text: Any) -> Function:
    """The function named `NAME[:PARAMETER]`, as in `leaky_relu:0.01`; the same object for the same text.

    Raises `InputError` for an unknown name or a parameter that the activation does not take.
    """
    if not isinstance(text, str):
        raise unknown_name("activation", text, ACTIVATIONS)
    return _parsed(text)


@keep(64)
def _parsed(text: str) -> Function:
    name, _, parameter = text.partition(":")
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    kind = ACTIVATIONS[name]
    if not parameter:
        return functools.partial(_call, kind, kind.default)
    if kind.default is None:
        raise InputError(f"activation {name!r} takes no parameter; write {name!r}")
    try:
        value = float(parameter)
    except ValueError:
        raise InputError(f"activation parameter {parameter!r} is not a number; write for example {name}:0.01") from None
    if not 0 < value <= 1e30:
        raise InputError(f"activation parameter must be positive and finite, got {parameter}")
    return functools.partial(_call, kind, value)


def _call(kind: ActivationKind, parameter: float | None, z: Any) -> Array:
    return kind.function(z, parameter)


def _monotone_pieces(apply: Function, dtype: Any) -> tuple[Piece, ...]:
    """Split [-1000, 1000] where the sampled increments of a function change sign (finest near 0).

    More than `_MOST_PIECES` pieces count as none.
    """
    grid = np.sinh(np.linspace(-8.0, 8.0, 16001)) / np.sinh(8.0) * 1e3
    values = np.asarray(apply(to_device(grid, dtype)), float)
    rounding = 8 * float(jnp.finfo(dtype).eps) * np.maximum(np.abs(values[1:]), np.abs(values[:-1]))
    with np.errstate(invalid="ignore"):
        steps = np.diff(values)
    signs = np.where(np.isfinite(steps) & (np.abs(steps) > rounding), np.sign(steps), 0).astype(int)
    breaks = [0, *(np.flatnonzero(np.diff(signs)) + 1), len(signs)]
    if len(breaks) > _MOST_PIECES:  # a staircase or an oscillation: an output determines nothing of its input
        return ()
    return tuple(Piece(float(grid[a]), float(grid[b]), int(signs[a])) for a, b in itertools.pairwise(breaks))


def _bisect(function: Function, piece: Piece, x: Array) -> Array:
    """Entrywise bisection of function(z) = x on a monotone piece, to the last bit."""

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = bracket
        middle = 0.5 * (a + b)
        below = (function(middle) < x) == (piece.trend > 0)
        return jnp.where(below, middle, a), jnp.where(below, b, middle)

    ends = (jnp.full_like(x, piece.low), jnp.full_like(x, piece.high))
    a, b = jax.lax.fori_loop(0, 80 if x.dtype == jnp.float64 else 45, halve, ends)
    return 0.5 * (a + b)
