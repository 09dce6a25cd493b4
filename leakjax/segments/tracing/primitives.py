"""JAX's primitives by name: which only call, act entry by entry, choose between values, or draw random numbers."""

from collections.abc import Callable, Mapping

# Primitives that only call the jaxpr they carry, operand for operand. Any other primitive that carries a jaxpr
# (scan, while, cond, custom derivatives ...) stays one opaque equation and is never looked through.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"})
CUSTOM_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
RANDOM = ("random_", "threefry", "rng_")
CHOICES = frozenset({"abs", "argmax", "clamp", "max", "min", "reduce_max", "reduce_window_max", "select_n", "sort"})
ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "pow",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)

REARRANGING = frozenset(
    ["broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "reshape", "squeeze", "transpose"]
)
"""Primitives that move entries and change none, where the output has as many as the input."""
PASSING = frozenset(
    [
        "add",
        "add_any",
        "broadcast_in_dim",
        "concatenate",
        "conv_general_dilated",
        "copy",
        "cos",
        "dot_general",
        "dynamic_slice",
        "erf",
        "exp",
        "exp2",
        "expm1",
        "integer_pow",
        "log",
        "log1p",
        "logistic",
        "max",
        "min",
        "neg",
        "pad",
        "pow",
        "reduce_max",
        "reduce_sum",
        "reduce_window_sum",
        "reshape",
        "rev",
        "rsqrt",
        "sin",
        "slice",
        "sqrt",
        "square",
        "squeeze",
        "sub",
        "tanh",
        "transpose",
    ]
)
"""Primitives of floating point whose derivative is known not to vanish: nothing is asked of it."""
MASKS = frozenset(["gt", "lt", "ge", "le", "eq", "ne", "sign", "is_finite", "and", "or", "not", "xor"])
"""What tells on which side of a kink a number is, and nothing more."""


def _first(count: int) -> range:
    return range(1)


def _after_first(count: int) -> range:
    return range(1, count)


def _second(count: int) -> range:
    return range(1, 2)


def _after_second(count: int) -> range:
    return range(2, count)


CHOOSERS: Mapping[str, Callable[[int], range]] = {
    "select_n": _first,
    "gather": _after_first,
    "dynamic_slice": _after_first,
    "dynamic_update_slice": _after_second,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter_add"), _second),
}
"""Primitives that choose among, or place, entries of their other operands: which operands, of so many, only choose."""
