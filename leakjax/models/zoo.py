"""The networks of the papers, by name."""

import dataclasses
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from leakjax.arguments import choice, whole
from leakjax.errors import InputError, first_line
from leakjax.models.activations import parse_activation
from leakjax.models.initialization import INITIALIZATIONS
from leakjax.models.networks import Conv, ConvNet, DenseNet
from leakjax.models.residual import ResNet
from leakjax.models.segmentation import FCN, UNet

Build = Callable[[nnx.Rngs, str, str], Any]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A network of the zoo.

    - `build(rngs, activation, init)`: the nnx module;
    - `activation`: the default, as `NAME[:PARAMETER]`; `init`: the paper's initialization;
    - `input_shape` (H, W, C), `input_range`, `loss`: as in the paper; `outputs`: number of logits;
    - `maps`: whether these are logits of every pixel, to be compared with a label map; images may have any size then.
    """

    build: Build
    summary: str
    activation: str
    input_shape: tuple[int, int, int] = (32, 32, 3)
    input_range: tuple[float, float] = (0.0, 1.0)
    loss: str = "softmax_cross_entropy"
    outputs: int = 10
    init: str = "torch"
    maps: bool = False


def _convolutions(
    layers: Sequence[tuple[int, int, int, int]], fixed: Mapping[int, str], options: Mapping[str, Any]
) -> Build:
    def build(rngs: nnx.Rngs, activation: str, init: str) -> ConvNet:
        names = [fixed.get(k, activation) for k in range(len(layers))]
        return ConvNet(
            [Conv(*layer) for layer in layers],
            rngs=rngs,
            activations=[parse_activation(name) for name in names],
            init=init,
            **options,
        )

    return build


def _rgap(layers: Sequence[tuple[int, int, int, int]], summary: str) -> ModelSpec:
    options = {"outputs": 1, "head_bias": False}
    return ModelSpec(
        _convolutions(layers, {}, options),
        f"R-GAP: {summary}",
        "leaky_relu:0.2",
        loss="sigmoid_binary_cross_entropy",
        outputs=1,
    )


def _hybrid(
    *layers: tuple[int, int, int, int], logits: str | None = None, bias: bool = False, activation: str = "tanh"
) -> ModelSpec:
    options = {"conv_bias": bias, "logits": None if logits is None else parse_activation(logits)}
    shown = "".join(str(layer).replace(" ", "") for layer in layers) + (f", {logits} logits" if logits else "")
    return ModelSpec(
        _convolutions(layers, {}, options), f"Chen & Campbell: {shown}", activation, input_range=(-0.5, 0.5)
    )


def _rconv(*layers: tuple[int, int, int, int], leaky: int, outputs: int, summary: str) -> ModelSpec:
    options = {"conv_bias": True, "outputs": outputs}
    fixed = dict.fromkeys(range(leaky), "leaky_relu:0.2")
    return ModelSpec(
        _convolutions(layers, fixed, options), f"R-CONV: {summary}", "relu", outputs=outputs, init="uniform"
    )


def _resnet(blocks: int, summary: str, *, pooled: bool = False) -> ModelSpec:
    def build(rngs: nnx.Rngs, activation: str, init: str) -> ResNet:
        return ResNet(blocks, rngs=rngs, activation=parse_activation(activation), pooled=pooled, init=init)

    return ModelSpec(build, f"He et al.: {summary}", "relu")


def _fcn3(rngs: nnx.Rngs, activation: str, init: str) -> DenseNet:
    logits = parse_activation("leaky_relu:0.2")
    return DenseNet((784, 1000, 100, 1), rngs=rngs, activation=parse_activation(activation), logits=logits, init=init)


def _pixelwise(network: type[FCN] | type[UNet], classes: int, summary: str) -> ModelSpec:
    def build(rngs: nnx.Rngs, activation: str, init: str) -> Any:
        return network(classes, rngs=rngs, activation=parse_activation(activation), init=init)

    return ModelSpec(build, summary, "tanh", input_shape=(16, 16, 3), outputs=classes, maps=True)


def _cnn6(second: int) -> list[tuple[int, int, int, int]]:
    return [(12, 4, 2, 2), (second, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]


_LENET = ((12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2))
_LENET_MAX = ((12, 5, 1, 2), (12, 5, 1, 2), (12, 5, 1, 2))
_START = ((12, 5, 2, 2), (16, 5, 2, 2))

MODELS: Mapping[str, ModelSpec] = {
    "fcn3": ModelSpec(
        _fcn3,
        "R-GAP: dense 784-1000-100-1, no biases, leaky_relu logit",
        "leaky_relu:0.2",
        input_shape=(28, 28, 1),
        loss="sigmoid_binary_cross_entropy",
        outputs=1,
    ),
    "cnn6": _rgap(_cnn6(36), "six convolutions, one logit, no biases"),
    "cnn6d": _rgap(_cnn6(20), 'cnn6 with 20 filters in its second layer, the "safe" net'),
    "lenet": _hybrid(*_LENET, bias=True, activation="leaky_relu:0.01"),
    "lenet2": _hybrid((12, 3, 2, 1), (12, 5, 2, 2), (12, 5, 1, 2)),
    "wide": dataclasses.replace(
        _hybrid((24, 5, 2, 2), (48, 5, 2, 2), (48, 5, 1, 2), bias=True),
        summary="a wide lenet, (24,5,2,2)(48,5,2,2)(48,5,1,2): determined with ReLU too",
        input_range=(0.0, 1.0),
    ),
    "lenet_max": ModelSpec(
        _convolutions(_LENET_MAX, {}, {"conv_bias": True, "pools": 2}),
        "lenet with 2x2 max-pooling in place of its two strides",
        "tanh",
    ),
    "resnet8": _resnet(1, "three stages of one basic block, eval-mode batch norm, dense head on the flattened map"),
    "resnet20": _resnet(3, "three stages of three basic blocks, eval-mode batch norm, dense head on the flattened map"),
    "resnet8_gap": _resnet(1, "resnet8 with global average pooling before its head", pooled=True),
    "cnn2_c0": _hybrid((1, 3, 2, 0), logits="tanh"),
    "cnn2_c1": _hybrid((6, 3, 1, 0)),
    "cnn2_c2": _hybrid((6, 4, 2, 0)),
    "cnn2_c4": _hybrid((1, 3, 1, 0), logits="tanh"),
    "cnn2_c5": _hybrid((3, 3, 1, 1), logits="tanh"),
    "cnn2_c6": _hybrid((12, 5, 2, 0)),
    "cnn3_c1": _hybrid((6, 3, 1, 0), (3, 4, 2, 0)),
    "cnn3_c2": _hybrid((6, 4, 2, 0), (3, 3, 2, 0)),
    "cnn3_c3": _hybrid((6, 3, 1, 0), (9, 3, 1, 0)),
    "cnn3_c4": _hybrid((1, 3, 1, 0), (6, 3, 1, 0)),
    "cnn3_c5": _hybrid((12, 5, 1, 1), (12, 5, 2, 2)),
    "cnn4_c1": _hybrid((6, 3, 1, 0), (5, 4, 2, 0), (3, 4, 1, 0)),
    "cnn4_c2": _hybrid((16, 5, 1, 0), (6, 5, 2, 0), (32, 5, 1, 2)),
    "cnn4_c3": _hybrid((6, 5, 1, 0), (16, 5, 2, 0), (16, 5, 1, 2)),
    "rconv_lenet": _rconv(
        *_START, (12, 5, 1, 2), (3, 5, 1, 2), leaky=2, outputs=10, summary="its main program's LeNet"
    ),
    "rconv_lenet12": _rconv(
        *_START, (12, 5, 1, 2), (12, 5, 1, 2), leaky=2, outputs=100, summary="LeNet with 12 filters in its last layer"
    ),
    "rconv_lenet_o": _rconv(
        *_START, (3, 5, 1, 2), (3, 5, 1, 2), leaky=2, outputs=100, summary="LeNet_O, three filters in its last layers"
    ),
    "rconv_cnn6": _rconv(*_START, *[(3, 5, 1, 2)] * 4, leaky=2, outputs=10, summary="O_CNN6"),
    "rconv_4relu": _rconv(
        (12, 5, 2, 2), (22, 5, 2, 2), (3, 5, 1, 2), (3, 5, 1, 2), leaky=1, outputs=100, summary="LeNet, ReLU but first"
    ),
    "rconv_relu": _rconv(
        (77, 5, 2, 2), (22, 5, 2, 2), (3, 5, 1, 2), (3, 5, 1, 2), leaky=0, outputs=100, summary="LeNet, ReLU throughout"
    ),
    "fcn": _pixelwise(FCN, 2, "Long et al.: three convolutions of 24 filters, two classes a pixel"),
    "unet": _pixelwise(UNet, 2, "Ronneberger et al.: a small U-Net, one level, two classes a pixel"),
}
"""The zoo by name. `activation` replaces every activation but the logits' and, in R-CONV's nets, their first
LeakyReLUs."""


def build_model(name: str, *, seed: int = 0, activation: str | None = None, init: str | None = None) -> Any:
    """A network of the zoo with fresh weights.

    Arguments: `name` of `MODELS`; `seed` of the initialization; `activation` as `NAME[:PARAMETER]` (default: the
    paper's); `init` of `INITIALIZATIONS` (default: the paper's).

    Raises `InputError` for unknown names.
    """
    spec = MODELS[choice("model", name, MODELS)]
    seed = whole("seed", seed, 0, 2**32 - 1)
    if init is not None:
        choice("initialization", init, INITIALIZATIONS)
    activation = spec.activation if activation is None else activation
    parse_activation(activation)
    return spec.build(nnx.Rngs(seed), activation, init or spec.init)


def load_function(path: str, option: str) -> tuple[Callable[..., Any], str]:
    """(what `package.module:name` names, `name`); the current directory is importable.

    Raises `InputError` with the `option` where the module or the name cannot be found, or the name is no function.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        found = functools.reduce(lambda o, n: getattr(o, n, None), name.split("."), module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the module's own code
        reason = first_line(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{option} {path}: cannot import {module_name!r} ({reason})") from error
    if not callable(found):
        raise InputError(f"{option} {path}: {module_name!r} has no function {name!r}")
    return found, name


def load_factory(path: str, option: str = "--model", *, seed: int, activation: str | None) -> Any:
    """Call the user's `package.module:factory`, with `seed` and `activation` where its signature has them.

    The current directory is importable. `activation` reaches the factory as a function, or None where none was asked
    for. Raises `InputError`, naming the `option`, where module or factory cannot be found, or the factory raises.
    """
    factory, name = load_function(path, option)
    offered = {"seed": seed, "activation": None if activation is None else parse_activation(activation)}
    try:
        wanted = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"{option} {path}: {name!r} has no signature to read ({error})") from error
    if activation is not None and "activation" not in wanted:
        raise InputError(f"--activation: {path} takes no argument named activation")
    try:
        return factory(**{k: v for k, v in offered.items() if k in wanted})
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the factory's own code
        raise InputError(f"{option} {path}: the factory raised {type(error).__name__}: {first_line(error)}") from error
