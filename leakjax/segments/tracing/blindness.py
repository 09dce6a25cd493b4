"""What a derivative cannot see of a function: paths from the data on which it is 0 while the function is not constant.

A function u(x) is traced into equations and every value that depends on x is sorted: it is *seen* where the derivative
passes, and *hidden* where x reaches it through an operation alone whose derivative is 0 everywhere (`round`, `sign`, a
comparison, a cast to integers, an index). A hidden value that only chooses between seen ones (ReLU's mask, the place of
a maximum) is a kink, not a blind spot: u is then a derivative's integral, piece by piece. A hidden value that reaches
the output in any other way makes the derivative an answer to another question. `stop_gradient` hides nothing: it is
an instruction to whoever differentiates u, which `seen_through` undoes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.segments.tracing.evaluation import bind
from leakjax.segments.tracing.jaxprs import (
    Constant,
    Equation,
    Flat,
    all_equations,
    as_function,
    body_of,
    flatten,
    operands_of,
)
from leakjax.segments.tracing.kinds import tangent_depends
from leakjax.segments.tracing.primitives import CHOOSERS, CUSTOM_DERIVATIVES, MASKS, PASSING


class Spot(NamedTuple):
    """An operation that no derivative sees through: its primitive, and the user's "file:line"."""

    name: str
    location: str

    def __str__(self) -> str:
        return f"`{self.name}`" + ("" if self.location.startswith("an unknown") else f" ({self.location})")


class _State(NamedTuple):
    """Whether a derivative by the data reaches a value, and the spots behind which it holds more of them."""

    seen: bool = False
    hidden: frozenset[Spot] = frozenset()

    @property
    def live(self) -> bool:
        return self.seen or bool(self.hidden)


_NONE = _State()


def blind_spots(function: Callable[[Any, Any], Any], fixed: Any, x: Any) -> tuple[Spot, ...]:
    """The operations through which `function(fixed, x)` depends on x unseen by its derivative; () where there are none.

    Arguments: `fixed`, any pytree; `x`, an array; arrays or structs alike. Nothing is computed.
    """
    flat = flatten(function, (fixed, x))
    states = _propagate(flat, [_NONE] * (len(flat.inputs) - 1) + [_data(x)])
    return tuple(sorted(frozenset().union(*(s.hidden for s in states))))


def depends(function: Callable[[Any, Any], Any], fixed: Any, x: Any) -> bool:
    """Whether an output of `function(fixed, x)` depends on x at all, seen or not."""
    flat = flatten(function, (fixed, x))
    return any(s.live for s in _propagate(flat, [_NONE] * (len(flat.inputs) - 1) + [_data(x)]))


def seen_through(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of the same values, which a derivative follows through `stop_gradient`.

    A client's update is one function of its images, whether or not the training behind it stops a gradient somewhere:
    its derivative by the images is that of the values. So are custom derivatives replaced where they are 0. The
    maximum that a softmax subtracts before it exponentiates is left out: the values do not depend on it.
    """

    def run(*arguments: Any) -> Any:
        shape = jax.eval_shape(function, *arguments)
        flat = flatten(function, arguments)
        values = _evaluate(flat, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), values)

    return run


def _data(x: Any) -> _State:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return _State(seen=True)
    return _State(hidden=frozenset([Spot(f"{x.dtype} input", "the data are integers")]))


def _propagate(flat: Flat, given: Sequence[_State]) -> list[_State]:
    states = dict(zip(flat.inputs, given, strict=True))

    def of(v: int | Constant) -> _State:
        return states.get(v, _NONE) if isinstance(v, int) else _NONE

    for equation in flat.needed():
        before = [of(v) for v in equation.inputs]
        if any(s.live for s in before):
            states.update(zip(equation.outputs, _through(equation, before, flat.structs), strict=True))
    return [of(v) for v in flat.outputs]


def _through(equation: Equation, before: Sequence[_State], structs: Mapping[int, Any]) -> list[_State]:
    name, count = equation.name, len(equation.outputs)
    nested = _NESTED.get(name)
    if nested is not None:
        return nested(equation, before)
    if name in CUSTOM_DERIVATIVES:
        after = _body(body_of(equation.params), before)
        return after if name != "custom_jvp_call" or any(s.hidden for s in after) else [_union(before)] * count
    if name in CHOOSERS:
        where = CHOOSERS[name]
        chosen = [s for k, s in enumerate(before) if k not in where(len(before))]
        if any(s.seen for s in chosen):
            return [_union(chosen)] * count
        return [_unseen(equation, before)] * count
    if name in ("mul", "div") and any(s.seen and not s.hidden for s in before):
        before = [s if s.seen or any(spot.name not in MASKS for spot in s.hidden) else _NONE for s in before]
    union = _union(before)
    if not union.seen or name == "stop_gradient" or name in PASSING:
        return [union if _floating(structs, o) else _unseen(equation, before) for o in equation.outputs]
    live = {v for v, s in zip(equation.inputs, before, strict=True) if isinstance(v, int) and s.seen}
    floating = all(_floating(structs, v) for v in live)
    passes = tangent_depends(equation, structs, live)[1] if floating else [False] * count
    passes = [*passes, *[passes[0]] * (count - len(passes))]
    pairs = zip(equation.outputs, passes, strict=False)
    return [union if passed and _floating(structs, o) else _unseen(equation, before) for o, passed in pairs]


def _union(states: Sequence[_State]) -> _State:
    return _State(any(s.seen for s in states), frozenset().union(*(s.hidden for s in states)))


def _unseen(equation: Equation, before: Sequence[_State]) -> _State:
    """The state behind an equation without a derivative."""
    union = _union(before)
    own = frozenset([Spot(_words(equation), equation.location)]) if union.seen else frozenset()
    return _State(hidden=union.hidden | own)


def _words(equation: Equation) -> str:
    kind = equation.params.get("new_dtype")
    return equation.name if kind is None else f"cast to {np.dtype(kind).name}"


def _floating(structs: Mapping[int, Any], v: Any) -> bool:
    return jnp.issubdtype(structs[v].dtype, jnp.floating)


def _body(jaxpr: Any, before: Sequence[_State]) -> list[_State]:
    return _propagate(flatten(as_function(jaxpr), operands_of(jaxpr)), before)


def _scan(equation: Equation, before: Sequence[_State]) -> list[_State]:
    p = equation.params
    consts, carries = p["num_consts"], p["num_carry"]
    return _loop(p["jaxpr"], before, consts, carries)


def _while(equation: Equation, before: Sequence[_State]) -> list[_State]:
    p = equation.params
    return _loop(p["body_jaxpr"], before[p["cond_nconsts"] :], p["body_nconsts"], len(equation.outputs))


def _loop(jaxpr: Any, before: Sequence[_State], consts: int, carries: int) -> list[_State]:
    now, flat = list(before), flatten(as_function(jaxpr), operands_of(jaxpr))
    while True:
        after = _propagate(flat, now)
        carried = [_union(pair) for pair in zip(now[consts : consts + carries], after[:carries], strict=True)]
        if carried == now[consts : consts + carries]:
            return [*carried, *after[carries:]]
        now[consts : consts + carries] = carried


def _cond(equation: Equation, before: Sequence[_State]) -> list[_State]:
    found = [_body(branch, before[1:]) for branch in equation.params["branches"]]
    after = [_union(states) for states in zip(*found, strict=True)]
    return [s if s.seen else _State(hidden=s.hidden | before[0].hidden) for s in after]


_NESTED: Mapping[str, Callable[[Equation, Sequence[_State]], list[_State]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _evaluate(flat: Flat, given: Sequence[Any]) -> list[Any]:
    values = dict(zip(flat.inputs, given, strict=True))
    makers = {o: e for e in flat.equations for o in e.outputs}
    for equation in flat.needed():
        operands = [v.value if isinstance(v, Constant) else values[v] for v in equation.inputs]
        values.update(zip(equation.outputs, _passed(equation, operands, makers), strict=True))
    return [v.value if isinstance(v, Constant) else values[v] for v in flat.outputs]


def _passed(equation: Equation, operands: Sequence[Any], makers: Mapping[int, Equation]) -> Sequence[Any]:
    """The outputs of one equation, `stop_gradient` as the identity that it is."""
    if equation.name == "stop_gradient" and not _is_shift(equation, makers):
        return operands
    body = body_of(equation.params)
    if equation.name in CUSTOM_DERIVATIVES:
        keep = equation.name == "custom_jvp_call" and not _hides(equation)  # a custom_vjp has no tangent
        return bind(equation, operands) if keep else _inside(body)(*operands)
    if equation.name in _NESTED and any(e.primitive.name == "stop_gradient" for e in all_equations(body)):
        params = {k: _rewritten(v) for k, v in equation.params.items()}
        result = equation.primitive.bind(*operands, **params)
        return result if equation.primitive.multiple_results else [result]
    return bind(equation, operands)


def _inside(body: Any) -> Callable[..., Any]:
    return seen_through(lambda *operands: tuple(as_function(body)(*operands)))


def _hides(equation: Equation) -> bool:
    """Whether the custom derivative of an equation is 0 by an operand on which its values depend."""
    body = body_of(equation.params)
    structs = operands_of(body)
    if any(e.primitive.name == "stop_gradient" for e in all_equations(body)):
        return True
    for k, v in enumerate(structs):
        if not jnp.issubdtype(v.dtype, jnp.floating):
            continue
        states = _body(body, [_State(seen=i == k) for i in range(len(structs))])
        if not any(s.live for s in states):
            continue
        ids = {i: s for i, s in enumerate(structs)}
        outs = tuple(len(structs) + i for i in range(len(equation.outputs)))
        alone = Equation(
            primitive=equation.primitive,
            params=equation.params,
            inputs=tuple(ids),
            outputs=outs,
            location="",
            custom=_only_arrays(equation),
        )
        if not any(tangent_depends(alone, ids, {k})[1]):
            return True
    return False


def _only_arrays(equation: Equation) -> Callable[..., Sequence[Any]]:
    """The equation as a function of all its operands, literals among them."""
    literal = [isinstance(v, Constant) and v.literal for v in equation.inputs]
    assert equation.custom is not None
    custom = equation.custom
    return lambda *operands: custom(*(o for o, fixed in zip(operands, literal, strict=True) if not fixed))


def _rewritten(value: Any) -> Any:
    """A jaxpr among an equation's parameters, followed through `stop_gradient`; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_rewritten, value))
    if body_of({"": value}) is None:
        return value
    return jax.make_jaxpr(_inside(value))(*operands_of(value))


_ON_THE_WAY = frozenset({"select_n", "reshape", "broadcast_in_dim", "convert_element_type", "max", "squeeze"})


def _is_shift(equation: Equation, makers: Mapping[int, Equation]) -> bool:
    """Whether a `stop_gradient` holds the maximum that a softmax or a logarithm of exponentials subtracts."""
    (v,) = equation.inputs
    while isinstance(v, int) and v in makers:
        maker = makers[v]
        if maker.name == "reduce_max":
            return True
        if maker.name not in _ON_THE_WAY:
            return False
        v = next((u for u in reversed(maker.inputs) if isinstance(u, int)), None)
    return False
