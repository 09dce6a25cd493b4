"""Models by name: the zoo's, nets of any size, `plain:SIDExWIDTHxDEPTH` and `strided:SIDExWIDTH[xCLASSES]`, and
`batch_norm:NAME`, one of these with a batch norm behind every convolution."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx

from leakjax.errors import InputError
from leakjax.models import MODELS, build_model
from leakjax.models.activations import parse_activation
from leakjax.models.networks import Conv, ConvNet
from leakjax.models.zoo import ModelSpec

_PLAIN = re.compile(r"plain:(\d+)x(\d+)x(\d+)")
_NORMED = "batch_norm:"
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


def batch_norm(name: str) -> str:
    """The name of a convolutional net with a batch norm behind every convolution."""
    return f"{_NORMED}{name}"


class BatchNormed(nnx.Module):
    """A convolutional net with a batch norm behind every convolution, before its activation."""

    def __init__(self, net: Any, *, rngs: nnx.Rngs):
        if not isinstance(net, ConvNet) or net.pools:
            raise InputError("batch_norm:NAME is for nets of convolutions and a dense head, without pooling")
        self.net = net
        for k in range(1, net.depth + 1):
            setattr(self, f"norm{k}", nnx.BatchNorm(getattr(net, f"conv{k}").out_features, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        """Logits (N, outputs) of images (N, H, W, C)."""
        net = self.net
        for k in range(1, net.depth + 1):
            x = net.activations[k - 1](getattr(self, f"norm{k}")(getattr(net, f"conv{k}")(x)))
        x = net.head(jnp.reshape(x, (len(x), -1)))
        return x if net.logits is None else net.logits(x)


def net_spec(name: str) -> ModelSpec:
    """The `ModelSpec` of a name; an unknown one raises `InputError`."""
    if name in MODELS:
        return MODELS[name]
    if name.startswith(_NORMED):
        inner = net_spec(name.removeprefix(_NORMED))

        def normed(rngs: nnx.Rngs, activation: str, init: str) -> BatchNormed:
            return BatchNormed(inner.build(rngs, activation, init), rngs=rngs)

        return dataclasses.replace(inner, build=normed, summary=f"{inner.summary}, batch norms")
    if (size := plain_size(name)) is not None:
        side, width, depth = size
        return _spec("a plain net", side, [Conv(width, 3, 1 + (k == 0), 1) for k in range(depth)], 10)
    if (found := _STRIDED.fullmatch(name)) is not None:
        side, width, classes = int(found[1]), int(found[2]), int(found[3] or 1000)
        return _spec("a strided net", side, [Conv(width, 11, 4, 2), Conv(4 * width, 3, 2, 1)], classes)
    raise InputError(
        f"model {name!r} is neither one of the zoo nor plain:SIDExWIDTHxDEPTH nor strided:SIDExWIDTH[xCLASSES]; "
        "batch_norm:NAME is one of these with a batch norm behind every convolution"
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
