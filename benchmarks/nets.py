"""Models by name: the zoo's, and nets of any size, `plain:SIDExWIDTHxDEPTH` and `strided:SIDExWIDTH[xCLASSES]`."""

import re
from typing import Any

from flax import nnx

from leakjax.errors import InputError
from leakjax.models import MODELS, build_model
from leakjax.models.activations import parse_activation
from leakjax.models.networks import Conv, ConvNet
from leakjax.models.zoo import ModelSpec

_PLAIN = re.compile(r"plain:(\d+)x(\d+)x(\d+)")
_STRIDED = re.compile(r"strided:(\d+)x(\d+)(?:x(\d+))?")


def strided(side: int, width: int) -> str:
    """The name of a net for `side` x `side` x 3 images and 1,000 classes: AlexNet's first convolution (11x11, stride 4)
    with `width` filters, a second with stride 2 and four times as many."""
    return f"strided:{side}x{width}"


def plain(side: int, width: int, depth: int) -> str:
    """The name of a net for `side` x `side` x 3 images: `depth` convolutions of `width` filters, the first strided."""
    return f"plain:{side}x{width}x{depth}"


def plain_size(name: str) -> tuple[int, int, int] | None:
    """(side, width, depth) of a plain net's name; None for other names."""
    found = _PLAIN.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def net_spec(name: str) -> ModelSpec:
    """The `ModelSpec` of a name; an unknown one raises `InputError`."""
    if name in MODELS:
        return MODELS[name]
    if (size := plain_size(name)) is not None:
        side, width, depth = size
        return _spec("a plain net", side, [Conv(width, 3, 1 + (k == 0), 1) for k in range(depth)], 10)
    if (found := _STRIDED.fullmatch(name)) is not None:
        side, width, classes = int(found[1]), int(found[2]), int(found[3] or 1000)
        return _spec("a strided net", side, [Conv(width, 11, 4, 2), Conv(4 * width, 3, 2, 1)], classes)
    raise InputError(
        f"model {name!r} is neither one of the zoo nor plain:SIDExWIDTHxDEPTH nor strided:SIDExWIDTH[xCLASSES]"
    )


def _spec(summary: str, side: int, layers: list[Conv], outputs: int) -> ModelSpec:
    shape = (side, side, 3)

    def build(rngs: nnx.Rngs, activation: str, init: str) -> ConvNet:
        chosen = [parse_activation(activation)] * len(layers)
        return ConvNet(layers, rngs=rngs, activations=chosen, input_shape=shape, outputs=outputs, init=init)

    return ModelSpec(build, summary, "tanh", input_shape=shape, outputs=outputs)


def build_net(name: str, seed: int, activation: str | None) -> Any:
    """The nnx module of a name, with weights of `seed`."""
    if name in MODELS:
        return build_model(name, seed=seed, activation=activation)
    spec = net_spec(name)
    return spec.build(nnx.Rngs(seed), activation or spec.activation, spec.init)
