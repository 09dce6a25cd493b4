"""Networks that give every pixel a class: convolutions alone, and a small U-Net.

Both take images of any size (a U-Net of even sides) and return (N, H, W, classes).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from leakjax.errors import InputError
from leakjax.models.initialization import INITIALIZATIONS


def _conv(
    channels: int, filters: int, kernel: int, *, stride: int = 1, rngs: nnx.Rngs, init: str, up: bool = False
) -> Any:
    """A convolution with bias, or where `up` its transpose, that multiplies both sides by the stride."""
    draw = INITIALIZATIONS[init](channels * kernel**2)
    options = {"strides": (stride, stride), "kernel_init": draw, "bias_init": draw, "rngs": rngs}
    if up:
        return nnx.ConvTranspose(channels, filters, (kernel, kernel), padding="VALID", **options)
    return nnx.Conv(channels, filters, (kernel, kernel), padding=kernel // 2, **options)


class FCN(nnx.Module):
    """Three convolutions, 3x3, 3x3 and 1x1, with an activation behind the first two.

    Reference: Long et al., "Fully convolutional networks for semantic segmentation", CVPR 2015, arXiv 1411.4038.
    """

    def __init__(
        self,
        classes: int,
        *,
        rngs: nnx.Rngs,
        activation: Callable[[Any], Any],
        width: int = 24,
        channels: int = 3,
        init: str = "torch",
    ):
        self.activation = activation
        self.conv1 = _conv(channels, width, 3, rngs=rngs, init=init)
        self.conv2 = _conv(width, width, 3, rngs=rngs, init=init)
        self.head = _conv(width, classes, 1, rngs=rngs, init=init)

    def __call__(self, x: Any) -> Any:
        """Logits (N, H, W, classes) of images (N, H, W, channels)."""
        return self.head(self.activation(self.conv2(self.activation(self.conv1(x)))))


class UNet(nnx.Module):
    """One level down and up again, with the skip by concatenation.

        a = act(down1(x)),  b = act(middle(act(down2(a)))),  y = head(act(join([a, act(up(b))])))

    `down2` halves both sides by its stride, `up` doubles them.

    Reference: Ronneberger et al., "U-Net", MICCAI 2015, arXiv 1505.04597.
    """

    def __init__(
        self,
        classes: int,
        *,
        rngs: nnx.Rngs,
        activation: Callable[[Any], Any],
        width: int = 8,
        channels: int = 3,
        init: str = "torch",
    ):
        self.activation = activation
        self.down1 = _conv(channels, width, 3, rngs=rngs, init=init)
        self.down2 = _conv(width, 2 * width, 3, stride=2, rngs=rngs, init=init)
        self.middle = _conv(2 * width, 2 * width, 3, rngs=rngs, init=init)
        self.up = _conv(2 * width, width, 2, stride=2, rngs=rngs, init=init, up=True)
        self.join = _conv(2 * width, width, 3, rngs=rngs, init=init)
        self.head = _conv(width, classes, 1, rngs=rngs, init=init)

    def __call__(self, x: Any) -> Any:
        """Logits (N, H, W, classes) of images (N, H, W, channels)."""
        if x.shape[1] % 2 or x.shape[2] % 2:
            raise InputError(f"a U-Net halves and doubles its sides: they must be even, got {x.shape[1:3]}")
        act = self.activation
        skip = act(self.down1(x))
        inner = act(self.up(act(self.middle(act(self.down2(skip))))))
        return self.head(act(self.join(jnp.concatenate([skip, inner], axis=-1))))
