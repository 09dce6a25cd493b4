"""Models by name: the zoo's, and plain nets of any size, `plain:SIDExWIDTHxDEPTH`, for what a size costs."""

import re
from typing import Any

from flax import nnx

from leakjax.activations import parse_activation
from leakjax.errors import InputError
from leakjax.models import MODELS, build_model
from leakjax.models.networks import Conv, ConvNet
from leakjax.models.zoo import ModelSpec

_PLAIN = re.compile(r"plain:(\d+)x(\d+)x(\d+)")


def plain(side: int, width: int, depth: int) -> str:
    """The name of a net for `side` x `side` x 3 images: `depth` convolutions of `width` filters, the first strided."""
    return f"plain:{side}x{width}x{depth}"


def plain_size(name: str) -> tuple[int, int, int] | None:
    """(side, width, depth) of a plain net's name; None for other names."""
    found = _PLAIN.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def net_spec(name: str) -> ModelSpec:
    """The `ModelSpec` of a name; an unknown one raises `InputError`."""
    size = plain_size(name)
    if size is None:
        if name not in MODELS:
            raise InputError(f"model {name!r} is neither one of the zoo nor plain:SIDExWIDTHxDEPTH")
        return MODELS[name]
    side, width, depth = size
    layers = [Conv(width, 3, 1 + (k == 0), 1) for k in range(depth)]

    def build(rngs: nnx.Rngs, activation: str, init: str) -> ConvNet:
        chosen = [parse_activation(activation)] * depth
        return ConvNet(layers, rngs=rngs, activations=chosen, input_shape=(side, side, 3), init=init)

    return ModelSpec(build, "a plain net", "tanh", input_shape=(side, side, 3))


def build_net(name: str, seed: int, activation: str | None) -> Any:
    """The nnx module of a name, with weights of `seed`."""
    if plain_size(name) is None:
        return build_model(name, seed=seed, activation=activation)
    spec = net_spec(name)
    return spec.build(nnx.Rngs(seed), activation or spec.activation, spec.init)
