"""What was asked of an attack, checked, and an observation made a `Problem` by it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from leakjax.arguments import check_solving, real
from leakjax.attacks import ATTACKS
from leakjax.attacks.certificates.stored import stored_rounding
from leakjax.attacks.problem import PULL_BACKS, Computed, Monitor, Problem
from leakjax.client.defenses import CUSTOM, Setting, build_defense
from leakjax.client.factors import check_factor, known_factors
from leakjax.client.observation import Observation
from leakjax.client.silent import without_decay
from leakjax.constraints.priors import PRIORS
from leakjax.errors import InputError, UnreadableModelError, unknown_name
from leakjax.models.losses import UNKNOWN, check_loss, on_outputs
from leakjax.models.reader import Model, run_model
from leakjax.models.targets import check_classes
from leakjax.runtime.programs import keep
from leakjax.segments.chain import Chain, read_chain, with_statistics
from leakjax.segments.sent_statistics import read_sent_statistics
from leakjax.segments.stacked import unstacked
from leakjax.segments.tail import behind, without_tail
from leakjax.segments.tracing.network import read_network
from leakjax.segments.tracing.widening import Wide, in_one_precision
from leakjax.segments.training_mode import training_remarks
from leakjax.solvers.descent import OPTIMIZERS

SOLVERS = ("auto", "lsmr", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of `invert`, but for the observation."""

    attack: str
    dtype: str
    labels: Any
    solver: str
    chunk: int | None
    starts: int
    prior: str
    pull_back: str
    optimizer: str | optax.GradientTransformation
    steps: int | None
    seed: int
    devices: Sequence[Any] | None
    adaptive: bool
    gradient_noise: float | None
    gradient_scale: float | None
    progress: Callable[[str], None] | None

    @property
    def hears(self) -> bool:
        """Whether the attack reckons with what a defense did."""
        return self.adaptive and not ATTACKS[self.attack].layerwise

    @property
    def descent(self) -> optax.GradientTransformation | None:
        """The transformation that was asked for, None for an unknown name."""
        return OPTIMIZERS.get(self.optimizer) if isinstance(self.optimizer, str) else self.optimizer


def checked(asked: Asked, observation: Observation) -> Asked:
    """`asked` with its numbers as floats; `InputError` for what cannot be asked, of any attack or of these gradients,
    before anything is traced."""
    names = {"attack": (asked.attack, ATTACKS), "prior": (asked.prior, PRIORS)}
    names |= {"pull_back": (asked.pull_back, PULL_BACKS), "solver": (asked.solver, SOLVERS)}
    names |= {"optimizer": (asked.optimizer, OPTIMIZERS)}
    counts = {"starts": asked.starts, "steps": asked.steps, "chunk": asked.chunk}
    check_solving(names, counts, asked.seed, asked.labels, asked.devices, asked.progress)
    if ATTACKS[asked.attack].layerwise and observation.local_steps > 1:
        raise InputError(
            f"attack {asked.attack!r} reads one gradient layer by layer, and this is an update of "
            f"{observation.local_steps} local_steps; use attack='match' (--attack match), which unrolls them"
        )
    if asked.descent is None:
        raise unknown_name("optimizer", str(asked.optimizer), OPTIMIZERS)
    if not isinstance(asked.descent, optax.GradientTransformation):
        raise InputError(f"optimizer must be a name of {', '.join(OPTIMIZERS)} or an Optax transformation")
    unread = asked.labels is None and (observation.target != "class" or observation.loss == UNKNOWN)
    if unread and observation.local_steps > 1:
        raise InputError(
            f"an update of {observation.local_steps} local_steps says nothing of targets that are no classes: give "
            "them (labels=..., what the loss compares each example's outputs with), or take local_steps 1"
        )
    if unread and observation.examples > 1:
        raise InputError(
            f"a gradient of {observation.examples} examples says nothing of targets that are no classes: give them "
            "(labels=..., what the loss compares each example's outputs with), or take batch_size 1"
        )
    noise = _check_noise(asked.gradient_noise, observation)
    factor = check_factor("gradient_scale", asked.gradient_scale)
    if factor is not None and _unheard(observation, asked.hears):
        raise InputError(
            f"gradient_scale: the defense {observation.defense!r} is a factor itself to an attack that is not told of "
            "it; leave gradient_scale out, or use attack='match' (--attack match)"
        )
    return dataclasses.replace(asked, gradient_noise=noise, gradient_scale=factor)


def prepare(observation: Observation, asked: Asked, floating: Any, monitor: Monitor) -> tuple[Problem, tuple[str, ...]]:
    """The problem in the dtype `floating`, and remarks on the model; remarks are told to the `monitor` at once."""
    wide = _cast(observation.model, tuple(observation.input_shape), asked.dtype)
    model = wide.model
    logits = run_model(model, jax.ShapeDtypeStruct((1, *observation.input_shape), floating))
    _check_target(observation, tuple(logits.shape[1:]), floating)
    labels = _check_labels(asked.labels, observation, logits.shape[1:])
    remarks = training_remarks(model, observation.input_shape, floating, normalizes=bool(observation.buffers))
    for remark in remarks:
        monitor.tell(remark)
    loss = on_outputs(observation.loss, tuple(logits.shape[1:]))
    model, tail = without_tail(model, observation.input_shape, asked.dtype, observation.examples)
    split: Callable[..., dict[str, Any]] = dict
    if observation.defense is None:  # which may have acted on each parameter by itself
        model, split = unstacked(model, observation.input_shape, asked.dtype)
    loss = loss if tail is None or observation.loss == UNKNOWN else behind(loss, tail)
    chain = _chain(model, observation, asked.dtype, ATTACKS[asked.attack].layerwise)
    network = read_network(model, observation.input_shape, observation.examples, asked.dtype)
    stored = 0.0 if observation.defense else stored_rounding(observation.gradients)
    sent, amplified = without_decay(observation.gradients, observation.model.params, observation.weight_decay)
    if observation.reduction == "sum":
        sent = {p: g / observation.examples for p, g in sent.items()}
    sent = split(sent)
    own = max(float(jnp.finfo(floats).eps) for floats in (observation.precision, wide.own))
    noisy = observation.defense is not None or asked.gradient_noise is not None
    statistics, rounded = ({}, {}) if noisy else _statistics(observation, asked.dtype, own)  # noise: gradients' alone
    chain = chain if chain is None or not statistics else with_statistics(chain, tuple(statistics))
    assert asked.descent is not None, "checked before"
    problem = Problem(
        chain=chain,
        network=network,
        variables=model.variables,
        gradients={p: np.asarray(g, floating) for p, g in sent.items()},
        loss=loss,
        input_shape=tuple(observation.input_shape),
        input_range=observation.input_range,
        labels=labels,
        dtype=floating,
        noise=float(np.max(amplified)) * max(own, stored),
        chunk=asked.chunk or (1 if jax.default_backend() == "cpu" else 64),
        solver=asked.solver,
        pull_back=asked.pull_back,
        optimizer=asked.descent,
        examples=observation.examples,
        starts=asked.starts,
        prior=asked.prior,
        steps=asked.steps,
        seed=asked.seed,
        devices=_check_devices(asked.devices),
        defense=_told(observation, asked.hears, asked.gradient_noise),
        local_steps=observation.local_steps,
        learning_rate=observation.learning_rate,
        channel_limits=None if observation.input_mean is None else observation.limits,
        factors=_factors(observation, asked.gradient_scale, asked.hears),
        outputs=math.prod(logits.shape[1:]),
        target_kind=observation.target,
        target_shape=tuple(observation.target_shape),
        statistics=statistics,
        statistics_rounding=rounded,
        computed=None if tail is not None or split is not dict else _computed(observation, asked.dtype),
        single=functools.partial(read_network, model, observation.input_shape, 1, asked.dtype),
    )
    return problem, remarks


def _computed(observation: Observation, dtype: str) -> Computed | None:
    """How the clients computed, where that is coarser than what the attack computes in."""
    own = observation.precision
    if jnp.finfo(own).eps <= jnp.finfo(dtype).eps:
        return None
    model, shape, examples = observation.model.astype(own), observation.input_shape, observation.examples
    rate = float(observation.weight_decay or 0.0) / (examples if observation.reduction == "sum" else 1)
    decay = {p: rate * np.asarray(a, float) for p, a in observation.model.params.items()} if rate else {}
    return Computed(own, model.apply, functools.partial(read_network, model, shape, examples, own), decay)


def _statistics(
    observation: Observation, dtype: str, rounding: float
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What the clients' new buffers say of the batch, and how it was rounded."""
    model, shape, between = observation.model.astype(dtype), observation.input_shape, observation.input_range
    return read_sent_statistics(model, observation.buffers, shape, between, observation.examples, dtype, rounding)


def _check_target(observation: Observation, outputs: tuple[int, ...], floating: Any) -> None:
    """Refuse a `target` and `target_shape`, as a file may claim them, that the loss does not take."""
    kind, shape = observation.target, tuple(observation.target_shape)
    wanted = {"class": (), "input": None, "values": None}.get(kind, outputs[:-1] if kind == "classes" else outputs)
    if kind == "input" and math.prod(shape) != math.prod(observation.input_shape):
        wanted = tuple(observation.input_shape)
    if wanted is not None and shape != wanted:
        raise InputError(f"target_shape of target {kind!r} must be {wanted} for this model, got {shape}")
    if observation.loss != UNKNOWN:
        of = floating if kind in ("values", "probabilities", "input") else jnp.int32
        check_loss(observation.loss, jax.ShapeDtypeStruct(outputs, floating), jax.ShapeDtypeStruct(shape, of))


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


def _check_noise(gradient_noise: Any, observation: Observation) -> float | None:
    if gradient_noise is None:
        return None
    wanted = "a standard deviation above 0, or None"
    deviation = real("gradient_noise", gradient_noise, wanted)
    if not deviation > 0:
        raise InputError(f"gradient_noise must be {wanted}, got {gradient_noise!r}")
    if observation.reduction == "sum" and observation.examples > 1:
        raise InputError("gradient_noise goes with means; divide what was sent, and the noise, by the examples")
    if observation.defense is not None:
        raise InputError(f"gradient_noise goes with gradients without a defense; this one says {observation.defense!r}")
    return deviation


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


def _check_labels(labels: Any, observation: Observation, outputs: Sequence[int]) -> np.ndarray | None:
    """The given labels or targets, (V, B, ...)."""
    if labels is None:
        return None
    given, expected = np.asarray(labels), observation.victims * observation.examples
    kind, shape = observation.target, tuple(observation.target_shape)
    if kind in ("class", "classes"):
        if given.shape != (expected, *shape) or not np.issubdtype(given.dtype, np.integer):
            each = f", {shape} an example" if shape else ", one an example"
            raise InputError(f"labels must be {expected} integers{each}, got shape {given.shape}")
        check_classes(given, outputs if shape else (math.prod(outputs),), "labels")
    elif given.shape != (expected, *shape) or given.dtype.kind not in "biuf" or not np.all(np.isfinite(given)):
        raise InputError(f"labels must be {expected} targets of shape {shape}, finite numbers, got shape {given.shape}")
    if kind in ("values", "probabilities", "input"):
        given = given.astype(float) if given.dtype.kind == "f" else given
    return given.reshape(observation.victims, observation.examples, *shape)
