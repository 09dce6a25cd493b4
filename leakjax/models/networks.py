"""The two shapes that the papers' networks have: convolutions with a dense head, and dense layers alone."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from leakjax.models.initialization import INITIALIZATIONS


class Conv(NamedTuple):
    """A convolution: filters, square kernel, stride, symmetric padding."""

    filters: int
    kernel: int
    stride: int
    padding: int


class ConvNet(nnx.Module):
    """Convolutions `conv1`, `conv2`, ... with an activation after each, then a dense `head` on the flattened map.

    Behind the activations of the first `pools` of them comes a max-pooling of 2x2 windows.
    """

    def __init__(
        self,
        convolutions: Sequence[Conv],
        *,
        rngs: nnx.Rngs,
        activations: Sequence[Callable[[Any], Any]],
        input_shape: tuple[int, int, int] = (32, 32, 3),
        outputs: int = 10,
        conv_bias: bool = False,
        head_bias: bool = True,
        logits: Callable[[Any], Any] | None = None,
        pools: int = 0,
        init: str = "torch",
    ):
        initializer = INITIALIZATIONS[init]
        side, channels = list(input_shape[:2]), input_shape[2]
        self.depth = len(convolutions)
        self.activations = tuple(activations)
        self.logits = logits
        self.pools = pools
        for k, conv in enumerate(convolutions, 1):
            draw = initializer(channels * conv.kernel**2)
            layer = nnx.Conv(
                channels,
                conv.filters,
                (conv.kernel, conv.kernel),
                strides=conv.stride,
                padding=conv.padding,
                use_bias=conv_bias,
                kernel_init=draw,
                bias_init=draw,
                rngs=rngs,
            )
            setattr(self, f"conv{k}", layer)
            side = [(s + 2 * conv.padding - conv.kernel) // conv.stride + 1 for s in side]
            side = [s // 2 for s in side] if k <= pools else side
            channels = conv.filters
        features = math.prod(side) * channels
        draw = initializer(features)
        self.head = nnx.Linear(features, outputs, use_bias=head_bias, kernel_init=draw, bias_init=draw, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits (N, outputs) of images (N, H, W, C)."""
        for k in range(1, self.depth + 1):
            x = self.activations[k - 1](getattr(self, f"conv{k}")(x))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2)) if k <= self.pools else x
        x = self.head(jnp.reshape(x, (x.shape[0], -1)))
        return x if self.logits is None else self.logits(x)


class DenseNet(nnx.Module):
    """Dense layers `dense1`, `dense2`, ... on the flattened image, an activation between them."""

    def __init__(
        self,
        widths: Sequence[int],
        *,
        rngs: nnx.Rngs,
        activation: Callable[[Any], Any],
        logits: Callable[[Any], Any] | None = None,
        bias: bool = False,
        init: str = "torch",
    ):
        self.depth = len(widths) - 1
        self.activation = activation
        self.logits = logits
        for k, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            draw = INITIALIZATIONS[init](inputs)
            layer = nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=draw, bias_init=draw, rngs=rngs)
            setattr(self, f"dense{k}", layer)

    def __call__(self, x: Any) -> Any:
        """Logits (N, outputs) of images (N, H, W, C)."""
        x = jnp.reshape(x, (x.shape[0], -1))
        for k in range(1, self.depth):
            x = self.activation(getattr(self, f"dense{k}")(x))
        x = getattr(self, f"dense{self.depth}")(x)
        return x if self.logits is None else self.logits(x)
