"""`plan`: what an inversion costs, before it is done."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from leakjax.arguments import instance
from leakjax.attacks import ATTACKS, DEFAULT_ATTACK
from leakjax.attacks.layerwise.cost import plan_of
from leakjax.attacks.layerwise.recursion import checked_chain
from leakjax.attacks.problem import Monitor
from leakjax.client.observation import Observation
from leakjax.errors import InputError
from leakjax.inversion import invert
from leakjax.preparation import Asked, checked, prepare
from leakjax.reconstruction import Plan
from leakjax.runtime.precision import compute_in


def plan(
    observation: Observation,
    *,
    attack: str = DEFAULT_ATTACK,
    dtype: str = "float64",
    solver: str = "auto",
    chunk: int | None = None,
    devices: Sequence[Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """What `invert` with the same arguments costs, layer by layer: operations, counted from shapes, and memory.

    The programs of the layers are compiled, and the factors of weights that clients share are made. Both are kept for
    `invert`, which joins the layers in one program where it solves several clients at once. Nothing is solved. How many
    steps LSMR takes depends on the condition of a layer, which only a solve shows; a plan says what each step costs.

    Returns a `Plan`. Raises `InputError` as `invert` does for arguments, and models that its recursion cannot go
    through; what gradients alone show (a batch that a head does not separate) is not looked at. Attacks that do not
    solve both blocks of every layer have no plan.
    """
    given = {name: value for name, value in locals().items() if name != "observation"}
    defaults = {name: p.default for name, p in inspect.signature(invert).parameters.items() if name != "observation"}
    instance("observation", observation, Observation, "from observe or read_capture")
    asked = checked(Asked(**{**defaults, **given}), observation)
    layerwise = [name for name, one in ATTACKS.items() if one.layerwise and name != "rconv"]
    if attack not in layerwise:  # rconv's layers have one block each
        raise InputError(f"attack {attack!r} has no plan; a plan counts the layers of {', '.join(layerwise)}")
    if solver == "dense":
        raise InputError("solver 'dense' has no plan: it factorizes whole matrices; use 'auto' or 'lsmr'")
    monitor = Monitor(tell=progress or (lambda stage: None))
    with compute_in(dtype) as floating:
        problem, _ = prepare(observation, asked, floating, monitor)
        problem, size = checked_chain(problem, pulling=attack == "copa")
        monitor.tell("compiling layers")
        return plan_of(problem, monitor, size)
