"""The table of defenses, and their specifications as typed: `name[:value[,value..]]`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Array, Float

from leakjax.client.defenses import clipping, noise, rounding, server
from leakjax.client.defenses.server import Server
from leakjax.client.defenses.soteria import soteria
from leakjax.errors import InputError, unknown_name
from leakjax.models.reader import Model

CUSTOM = "custom"
"""What an observation says of a transformation of the client's own: the server does not know what it is."""

MOST = 1e15
"""No parameter is larger: float32 can still square it."""


class Client(NamedTuple):
    """What a client knows when it builds its defense: the model, and its own images (B, H, W, C)."""

    model: Model
    x: Float[Any, "B H W C"]


class Parameter(NamedTuple):
    """A defense's parameter: its default, and low <= value <= high (ends excluded where `open`)."""

    name: str
    default: float
    low: float = 0.0
    high: float = MOST
    open: bool = True
    whole: bool = False


class Defense(NamedTuple):
    """A defense, what `leakjax list defenses` says of it, and its parameters in the order in which they are typed.

    - `build(key, client, *values)`: the transformation of one client, `key` for its random numbers;
    - `per_example`: it takes the gradients of B examples, on a leading axis, instead of their mean;
    - `server`: what a server that knows it makes of what was sent.
    """

    build: Callable[..., optax.GradientTransformation]
    summary: str
    parameters: tuple[Parameter, ...] = ()
    per_example: bool = False
    server: Server = Server()


DEFENSES: Mapping[str, Defense] = {
    "clip": Defense(
        lambda key, client, norm: clipping.clip(norm),
        "the whole gradient's norm is clipped",
        (Parameter("norm", 1.0),),
        server=Server(predict=server.clipped, rescales=True),
    ),
    "dp_sgd": Defense(
        lambda key, client, norm, multiplier: clipping.dp_sgd(key, norm, multiplier),
        "every example's gradient is clipped, Gaussian noise added (DP-SGD, arXiv 1607.00133)",
        (Parameter("clip", 1.0), Parameter("noise_multiplier", 1e-3, open=False)),
        per_example=True,
        server=Server(
            predict=server.clipped_each,
            deviation=server.even(lambda values, examples: values["clip"] * values["noise_multiplier"] / examples),
            rescales=True,
        ),
    ),
    "gaussian": Defense(
        lambda key, client, sigma: noise.gaussian(key, sigma),
        "Gaussian noise on every entry",
        (Parameter("sigma", 1e-3),),
        server=Server(
            deviation=server.even(lambda values, examples: values["sigma"]), known_sigma=lambda values: values["sigma"]
        ),
    ),
    "laplace": Defense(
        lambda key, client, scale: noise.laplace(key, scale),
        "Laplacian noise on every entry, standard deviation sqrt(2) scale",
        (Parameter("scale", 1e-3),),
        server=Server(deviation=server.even(lambda values, examples: 2**0.5 * values["scale"])),
    ),
    "qsgd": Defense(
        lambda key, client, levels: rounding.qsgd(key, levels),
        "stochastic quantization of every parameter's gradient, unbiased (arXiv 1610.02132)",
        (Parameter("levels", 16.0, low=1.0, open=False, whole=True),),
        server=Server(deviation=server.quantized, layers=False),
    ),
    "sign": Defense(
        lambda key, client: rounding.sign(),
        "signs alone (signSGD, arXiv 1802.04434)",
        server=Server(signs=True, layers=False),
    ),
    "soteria": Defense(
        lambda key, client, pruned: soteria(client.model, client.x, pruned),
        "the last dense layer's gradient, pruned at the most telling features (arXiv 2012.06043)",
        (Parameter("pruned", 0.5, high=1.0),),
        server=Server(kept=server.live_features, layers=False),
    ),
    "top_k": Defense(
        lambda key, client, pruned: rounding.top_k(pruned),
        "the largest entries of every parameter's gradient alone (arXiv 1712.01887)",
        (Parameter("pruned", 0.9, high=1.0),),
        server=Server(kept=server.not_zero, layers=False),
    ),
}
"""Defenses by name."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A defense of the table with the values of its parameters, by name."""

    name: str
    values: Mapping[str, float]

    @property
    def defense(self) -> Defense:
        """The table's entry."""
        return DEFENSES[self.name]

    @property
    def server(self) -> Server:
        """What a server that knows the defense makes of what was sent."""
        return self.defense.server

    @property
    def spec(self) -> str:
        """As typed, with every value: `build_defense(setting.spec) == setting`."""
        return ":".join(filter(None, [self.name, ",".join(f"{v!r}" for v in self.values.values())]))

    def transformation(self, key: Array, client: Client) -> optax.GradientTransformation:
        """The transformation of one client's gradient."""
        return self.defense.build(key, client, *self.values.values())


def build_defense(spec: str) -> Setting:
    """Parse `name[:value[,value..]]`, as "gaussian:1e-3"; values that are left out are the defaults.

    Raises `InputError` for an unknown name, too many values, or a value that is no number or out of its range.
    """
    if not isinstance(spec, str):
        raise unknown_name("defense", spec, DEFENSES)
    name, _, typed = spec.partition(":")
    if name not in DEFENSES:
        raise unknown_name("defense", name, DEFENSES)
    parameters = DEFENSES[name].parameters
    texts = typed.split(",") if typed else []
    if len(texts) > len(parameters):
        takes = ", ".join(p.name for p in parameters) or "no parameter"
        raise InputError(f"defense {name!r} takes {takes}; got {len(texts)} values in {spec!r}")
    values = {p.name: p.default for p in parameters}
    for parameter, text in zip(parameters, texts, strict=False):
        values[parameter.name] = _value(name, parameter, text)
    return Setting(name, values)


def _value(name: str, parameter: Parameter, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"defense {name!r}: {parameter.name} must be a number, got {text!r}") from None
    low, high = parameter.low, parameter.high
    good = low < value < high if parameter.open else low <= value <= high
    if not (np.isfinite(value) and good):
        ends = f"{'above' if parameter.open else 'at least'} {low:g}" + (
            f" and below {high:g}" if high < MOST or value > 1 else ""
        )
        raise InputError(f"defense {name!r}: {parameter.name} must be {ends}, got {text}")
    if parameter.whole and value != int(value):
        raise InputError(f"defense {name!r}: {parameter.name} must be a whole number, got {text}")
    return value
