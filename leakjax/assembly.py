"""From an attack's outcomes to a `Reconstruction`: the certificates, and what a defense leaves of them."""

import time
from typing import Any

import numpy as np

from leakjax.attacks.adaptive import certifiable
from leakjax.attacks.certificates.certificate import agreed, certify, certify_together
from leakjax.attacks.certificates.multiples import with_doubt
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.client.defenses import CUSTOM, Server, build_defense
from leakjax.client.observation import Observation
from leakjax.preparation import Asked
from leakjax.reconstruction import Certificate, Reconstruction


def assemble(
    observation: Observation,
    problem: Problem,
    outcomes: list[Outcome],
    asked: Asked,
    monitor: Monitor,
    start: float,
) -> Reconstruction:
    """The images with their certificates. `start`: when the call began, by `time.perf_counter`."""
    shape = tuple(observation.input_shape)
    unknowns = int(np.prod(shape))
    images, labels, determined, residuals = [], [], [], []
    middle = 0.5 * (problem.limits[0] + problem.limits[1])
    certificates = [certify(problem, outcome, unknowns) for outcome in outcomes]
    certificates = with_doubt(problem, certify_together(certificates, outcomes, problem.examples))
    if observation.defense is not None and not _reckoned_with(problem, observation.defense):
        heard = problem.defense is not None
        kept = [c.status == "approximate" or (heard and o.reason) for c, o in zip(certificates, outcomes, strict=True)]
        certificates = [c if keep else _defended(c) for c, keep in zip(certificates, kept, strict=True)]
    for outcome, certificate in zip(outcomes, certificates, strict=True):
        best = outcome.candidates[0] if outcome.candidates else None
        images.append(np.full(shape, middle) if best is None else best.image)
        labels.append(-1 if best is None else best.label)
        residuals.append(np.inf if best is None else best.gradient_residual)
        shares = None if certificate.status == "failed" else agreed(outcome, problem.gap)
        determined.append(np.zeros(shape) if shares is None else shares)
    return Reconstruction(
        attack=asked.attack,
        dtype=asked.dtype,
        images=np.stack(images).astype(asked.dtype),
        labels=np.asarray(labels),
        label_source="recovered" if asked.labels is None else "given",
        determined=np.stack(determined).astype(float),
        gradient_residual=np.asarray(residuals),
        certificates=tuple(certificates),
        layers=tuple(outcome.layers for outcome in outcomes),
        candidates=tuple(outcome.candidates for outcome in outcomes),
        seconds={
            "trace": monitor.trace,
            "compile": monitor.compile,
            "solve": monitor.solve,
            "total": time.perf_counter() - start,
        },
        gradient_scale=np.asarray([outcome.scale for outcome in outcomes]),
        targets=tuple(
            None if asked.labels is None and c.status == "failed" else _target(o)
            for c, o in zip(certificates, outcomes, strict=True)
        ),
    )


def _target(outcome: Outcome) -> Any:
    """What the loss compares the outputs with, where it is no class."""
    best = outcome.candidates[0].target if outcome.candidates else None
    return best if outcome.target is None else outcome.target


def _reckoned_with(problem: Problem, defense: str) -> bool:
    """Whether what the defense did to the gradient is in the attack's own equations, up to rounding: told of it, and no
    noise; or a factor, as clipping of the norm is, that the head shows."""
    if problem.defense is None:
        server = Server() if defense == CUSTOM else build_defense(defense).server
        return server.rescales and not server.lossy and problem.local_steps == 1
    return certifiable(problem)


def _defended(certificate: Certificate) -> Certificate:
    words = "a defense changed the gradient, and the attack was not told or cannot undo it: try attack='match'"
    return Certificate.failure(certificate.unknowns, certificate.condition, "defense", words)
