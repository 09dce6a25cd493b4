"""R-CONV (Eltaras et al., arXiv 2406.04227): the recursion on gradient constraints alone.

    d/dtheta <dz_i, f_i(theta, x_i)> = g_i,    dz_i = act_i'(z_i) * dx_{i+1}

act_i'(z_i) is read off x_{i+1}, so that no activation need be inverted. Only the first layer, where the image has far
more unknowns than the gradient has rows, is solved by its forward constraints f(theta, x) = z instead, if its
activation can be inverted everywhere (the authors' own choice; with a ReLU there, by its gradient as well).
"""

import dataclasses

import jax.numpy as jnp

from leakjax.attacks.layerwise.recursion import recurse
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.models.activations import Activation
from leakjax.models.reader import Arrays
from leakjax.segments.chain import Segment


def rconv(problem: Problem, monitor: Monitor) -> list[Outcome]:
    """As `rgap`, each segment's input from one block of its system: the gradient's, or the first one's forward."""
    first = problem.segments[0]
    invertible = _invertible(first.activation, problem.variables)

    def blocks(segment: Segment) -> tuple[str, ...]:
        return ("forward",) if segment is first and invertible else ("gradient",)

    return recurse(dataclasses.replace(problem, blocks=blocks), monitor, pulling=False)


def _invertible(activation: Activation, variables: Arrays) -> bool:
    """Whether every output at a sample of [-3, 3] determines its input."""
    z = jnp.linspace(-3.0, 3.0, 101)
    return bool(jnp.all(activation.preimage(variables, activation.function(variables, z)).known))
