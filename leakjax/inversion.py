"""`invert`: from an observation to images, with a certificate."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from leakjax.arguments import check_solving, instance, real
from leakjax.attacks import ATTACKS, DEFAULT_ATTACK
from leakjax.attacks.adaptive import certifiable
from leakjax.attacks.certificates.certificate import agreed, certify, certify_together
from leakjax.attacks.certificates.multiples import with_doubt, with_multiples
from leakjax.attacks.certificates.other_images import seek_others
from leakjax.attacks.certificates.stored import stored_rounding
from leakjax.attacks.heads.scales import read_scales, rescaled, unscaled
from leakjax.attacks.matching.noisy import with_noise
from leakjax.attacks.problem import PULL_BACKS, Monitor, Outcome, Problem
from leakjax.captures.orders import consistent_layers, doubt, first_victim, remark_of, reorderings
from leakjax.client.defenses import CUSTOM, Server, Setting, build_defense
from leakjax.client.factors import check_factor, known_factors
from leakjax.client.observation import Observation
from leakjax.client.silent import silent_victims, with_silent, without_decay
from leakjax.constraints.priors import DEFAULT_PRIOR, PRIORS
from leakjax.errors import InputError, UnreadableModelError, unknown_name
from leakjax.models.losses import labels_of
from leakjax.models.reader import Model, run_model
from leakjax.reconstruction import Certificate, Reconstruction
from leakjax.runtime.precision import compute_in
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Chain, read_chain
from leakjax.segments.tracing.network import read_network
from leakjax.segments.tracing.widening import Wide, in_one_precision
from leakjax.segments.training_mode import training_remarks
from leakjax.solvers.descent import DEFAULT_OPTIMIZER, OPTIMIZERS

SOLVERS = ("auto", "lsmr", "dense")


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
    - `solver`: "lsmr" is matrix-free, "dense" factorizes every layer's matrix, "auto" does the latter only where LSMR
      met a null space or bad conditioning and the matrix is small; "dense" gives `match` few, costly steps, for models
      whose gradient says little of an image (global average pooling);
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
    start = time.perf_counter()
    names = {"attack": (attack, ATTACKS), "prior": (prior, PRIORS), "pull_back": (pull_back, PULL_BACKS)}
    names |= {"solver": (solver, SOLVERS), "optimizer": (optimizer, OPTIMIZERS)}
    counts = {"starts": starts, "steps": steps, "chunk": chunk}
    instance("observation", observation, Observation, "from observe or read_capture")
    check_solving(names, counts, seed, labels, devices, progress)
    chosen = ATTACKS[attack]
    if chosen.layerwise and observation.local_steps > 1:
        raise InputError(
            f"attack {attack!r} reads one gradient layer by layer, and this is an update of {observation.local_steps} "
            "local_steps; use attack='match' (--attack match), which unrolls them"
        )
    descent = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if descent is None:
        raise unknown_name("optimizer", str(optimizer), OPTIMIZERS)
    if not isinstance(descent, optax.GradientTransformation):
        raise InputError(f"optimizer must be a name of {', '.join(OPTIMIZERS)} or an Optax transformation")
    _check_noise(gradient_noise, observation)
    factor = check_factor("gradient_scale", gradient_scale)
    if factor is not None and _unheard(observation, adaptive and not chosen.layerwise):
        raise InputError(
            f"gradient_scale: the defense {observation.defense!r} is a factor itself to an attack that is not told of "
            "it; leave gradient_scale out, or use attack='match' (--attack match)"
        )
    silent = silent_victims(observation)
    if silent:
        return _of_the_others(observation, silent, given)
    monitor = Monitor(tell=progress or (lambda stage: None))
    with compute_in(dtype) as floating:
        wide = _cast(observation.model, tuple(observation.input_shape), dtype)
        model = wide.model
        logits = run_model(model, jax.ShapeDtypeStruct((1, *observation.input_shape), floating))
        remarks = training_remarks(model, observation.input_shape, floating)
        for remark in remarks:
            monitor.tell(remark)
        chain = _chain(model, observation, dtype, chosen.layerwise)
        network = read_network(model, observation.input_shape, observation.examples, dtype)
        monitor.trace += time.perf_counter() - start
        stored = 0.0 if observation.defense else stored_rounding(observation.gradients)
        sent, amplified = without_decay(observation.gradients, observation.model.params, observation.weight_decay)
        own = max(float(jnp.finfo(floats).eps) for floats in (observation.precision, wide.own))
        precision = float(np.max(amplified)) * max(own, stored)
        gradients = {p: np.asarray(g, floating) for p, g in sent.items()}
        problem = Problem(
            chain=chain,
            network=network,
            variables=model.variables,
            gradients=gradients,
            loss=observation.loss,
            input_shape=tuple(observation.input_shape),
            input_range=observation.input_range,
            labels=_check_labels(labels, observation, logits.shape[-1]),
            dtype=floating,
            noise=precision,
            chunk=chunk or (1 if jax.default_backend() == "cpu" else 64),
            solver=solver,
            pull_back=pull_back,
            optimizer=descent,
            examples=observation.examples,
            starts=starts,
            prior=prior,
            steps=steps,
            seed=seed,
            devices=_check_devices(devices),
            defense=_told(observation, adaptive and not chosen.layerwise, gradient_noise),
            local_steps=observation.local_steps,
            learning_rate=observation.learning_rate,
            channel_limits=None if observation.input_mean is None else observation.limits,
            factors=_factors(observation, factor, adaptive and not chosen.layerwise),
            outputs=logits.shape[-1],
        )
        before, begun = monitor.trace + monitor.compile, time.perf_counter()
        scalings = read_scales(problem)
        problem = unscaled(problem, scalings)
        if problem.defense is not None and gradient_noise is not None and factor is not None:
            problem = dataclasses.replace(problem, defense=build_defense(f"gaussian:{gradient_noise / abs(factor)!r}"))
        outcomes = seek_others(problem, monitor, chosen.run(problem, monitor))
        outcomes = rescaled(outcomes, scalings)
        if chosen.polished and pull_back == "auto":  # another solver was asked for: its own answer is
            told = _sigma_of(observation)  # of a client's own noise, which a factor multiplies as well
            sigmas: list[float | None] = [told] * problem.victims
            if told is None and gradient_noise is not None:
                sigmas = [gradient_noise / abs(scaling.factor) for scaling in scalings]
            outcomes = with_noise(problem, monitor, outcomes, sigmas)
        outcomes = with_multiples(problem, monitor, outcomes)
        outcomes = [_with_reason(o, monitor.reasons.get(k // problem.examples)) for k, o in enumerate(outcomes)]
        monitor.solve = time.perf_counter() - begun - (monitor.trace + monitor.compile - before)
        found = _assemble(observation, problem, outcomes, attack, dtype, labels is not None, monitor, start)
    found = dataclasses.replace(found, remarks=remarks)
    failed = all(c.status == "failed" for c in found.certificates)
    return _in_another_order(observation, found, given) if failed and observation.interchangeable else found


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


def _with_reason(outcome: Outcome, reason: str | None) -> Outcome:
    known = reason is None or outcome.reason is not None
    return outcome if known else dataclasses.replace(outcome, reason=reason)


def _told(observation: Observation, adaptive: bool, gradient_noise: float | None) -> Setting | None:
    """The defense that the attack reckons with."""
    known = adaptive and observation.defense not in (None, CUSTOM)
    if known:
        return build_defense(str(observation.defense))
    return build_defense(f"gaussian:{gradient_noise!r}") if adaptive and gradient_noise is not None else None


def _unheard(observation: Observation, adaptive: bool) -> bool:
    """Whether the defense multiplies gradients, and the attack takes them as they are."""
    if observation.defense is None or observation.defense == CUSTOM:
        return observation.defense == CUSTOM
    return build_defense(observation.defense).server.rescales and not adaptive


def _factors(observation: Observation, told: float | None, adaptive: bool) -> tuple[float | None, ...]:
    """By victim the factor that is known, or told."""
    known = {} if _unheard(observation, adaptive) else observation.factors
    return known_factors(observation.gradients, known, told)


def _sigma_of(observation: Observation) -> float | None:
    """The noise of a defense that a layer-wise attack hears of: in every entry of a gradient that it takes as it is."""
    if observation.defense in (None, CUSTOM) or observation.local_steps > 1:
        return None
    setting = build_defense(str(observation.defense))
    return None if setting.server.known_sigma is None else setting.server.known_sigma(setting.values)


def _check_noise(gradient_noise: float | None, observation: Observation) -> None:
    if gradient_noise is None:
        return
    wanted = "a standard deviation above 0, or None"
    if not real("gradient_noise", gradient_noise, wanted) > 0:
        raise InputError(f"gradient_noise must be {wanted}, got {gradient_noise!r}")
    if observation.defense is not None:
        raise InputError(f"gradient_noise goes with gradients without a defense; this one says {observation.defense!r}")


@keep(16)
def _cast(model: Model, input_shape: tuple[int, ...], dtype: str) -> Wide:
    return in_one_precision(model, input_shape, dtype)


def _chain(model: Model, observation: Observation, dtype: str, needed: bool) -> Chain | None:
    """The model as segments for the examples of one gradient; None where not needed and it cannot be read."""
    try:
        return read_chain(model, observation.input_shape, dtype, observation.examples)
    except UnreadableModelError:
        if needed:
            raise
        return None


def _check_devices(devices: Sequence[Any] | None) -> tuple[Any, ...]:
    chosen = tuple(devices or ())
    here = jax.local_devices()
    if len(set(chosen)) < len(chosen) or any(device not in here for device in chosen):
        raise InputError(f"devices must be different ones of jax.local_devices(), {len(here)} here, got {chosen}")
    return chosen


def _check_labels(labels: Any, observation: Observation, outputs: int) -> np.ndarray | None:
    if labels is None:
        return None
    given, expected = np.asarray(labels), observation.victims * observation.examples
    if given.shape != (expected,) or not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"labels must be {expected} integers, one an example, got shape {given.shape}")
    if given.min() < 0 or given.max() >= labels_of(outputs):
        raise InputError(f"labels must be in 0..{labels_of(outputs) - 1}, got {given.min()}..{given.max()}")
    return given.reshape(observation.victims, observation.examples)


def _assemble(
    observation: Observation,
    problem: Problem,
    outcomes: list[Outcome],
    attack: str,
    dtype: str,
    given: bool,
    monitor: Monitor,
    start: float,
) -> Reconstruction:
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
        attack=attack,
        dtype=dtype,
        images=np.stack(images).astype(dtype),
        labels=np.asarray(labels),
        label_source="given" if given else "recovered",
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
        targets=tuple(outcome.target for outcome in outcomes),
    )
