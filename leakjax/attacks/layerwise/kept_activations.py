"""Layers whose activation no output inverts (abs, square, sin): the activation is kept inside the layer's own map.

With act unknown backward, x_{i+1} = act(z_i) says nothing of any entry of z_i, and neither block of the linear system
has a row left. The map x -> act(f(theta, x)) has all of them: its output is x_{i+1} itself, its gradient block is
d/dtheta <dL/dx_{i+1}, act(f(theta, x))>. It is nonlinear, and solved as such.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leakjax.attacks.problem import Problem
from leakjax.models.activations import ACTIVATIONS, Activation
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Chain, Segment
from leakjax.segments.tracing.smoothing import gaussian_mean

_SAMPLE = np.linspace(-3.0, 3.0, 61)
KNOWN = 0.1  # share of outputs of a sample of inputs that must be invertible for the linear system to be of use


def keep_activations(problem: Problem) -> Problem:
    """The problem with every such activation moved into the map of its segment; the problem itself where none is."""
    kept = tuple(k for k, s in enumerate(problem.segments[:-1]) if not _invertible(s.activation, problem))
    if not kept:
        return problem
    assert problem.chain is not None
    return dataclasses.replace(problem, chain=_with_kept(problem.chain, kept))


def _invertible(activation: Activation, problem: Problem) -> bool:
    if activation.kind is not None:
        return True
    z = to_device(_SAMPLE, problem.dtype)
    known = activation.preimage(problem.variables, activation.function(problem.variables, z)).known
    return float(jnp.mean(known)) >= KNOWN


@keep(32)
def _with_kept(chain: Chain, kept: tuple[int, ...]) -> Chain:
    segments = tuple(_kept(s) if k in kept else s for k, s in enumerate(chain.segments))
    return dataclasses.replace(chain, segments=segments)


def _kept(segment: Segment) -> Segment:
    inner, activation, dtype = segment.function, segment.activation, segment.output.dtype

    def function(
        variables: Arrays, x: Float[Array, "..."], smoothing: float | Float[Array, ""] | None = None
    ) -> Float[Array, "..."]:
        z = inner(variables, x, smoothing)
        if smoothing is None:
            return activation.function(variables, z)
        return gaussian_mean(functools.partial(activation.function, variables), z, smoothing)[0]

    identity = ACTIVATIONS["identity"]
    through = Activation("identity", lambda variables, z: z, identity)
    output = jax.ShapeDtypeStruct(segment.output.shape, dtype)
    words = f"its activation {activation.name} has no inverse"
    statistics = segment.statistics and segment.statistics._replace(normalization=False)  # of what is inside alone
    return dataclasses.replace(
        segment,
        function=function,
        activation=through,
        output=output,
        nonlinearity=words,
        stages=(),
        statistics=statistics,
    )
