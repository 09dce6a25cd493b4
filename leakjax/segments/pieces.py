"""Cutting a traced model where all data flows through one value, and naming what lies between two cuts.

A piece is affine, elementwise, or else nonlinear; adjacent affine pieces are one affine map, adjacent elementwise ones
one activation, and every nonlinear piece stands for itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from leakjax.errors import UnreadableModelError
from leakjax.segments.tracing import jaxprs, kinds
from leakjax.segments.tracing.derivatives import equation_flaw
from leakjax.segments.tracing.statistics import acts_by_entry, is_normalization

Kind = Literal["affine", "elementwise", "nonlinear", "normalization"]


@dataclasses.dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    kind: Kind
    culprit: str | None = None


class Group(NamedTuple):
    """Values (in, out) of a map and of the activation after it; in = out where there is none.

    `nonlinearity`: the primitive, and its line, that makes the map nonlinear; None where it is affine.
    `normalization`: whether it is affine entry by entry once the sums inside it are given.
    """

    map: tuple[int, int]
    activation: tuple[int, int]
    nonlinearity: str | None
    normalization: bool = False


def read_groups(graph: jaxprs.Graph, *, known_keys: bool = False) -> list[Group]:
    """The graph as maps with activations, first to last.

    Raises `UnreadableModelError` naming the primitive and the user's line where data meets random numbers of keys
    that are not known, or where a
    nonlinear piece has no derivative that could be trusted.
    """
    live = graph.dependents([graph.input])
    if not known_keys:
        _refuse_random(graph, live)
    return _merge(graph, [_classify(graph, live, *piece) for piece in cut_pieces(graph, live)])


def cut_pieces(graph: jaxprs.Graph, live: set[int]) -> list[tuple[int, int, list[jaxprs.Equation]]]:
    """Pieces (value in, value out, equations) between the values that all data flows through."""
    equations = [e for e in graph.needed(graph.output, []) if any(o in live for o in e.outputs)]
    last_use = {graph.output: len(equations)}
    for k, equation in enumerate(equations):
        for v in equation.inputs:
            if isinstance(v, int) and v in live:
                last_use[v] = max(last_use.get(v, -1), k)
    pieces, start, current, alive = [], graph.input, [], {graph.input}
    for k, equation in enumerate(equations):
        current.append(equation)
        alive |= {o for o in equation.outputs if last_use.get(o, -1) > k}
        alive = {v for v in alive if last_use[v] > k}
        if len(alive) == 1:
            (end,) = alive
            if end != start:
                pieces.append((start, end, current))
                start, current = end, []
    return pieces


def _classify(
    graph: jaxprs.Graph, live: set[int], start: int, end: int, equations: Sequence[jaxprs.Equation]
) -> _Piece:
    nonlinear, odd = _mixing(graph, live, equations)
    if not nonlinear:
        return _Piece(start, end, "affine")
    if not odd:
        return _Piece(start, end, "elementwise")
    for equation in nonlinear:
        flaw = equation_flaw(equation, graph.structs, live)
        if flaw is not None:
            raise not_invertible(f"`{equation.name}` at {equation.location}", flaw)
    culprit = next((e for e in nonlinear if e in odd), nonlinear[0])
    kind: Kind = "normalization" if is_normalization(graph, start, end) else "nonlinear"
    return _Piece(start, end, kind, f"`{culprit.name}` at {culprit.location}")


def _mixing(
    graph: jaxprs.Graph, live: set[int], equations: Sequence[jaxprs.Equation]
) -> tuple[list[jaxprs.Equation], list[jaxprs.Equation]]:
    """The equations that are not affine in the data, and those that do not act entry by entry."""
    nonlinear = [e for e in equations if not kinds.is_linear(e, graph.structs, live)]
    return nonlinear, [e for e in equations if not kinds.is_elementwise(e, graph.structs, live)] if nonlinear else []


def is_mixing(graph: jaxprs.Graph, live: set[int], equations: Sequence[jaxprs.Equation]) -> bool:
    """Whether a piece is neither affine nor elementwise."""
    return all(_mixing(graph, live, equations))


def not_invertible(where: str, flaw: str) -> UnreadableModelError:
    """The error for a part of the model that no linear solve and no derivative can invert."""
    return UnreadableModelError(
        f"cannot read {where}: this part of the model is neither affine nor elementwise, and it cannot be inverted by "
        f"its derivatives ({flaw}); attack='match' (--attack match) takes a model as one map"
    )


def meeting_random(graph: jaxprs.Graph, live: set[int]) -> jaxprs.Equation | None:
    """The first equation in which random numbers meet the data, as in dropout."""
    random = graph.random_values()
    for equation in graph.equations:
        inputs = [v for v in equation.inputs if isinstance(v, int)]
        if any(v in live for v in inputs) and any(v in random and v not in live for v in inputs):
            return equation
    return None


def _refuse_random(graph: jaxprs.Graph, live: set[int]) -> None:
    equation = meeting_random(graph, live)
    if equation is not None:
        raise UnreadableModelError(
            f"random numbers meet the data in `{equation.name}` at {equation.location} (dropout in train mode?); "
            'call model.eval() or pass call={"deterministic": True}: a server does not know the client\'s mask; where '
            'it does, pass its seed, rngs={"dropout": 0}'
        )


def _merge(graph: jaxprs.Graph, pieces: Sequence[_Piece]) -> list[Group]:
    groups: list[Group] = []
    open_affine = open_normalization = False
    for piece in pieces:
        if open_normalization and piece.kind == "affine" and acts_by_entry(graph, piece.start, piece.end):
            groups[-1] = groups[-1]._replace(map=(groups[-1].map[0], piece.end), activation=(piece.end, piece.end))
            continue
        open_normalization = piece.kind == "normalization"
        if piece.kind == "elementwise":
            last = groups.pop() if groups else Group((piece.start, piece.start), (piece.start, piece.start), None)
            groups.append(last._replace(activation=(last.activation[0], piece.end)))
        elif piece.kind == "affine" and open_affine:
            groups[-1] = Group((groups[-1].map[0], piece.end), (piece.end, piece.end), None)
        else:
            ends = (piece.start, piece.end), (piece.end, piece.end)
            groups.append(Group(*ends, piece.culprit, normalization=open_normalization))
        open_affine = piece.kind == "affine"
    return groups
