"""`invert`: from an observation to images, with a certificate."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from leakjax.arguments import instance
from leakjax.assembly import assemble
from leakjax.attacks import ATTACKS, DEFAULT_ATTACK
from leakjax.attacks.certificates.free_targets import with_fitted_pulls, with_targets
from leakjax.attacks.certificates.label_maps import with_open_maps
from leakjax.attacks.certificates.multiples import with_multiples
from leakjax.attacks.certificates.other_images import seek_others
from leakjax.attacks.heads.scales import read_scales, rescaled, unscaled, withheld
from leakjax.attacks.heads.targets import freed
from leakjax.attacks.matching.noisy import with_noise
from leakjax.attacks.problem import Monitor, Outcome, Problem
from leakjax.captures.orders import consistent_layers, doubt, first_victim, remark_of, reorderings
from leakjax.client.defenses import CUSTOM, build_defense
from leakjax.client.observation import Observation
from leakjax.client.silent import silent_victims, with_silent
from leakjax.constraints.priors import DEFAULT_PRIOR
from leakjax.errors import InputError
from leakjax.preparation import Asked, checked, prepare
from leakjax.reconstruction import Reconstruction
from leakjax.runtime.precision import compute_in
from leakjax.solvers.descent import DEFAULT_OPTIMIZER


def invert(
    observation: Observation,
    *,
    attack: str = DEFAULT_ATTACK,
    dtype: str = "float64",
    labels: Any = None,
    solver: str = "auto",
    chunk: int | None = None,
    starts: int = 1,
    prior: str = DEFAULT_PRIOR,
    pull_back: str = "auto",
    optimizer: str | optax.GradientTransformation = DEFAULT_OPTIMIZER,
    steps: int | None = None,
    seed: int = 0,
    devices: Sequence[Any] | None = None,
    adaptive: bool = True,
    gradient_noise: float | None = None,
    gradient_scale: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Reconstruction:
    """Reconstruct the images behind the gradients of an observation.

    Arguments:
    - `observation`: what a server sees, from `observe` or `read_capture`;
    - `attack`: a name of `attacks.ATTACKS`;
    - `dtype`: precision of the solves, "float64" or "float32" (float32 refines iteratively and still loses digits:
      see each layer's residual);
    - `labels`: (V,) integers, or (V * B,) for gradients of B examples, if the labels are known; recovered otherwise;
    - `solver`: "auto" solves layers directly where their structure allows, by LSMR where not, and by the singular
      values of their whole matrix where LSMR met a null space or bad conditioning and the matrix is small; "lsmr" is
      matrix-free, "dense" factorizes every layer's matrix; it gives `match` few, costly steps, for models whose
      gradient says little of an image (global average pooling);
    - `starts`: how many random starts `match` and the matching baselines solve at once, the best by residual kept;
    - `prior`: a name of `constraints.priors.PRIORS`, that chooses among the images that explain the gradient equally
      well ("none" is the one of minimum norm);
    - `pull_back`: what solves pulled-back constraints: an active set behind piecewise-linear activations and
      Levenberg-Marquardt elsewhere ("auto"), "levenberg_marquardt" alone, or first-order descent ("optax");
    - `optimizer`: what "optax", the prior and `hybrid` descend by: a name of `solvers.descent.OPTIMIZERS` or any
      `optax.GradientTransformation`;
    - `steps`: bound on the first-order descent of `hybrid` and the matching baselines (L-BFGS or Adam iterations); None
      for their papers' own;
    - `seed`: of the random starts;
    - `adaptive`: whether `match` uses what the observation says of a defense (see `attacks.adaptive`); else, as the
      layer-wise attacks always do, it takes what was sent for the gradient;
    - `gradient_noise`: standard deviation of normal noise that is known to be in every entry of what was sent; without
      it noise is read off what the best answer leaves of the gradient;
    - `gradient_scale`: the factor c in what was sent, c dL/dtheta (+ lambda theta with weight decay), where it is known
      (1 for none, a learning rate with its sign, the number of examples for sums); without it c is read off the last
      layer, and where that does not show it no multiple of an image is told from another;
    - `progress`: called with a few words at every stage;
    - `chunk`: how many victims are solved at once by `vmap`; less takes less memory. The default is 64 on an
      accelerator; on CPUs it is 1, and every core solves victims of its own;
    - `devices`: local devices over which the victims of every layer's solve are spread, `chunk` on each; the default is
      JAX's default device alone.

    Returns a `Reconstruction`, one image a victim, or B images one after another.
    Raises `InputError` for an unknown attack or prior, an unreadable model, or a layer-wise attack on batches that the
    last layer does not separate, or on updates of several local steps.

    Reference: Zhu & Blaschko (arXiv 2010.07733); Chen & Campbell (arXiv 2111.10178).
    """
    given = {name: value for name, value in locals().items() if name != "observation"}
    start, asked = time.perf_counter(), Asked(**given)
    instance("observation", observation, Observation, "from observe or read_capture")
    asked = checked(asked, observation)
    silent = silent_victims(observation)
    if silent:
        return _of_the_others(observation, silent, given)
    monitor = Monitor(tell=progress or (lambda stage: None))
    with compute_in(dtype) as floating:
        problem, remarks = prepare(observation, asked, floating, monitor)
        monitor.trace += time.perf_counter() - start
        problem, outcomes = _solve(observation, asked, problem, monitor)
        found = assemble(observation, problem, outcomes, asked, monitor, start)
    found = dataclasses.replace(found, remarks=remarks)
    failed = all(c.status == "failed" for c in found.certificates)
    return _in_another_order(observation, found, given) if failed and observation.interchangeable else found


def _solve(observation: Observation, asked: Asked, problem: Problem, monitor: Monitor) -> tuple[Problem, list[Outcome]]:
    """The attack, on the problem without the factors that its head shows; then what noise, symmetries and factors that
    nobody knows make of its answers."""
    before, begun = monitor.trace + monitor.compile, time.perf_counter()
    attack, noise, factor = ATTACKS[asked.attack], asked.gradient_noise, asked.gradient_scale
    scalings = read_scales(problem)
    problem = unscaled(problem, scalings)
    if problem.defense is not None and noise is not None and factor is not None:
        problem = dataclasses.replace(problem, defense=build_defense(f"gaussian:{noise / abs(factor)!r}"))
    told, problem = problem, freed(problem)
    outcomes = with_fitted_pulls(told, problem, attack.run(problem, monitor))
    outcomes = rescaled(seek_others(problem, monitor, outcomes), scalings)
    if attack.polished and problem.pull_back == "auto":  # another solver was asked for: its own answer is
        sigma = _sigma_of(observation)  # of a client's own noise, which a factor multiplies as well
        sigmas: list[float | None] = [sigma] * problem.victims
        if sigma is None and noise is not None:
            sigmas = [noise / abs(scaling.factor) for scaling in scalings]
        outcomes = with_noise(problem, monitor, outcomes, sigmas)
    outcomes = with_open_maps(problem, monitor, outcomes)
    outcomes = with_targets(told, problem, with_multiples(problem, monitor, outcomes))
    outcomes = withheld(outcomes, scalings)
    outcomes = [_with_reason(o, monitor.reasons.get(k // problem.examples)) for k, o in enumerate(outcomes)]
    monitor.solve = time.perf_counter() - begun - (monitor.trace + monitor.compile - before)
    return problem, outcomes


def _of_the_others(observation: Observation, silent: Mapping[int, str], given: dict[str, Any]) -> Reconstruction:
    """What the victims give who are not `silent`, with these among them as `failed`."""
    victims, size, labels = observation.victims, observation.examples, given["labels"]
    heard = [v for v in range(victims) if v not in silent]
    if not heard:
        raise InputError(f"gradient 0: {silent[0]}")
    if labels is not None:
        if np.shape(labels) != (victims * size,):
            raise InputError(f"labels must be {victims * size} integers, one an example, got shape {np.shape(labels)}")
        labels = np.reshape(labels, (victims, size))[heard].ravel()
    gradients = {p: g[heard] for p, g in observation.gradients.items()}
    found = invert(dataclasses.replace(observation, gradients=gradients), **{**given, "labels": labels})
    return with_silent(found, silent, victims, observation.input_range)


def _in_another_order(observation: Observation, found: Reconstruction, given: Mapping[str, Any]) -> Reconstruction:
    """What the capture gives with its interchangeable layers in the order that its gradient is consistent with.

    Where no other order is, `found`, whose certificates name the layers.
    """
    quick = {"attack": "rgap", "dtype": given["dtype"]}
    best, chosen = 0, None
    try:
        best = consistent_layers(invert(first_victim(observation), **quick))
        for moved, other in reorderings(observation):
            depth = consistent_layers(invert(first_victim(other), **quick))
            best, chosen = (depth, (moved, other)) if depth > best else (best, chosen)
    except InputError:  # not a chain of affine layers
        chosen = None
    if chosen is not None:
        moved, other = chosen
        again = invert(other, **given)
        if any(c.status != "failed" for c in again.certificates):
            return dataclasses.replace(again, remarks=(*again.remarks, remark_of(moved)))
    words = doubt(observation.interchangeable)
    certificates = tuple(
        dataclasses.replace(c, reason=words if c.reason is None else f"{c.reason}; {words}") for c in found.certificates
    )
    return dataclasses.replace(found, certificates=certificates)


def _with_reason(outcome: Outcome, reason: str | None) -> Outcome:
    known = reason is None or outcome.reason is not None
    return outcome if known else dataclasses.replace(outcome, reason=reason)


def _sigma_of(observation: Observation) -> float | None:
    """The noise of a defense that a layer-wise attack hears of: in every entry of a gradient that it takes as it is."""
    if observation.defense in (None, CUSTOM) or observation.local_steps > 1:
        return None
    setting = build_defense(str(observation.defense))
    return None if setting.server.known_sigma is None else setting.server.known_sigma(setting.values)
