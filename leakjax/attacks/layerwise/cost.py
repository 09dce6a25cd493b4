"""What the solve of each layer costs, said before it is done: operations by shapes, memory by the compiled program."""

import math
from typing import Any

import jax

from leakjax.attacks.layerwise.iterative import max_steps
from leakjax.attacks.layerwise.layer_step import Step, arguments, compile_steps, one_step
from leakjax.attacks.layerwise.sweep import compile_sweep, swept_together
from leakjax.attacks.layerwise.system import slope_floor
from leakjax.attacks.problem import Monitor, Problem
from leakjax.reconstruction import LayerPlan, Plan
from leakjax.segments.chain import Segment
from leakjax.segments.tracing.counting import Count, count_operations
from leakjax.solvers.kronecker import MOST_STEPS


def plan_of(problem: Problem, monitor: Monitor, size: int) -> Plan:
    """The plan for chunks of `size` clients: the programs of linear segments are compiled, none is run."""
    segments = problem.segments[:-1]
    linear = [s for s in segments if s.linear]
    steps = dict(zip(linear, compile_steps(problem, linear, size, monitor, planned=True), strict=True))
    layers = tuple(_layer(problem, segment, steps.get(segment), size) for segment in segments)
    programs = [step.program(directly=step.route is not None) for step in steps.values()]
    together = swept_together(problem, segments, size)
    if together:
        programs.append(compile_sweep(problem, monitor, [steps[s] for s in together], size)[0])
    return Plan(problem.victims, size, layers, max(map(_bytes, programs), default=0))


def _layer(problem: Problem, segment: Segment, step: Step | None, size: int) -> LayerPlan:
    equations = math.prod(segment.output.shape) + sum(problem.gradients[p][0].size for p in segment.paths)
    known = {"name": segment.name, "unknowns": math.prod(segment.input.shape), "equations": equations}
    if step is None:
        return LayerPlan(**known, solver="pull_back", operations=None, step=None, most_steps=None, bytes=None)
    count, directly = step_count(problem, step), step.route is not None
    most = 2 * MOST_STEPS if directly else max_steps(segment)
    return LayerPlan(
        **known,
        solver="direct" if directly else "lsmr",
        operations=count.fixed,
        step=count.step,
        most_steps=most if count.step else 0,
        bytes=_bytes(step.program(directly=directly)) * max(len(problem.devices), 1) // size,
    )


def _bytes(program: Any) -> int:
    """On each of the devices of a program."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def step_count(problem: Problem, step: Step) -> Count:
    """Operations of a layer's solve for one client, the probe's included: before its iterations, and by the step that
    LSMR reports."""
    directly = step.route is not None
    kind, factor = (step.route.kind, step.route.factor) if step.route is not None else (None, False)
    settings = (str(problem.dtype), slope_floor(problem), problem.blocks(step.segment))
    function = one_step(step.segment, kind, *settings, directly=directly)
    weights, _, *shapes = arguments(problem, step.segment.paths, step.segment.output.shape, 1, ())
    single = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), shapes)
    count = count_operations(function, weights, factor, *single)
    if not directly:  # the probe is a run of its own, of about as many steps
        return Count(2 * count.fixed, 2 * count.step)
    together = 1 if jax.default_backend() == "cpu" else 2  # system and probe, whose steps are one step there
    return Count(count.fixed, 1.5 / together * count.step)  # the probe takes half the steps
