"""Residual networks for small images (He et al., "Deep residual learning", arXiv 1512.03385, section 4.2)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from leakjax.models.initialization import INITIALIZATIONS


class _Layer(nnx.Module):
    """A convolution without bias and its eval-mode batch norm, whose scale and bias are trained."""

    def __init__(self, channels: int, filters: int, kernel: int, stride: int, *, rngs: nnx.Rngs, init: str):
        self.conv = nnx.Conv(
            channels,
            filters,
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,
            use_bias=False,
            kernel_init=INITIALIZATIONS[init](channels * kernel**2),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(filters, use_running_average=True, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, channels) -> (N, H / stride, W / stride, filters)."""
        return self.norm(self.conv(x))


class BasicBlock(nnx.Module):
    """y = act(x' + layer2(act(layer1(x)))); x' = x, or a 1x1 layer of it where the shape changes."""

    def __init__(
        self, channels: int, filters: int, stride: int, *, activation: Callable[[Any], Any], rngs: nnx.Rngs, init: str
    ):
        self.activation = activation
        self.layer1 = _Layer(channels, filters, 3, stride, rngs=rngs, init=init)
        self.layer2 = _Layer(filters, filters, 3, 1, rngs=rngs, init=init)
        same = (stride, channels) == (1, filters)
        self.shortcut = None if same else _Layer(channels, filters, 1, stride, rngs=rngs, init=init)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, channels) -> (N, H / stride, W / stride, filters)."""
        y = self.layer2(self.activation(self.layer1(x)))
        return self.activation(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A `stem` and stages of basic blocks `block1`, `block2`, ..., then a dense `head` with bias.

    `blocks` a stage; stages have `widths` filters and, but for the first, begin with stride 2. The head reads the
    flattened map, or its mean over all positions where `pooled`.
    """

    def __init__(
        self,
        blocks: int,
        *,
        rngs: nnx.Rngs,
        activation: Callable[[Any], Any],
        widths: Sequence[int] = (16, 32, 64),
        input_shape: tuple[int, int, int] = (32, 32, 3),
        outputs: int = 10,
        pooled: bool = False,
        init: str = "torch",
    ):
        side, channels = list(input_shape[:2]), widths[0]
        self.activation, self.pooled = activation, pooled
        self.depth = blocks * len(widths)
        self.stem = _Layer(input_shape[2], channels, 3, 1, rngs=rngs, init=init)
        for k in range(self.depth):
            filters, stride = widths[k // blocks], 2 if k and k % blocks == 0 else 1
            block = BasicBlock(channels, filters, stride, activation=activation, rngs=rngs, init=init)
            setattr(self, f"block{k + 1}", block)
            side, channels = [-(-s // stride) for s in side], filters
        features = channels * (1 if pooled else math.prod(side))
        draw = INITIALIZATIONS[init](features)
        self.head = nnx.Linear(features, outputs, kernel_init=draw, bias_init=draw, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits (N, outputs) of images (N, H, W, C)."""
        x = self.activation(self.stem(x))
        for k in range(1, self.depth + 1):
            x = getattr(self, f"block{k}")(x)
        x = jnp.mean(x, axis=(1, 2)) if self.pooled else jnp.reshape(x, (x.shape[0], -1))
        return self.head(x)
