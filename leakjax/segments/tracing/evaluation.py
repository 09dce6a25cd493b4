"""The evaluation of any part of a traced function, on concrete or traced values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from leakjax.segments.tracing.jaxprs import Constant, Equation


def evaluate(
    equations: Iterable[Equation],
    env: Mapping[int, Any],
    target: int,
    rules: Mapping[str, Callable[..., Any]],
    replaced: Mapping[int, Callable[[Mapping[int, Any]], Any]] | None = None,
) -> Any:
    """`evaluate_all`, the value `target` alone."""
    return evaluate_all(equations, env, rules, replaced)[target]


def evaluate_all(
    equations: Iterable[Equation],
    env: Mapping[int, Any],
    rules: Mapping[str, Callable[..., Any]],
    replaced: Mapping[int, Callable[[Mapping[int, Any]], Any]] | None = None,
) -> dict[int, Any]:
    """Evaluate `equations` from the values in `env`: all values.

    The outputs in `replaced` are computed by the function given there from all values so far. A primitive whose name
    is in `rules` is evaluated as `rule(*operands, **params)`, its one result; every other
    primitive is bound as it stands.
    """
    values = dict(env)
    for equation in equations:
        if replaced and equation.outputs[0] in replaced:
            values[equation.outputs[0]] = replaced[equation.outputs[0]](values)
            continue
        operands = [v.value if isinstance(v, Constant) else values[v] for v in equation.inputs]
        rule = rules.get(equation.name)
        results = [rule(*operands, **equation.params)] if rule else bind(equation, operands)
        values.update(zip(equation.outputs, results, strict=True))
    return values


def bind(equation: Equation, operands: Sequence[Any]) -> Sequence[Any]:
    """The outputs of one equation on concrete or traced operands, custom derivative and all."""
    if equation.custom is not None:
        return equation.custom(*(v for v, given in zip(operands, equation.inputs, strict=True) if not _literal(given)))
    result = equation.primitive.bind(*operands, **equation.params)
    return result if equation.primitive.multiple_results else [result]


def _literal(operand: int | Constant) -> bool:
    return isinstance(operand, Constant) and operand.literal
