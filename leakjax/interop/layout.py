"""Where a model flattens a feature map, read from its trace, and where channel-first code would put each entry."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from leakjax.errors import InputError
from leakjax.models.reader import Model
from leakjax.segments.tracing import jaxprs, kinds

_MOVES = ("reshape", "transpose", "squeeze", "expand_dims")
_FLAT = ("dot_general", "reduce_sum", "reduce_max", "reduce_mean")  # their vectors are no flattened map


class Layout:
    """Answers, for a parameter, in which order its input features stand; see `order`."""

    def __init__(self, model: Model, input_shape: Sequence[int], dtype: type, option: str):
        self.option = option
        x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
        paths = list(model.variables)
        self.graph = jaxprs.trace_by_path(model.apply, model.variables, x)
        self.live = self.graph.dependents([self.graph.input])
        self.ids = dict(zip(paths, self.graph.variables, strict=True))
        self.source = {o: e for e in self.graph.equations for o in e.outputs}
        for equation in self.graph.equations:
            self._refuse(equation)

    def order(self, path: str) -> np.ndarray | None:
        """For feature k of the vector that parameter `path` meets, its place in a channel-first flatten.

        None where that vector is no flattened feature map (or no vector): nothing is to be permuted.
        Raises `InputError` where this cannot be told from the model.
        """
        met = self._met(path)
        if met is None or len(self._shape(met)) != 2:
            return None
        moves, value = [], met
        while (equation := self.source.get(value)) is not None:
            (ancestor, *others) = dict.fromkeys(v for v in equation.inputs if isinstance(v, int) and v in self.live)
            if equation.name in _MOVES:
                moves.append(equation)
            elif not kinds.is_elementwise(equation, self.graph.structs, self.live):
                break
            elif others:
                ancestor = min(ancestor, *others)  # a mask of the same entries: either one leads to the map
            value = ancestor
        _, *spatial, channels = self._shape(value)
        if not spatial:
            if equation is None or equation.name in _FLAT:
                return None
            raise InputError(
                f"{self.option}: cannot tell how the features that {path!r} meets were flattened (`{equation.name}` at "
                f"{equation.location}); flatten the last feature map directly before the dense layer"
            )
        place = np.moveaxis(np.arange(channels * math.prod(spatial)).reshape(channels, *spatial), 0, -1)[None]
        for move in reversed(moves):
            if move.name == "transpose":
                place = np.transpose(place, move.params["permutation"])
            else:
                place = place.reshape(self._shape(move.outputs[0]))
        return np.ravel(place)

    def dense_kernel(self, path: str) -> bool:
        """Whether the parameter stands as it is, (inputs, outputs), on the right of a matrix product with the data."""
        variable = self.ids[path]
        for equation in self.graph.equations:
            if variable in equation.inputs and equation.name == "dot_general":
                (left, right), _ = equation.params["dimension_numbers"]
                return equation.inputs[1] == variable and tuple(right) == (0,) and len(left) == 1
        return False

    def _met(self, path: str) -> int | None:
        """The first value of the data that meets the parameter."""
        own = self.graph.dependents([self.ids[path]])
        for equation in self.graph.equations:
            ids = [v for v in equation.inputs if isinstance(v, int)]
            data = [v for v in ids if v in self.live and v not in own]
            if data and any(v in own for v in ids):
                return data[0]
        return None

    def _refuse(self, equation: jaxprs.Equation) -> None:
        data = [v for v in equation.inputs if isinstance(v, int) and v in self.live]
        if not data:
            return
        if equation.name == "conv_general_dilated":
            left, right, out = equation.params["dimension_numbers"]
            n = len(left)
            last = (0, n - 1, *range(1, n - 1))
            if left != last or out != last or right != (n - 1, n - 2, *range(n - 2)):
                raise InputError(
                    f"{self.option}: the convolution at {equation.location} is not channels-last with an HWIO kernel, "
                    "as Flax's are"
                )
            if any(d != 1 for d in equation.params["lhs_dilation"]):
                raise InputError(f"{self.option}: the transposed convolution at {equation.location} is not supported")
        if equation.name == "reshape":
            before, after = self._shape(data[0]), self._shape(equation.outputs[0])
            if len(before) == 2 < len(after):
                raise InputError(
                    f"{self.option}: the vector that becomes a feature map at {equation.location} would be "
                    "channel-first in PyTorch; this is not supported"
                )

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.structs[value].shape
