"""Captures whose modules of one kind and shape stand in another order than the model uses them.

PyTorch lists modules as they are defined. Of layers that look alike only the gradient tells which is which: solved from
the last layer to the first, the equations of a layer with another's weights contradict each other, so the right order
is the one that is consistent from the last layer down the farthest.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from leakjax.client.observation import Observation
from leakjax.reconstruction import Reconstruction

MOST_ORDERS = 24
_ALL = 4
CONSISTENT = 1e-3
"""Relative residual up to which a layer's equations hold: rounding leaves less, another layer's weights leave more."""

_DOUBT = "{layers} have one shape: the PyTorch modules may be defined in another order than they are used"
_FOUND = (
    "the PyTorch modules are defined in another order than they are used: {moves}, without which the gradient "
    "contradicts the weights"
)


def doubt(interchangeable: Sequence[Sequence[str]]) -> str:
    """The layers that could be exchanged, in words."""
    groups = [", ".join(group[:6]) + (", .." if len(group) > 6 else "") for group in interchangeable[:4]]
    return _DOUBT.format(layers="; ".join(groups))


def reorderings(observation: Observation) -> Iterator[tuple[dict[str, str], Observation]]:
    """Other orders of the interchangeable layers, at most 23, as {layer: whose arrays it takes}; few moves first."""
    one_by_one = [moved for group in observation.interchangeable for moved in _moves(group)]
    few = [[{}, *_moves(group)] for group in observation.interchangeable if len(group) <= _ALL]
    together = [{k: v for moved in chosen for k, v in moved.items()} for chosen in _first(itertools.product(*few))]
    found = [*one_by_one, *(moved for moved in together if moved and moved not in one_by_one)]
    for moved in sorted(found, key=len)[: MOST_ORDERS - 1]:
        yield moved, _moved(observation, moved)


def _moves(group: Sequence[str]) -> list[dict[str, str]]:
    """All other orders of a few layers; of many those that exchange two, neighbors first."""
    if len(group) <= _ALL:
        orders = itertools.permutations(group)
        return [moved for order in orders if (moved := {a: b for a, b in zip(group, order, strict=True) if a != b})]
    pairs = sorted(itertools.combinations(range(len(group)), 2), key=lambda pair: pair[1] - pair[0])
    return [{group[a]: group[b], group[b]: group[a]} for a, b in pairs]


def _first(orders: Iterator[Any]) -> Iterator[Any]:
    return itertools.islice(orders, 10 * MOST_ORDERS)


def consistent_layers(result: Reconstruction) -> int:
    """How many layers, counted from the last one, have equations that hold together."""
    layers = list(reversed(result.layers[0]))
    return sum(1 for _ in itertools.takewhile(lambda info: info.residual <= CONSISTENT, layers))


def remark_of(moved: Mapping[str, str]) -> str:
    """What was exchanged, in words."""
    return _FOUND.format(moves=", ".join(f"{layer} has the weights read for {other}" for layer, other in moved.items()))


def first_victim(observation: Observation) -> Observation:
    """The observation of one gradient, as it is read."""
    gradients = {path: g[:1] for path, g in observation.gradients.items()}
    return dataclasses.replace(observation, gradients=gradients, interchangeable=())


def _moved(observation: Observation, moved: Mapping[str, str]) -> Observation:
    model = observation.model
    params, buffers = _renamed(model.params, moved), _renamed(model.buffers, moved)
    gradients = _renamed(observation.gradients, moved)
    model = model.with_arrays(params, buffers)
    return dataclasses.replace(observation, model=model, gradients=gradients, interchangeable=())


def _renamed(arrays: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    return {path: arrays[_source(path, moved)] for path in arrays}


def _source(path: str, moved: Mapping[str, str]) -> str:
    """The path whose array stands at `path`: linen's batch statistics have a prefix of their own."""
    prefix = "batch_stats/" if path.startswith("batch_stats/") else ""
    module, slash, leaf = path.removeprefix(prefix).rpartition("/")
    return f"{prefix}{moved.get(module, module)}{slash}{leaf}"
