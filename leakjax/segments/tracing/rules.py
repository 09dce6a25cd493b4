"""How primitives are evaluated: as what has fast transposes, weight gradients and batches."""

from collections.abc import Callable, Mapping
from typing import Any

from leakjax.segments.tracing.convolution import convolution
from leakjax.segments.tracing.windows import window_max

RULES: Mapping[str, Callable[..., Any]] = {"conv_general_dilated": convolution, "reduce_window_max": window_max}
