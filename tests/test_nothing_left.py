"""What one call computes for the next, and what it must not keep: programs stay, models and gradients go."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from test_property import psnr

from leakjax import invert, observe
from leakjax.attacks.problem import Problem


def network(rng):
    shapes = {"k0": (3, 3, 1, 3), "k1": (3, 3, 3, 2), "w": (32, 4), "c": (4,)}
    return _apply, {p: rng.normal(size=s) / np.sqrt(np.prod(s[:-1]) or 1) for p, s in shapes.items()}


def _apply(params, x):
    layout = ("NHWC", "HWIO", "NHWC")
    for name in ("k0", "k1"):
        x = jax.lax.conv_general_dilated(x, params[name], (1, 1), "VALID", dimension_numbers=layout)
        x = jnp.where(x > 0, x, 0.2 * x)
    return x.reshape(len(x), -1) @ params["w"] + params["c"][None]


def test_a_second_observation_of_an_architecture_compiles_nothing(rng):
    batch = rng.uniform(size=(1, 8, 8, 1)), np.array([1])
    compiled, listening = [], []

    def listen(event, duration_secs, **_):
        if listening and "backend_compile" in event:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    listening.append(True)
    observe(network(rng), batch)
    first = len(compiled)
    assert first
    observe(network(rng), batch)
    listening.clear()
    assert len(compiled) == first


def test_no_problem_and_no_gradient_outlives_its_inversion(rng, monkeypatch):
    alive = weakref.WeakSet()
    made = Problem.__init__

    def watched(self, *given, **named):
        made(self, *given, **named)
        alive.add(self)

    monkeypatch.setattr(Problem, "__init__", watched)
    images = rng.uniform(size=(2, 8, 8, 1))
    observation = observe(network(rng), (images, np.array([1, 2])))
    gradients = {p: np.array(g) for p, g in observation.gradients.items()}
    held = [weakref.ref(g) for g in gradients.values()]
    answer = invert(dataclasses.replace(observation, gradients=gradients), attack="copa")
    assert min(psnr(a, b) for a, b in zip(answer.images, images, strict=True)) > 100
    del gradients
    gc.collect()
    assert not list(alive)
    assert not [ref for ref in held if ref() is not None]
