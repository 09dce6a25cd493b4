"""`invert`: from an observation to images, with a certificate."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from leakjax._widening import Wide, in_one_precision
from leakjax.arguments import check_solving, instance
from leakjax.attacks import ATTACKS, DEFAULT_ATTACK
from leakjax.attacks.problem import PULL_BACKS, Monitor, Outcome, Problem
from leakjax.attacks.told import certifiable
from leakjax.defenses import CUSTOM, Setting, build_defense
from leakjax.errors import InputError, UnreadableModelError, unknown_name
from leakjax.losses import labels_of
from leakjax.model import Model
from leakjax.network import read_network
from leakjax.observation import Observation, run_model
from leakjax.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from leakjax.precision import compute_in
from leakjax.priors import DEFAULT_PRIOR, PRIORS
from leakjax.reconstruction import Certificate, LayerInfo, Reconstruction
from leakjax.segments import Chain, read_segments

SOLVERS = ("auto", "lsmr", "dense")
_SOLVED = ("determined", "pulled_back")


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
    - `prior`: a name of `priors.PRIORS`, that chooses among the images that explain the gradient equally well ("none"
      is the one of minimum norm);
    - `pull_back`: what solves pulled-back constraints: an active set behind piecewise-linear activations and
      Levenberg-Marquardt elsewhere ("auto"), "levenberg_marquardt" alone, or first-order descent ("optax");
    - `optimizer`: what "optax", the prior and `hybrid` descend by: a name of `optimizers.OPTIMIZERS` or any
      `optax.GradientTransformation`;
    - `steps`: bound on the first-order descent of `hybrid` and the matching baselines (L-BFGS or Adam iterations); None
      for their papers' own;
    - `seed`: of the random starts;
    - `adaptive`: whether `match` uses what the observation says of a defense (see `attacks.told`); else, as the
      layer-wise attacks always do, it takes what was sent for the gradient;
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
    if not (isinstance(starts, int) and starts >= 1):
        raise InputError(f"starts must be a positive integer, got {starts!r}")
    if steps is not None and not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1):
        raise InputError(f"steps must be a positive integer, or None for the attack's own, got {steps!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be an integer from 0, got {seed!r}")
    if prior not in PRIORS:
        raise unknown_name("prior", prior, PRIORS)
    if pull_back not in PULL_BACKS:
        raise unknown_name("pull_back", pull_back, PULL_BACKS)
    descent = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if descent is None:
        raise unknown_name("optimizer", str(optimizer), OPTIMIZERS)
    if not isinstance(descent, optax.GradientTransformation):
        raise InputError(f"optimizer must be a name of {', '.join(OPTIMIZERS)} or an Optax transformation")
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise InputError(f"chunk must be a positive integer, got {chunk!r}")
    monitor = Monitor(tell=progress or (lambda stage: None))
    with compute_in(dtype) as floating:
        wide = _cast(observation.model, tuple(observation.input_shape), dtype)
        model = wide.model
        logits = run_model(model, jax.ShapeDtypeStruct((1, *observation.input_shape), floating))
        chain = _chain(model, observation, dtype, chosen.layerwise)
        network = read_network(model, observation.input_shape, observation.examples, dtype)
        monitor.trace += time.perf_counter() - start
        precision = max(float(np.finfo(observation.precision).eps), float(jnp.finfo(wide.own).eps))
        gradients = {p: np.asarray(g, floating) for p, g in observation.gradients.items()}
        problem = Problem(
            chain,
            network,
            model.variables,
            gradients,
            observation.loss,
            tuple(observation.input_shape),
            observation.input_range,
            _check_labels(labels, observation, logits.shape[-1]),
            floating,
            precision,
            chunk or (1 if jax.default_backend() == "cpu" else 64),
            solver,
            pull_back,
            descent,
            observation.examples,
            starts,
            prior,
            steps,
            seed,
            devices=_check_devices(devices),
            defense=_told(observation, adaptive and not chosen.layerwise),
            local_steps=observation.local_steps,
            learning_rate=observation.learning_rate,
        )
        before, begun = monitor.trace + monitor.compile, time.perf_counter()
        outcomes = chosen.run(problem, monitor)
        monitor.solve = time.perf_counter() - begun - (monitor.trace + monitor.compile - before)
    return _assemble(observation, problem, outcomes, attack, dtype, labels is not None, monitor, start)


def _told(observation: Observation, adaptive: bool) -> Setting | None:
    """The defense that the attack reckons with."""
    known = adaptive and observation.defense not in (None, CUSTOM)
    return build_defense(str(observation.defense)) if known else None


@functools.lru_cache(maxsize=16)
def _cast(model: Model, input_shape: tuple[int, ...], dtype: str) -> Wide:
    return in_one_precision(model, input_shape, dtype)


def _chain(model: Model, observation: Observation, dtype: str, needed: bool) -> Chain | None:
    """The model as segments for the examples of one gradient; None where not needed and it cannot be read."""
    try:
        return _read(model, tuple(observation.input_shape), dtype, observation.examples)
    except UnreadableModelError:
        if needed:
            raise
        return None


_CHAINS: dict[Any, Chain] = {}
_CHAINS_LIMIT = 64


def _read(model: Model, input_shape: tuple[int, ...], dtype: str, examples: int) -> Chain:
    """The model's chain of segments, read once for all models of one architecture."""
    shapes = tuple((path, tuple(a.shape), str(a.dtype)) for path, a in model.variables.items())
    key = (model.apply, shapes, input_shape, dtype, examples)
    if key not in _CHAINS:
        chain = read_segments(model, input_shape, dtype, examples)
        if chain.parametric:
            return chain
        while len(_CHAINS) >= _CHAINS_LIMIT:
            _CHAINS.pop(next(iter(_CHAINS)))
        _CHAINS[key] = chain
    return _CHAINS[key]


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
    low, high = observation.input_range
    images, labels, determined, residuals = [], [], [], []
    certificates = _certify_together([certify(problem, o, unknowns) for o in outcomes], problem.examples)
    if observation.defense is not None and (problem.defense is None or not certifiable(problem)):
        certificates = [Certificate("failed", None, c.unknowns, c.condition, "defense") for c in certificates]
    for outcome, certificate in zip(outcomes, certificates, strict=True):
        best = outcome.candidates[0] if outcome.candidates else None
        images.append(np.full(shape, 0.5 * (low + high)) if best is None else best.image)
        labels.append(-1 if best is None else best.label)
        residuals.append(np.inf if best is None else best.gradient_residual)
        trusted = certificate.status != "failed" and outcome.seen is not None
        determined.append(outcome.seen if trusted else np.zeros(shape))
    return Reconstruction(
        attack,
        dtype,
        np.stack(images).astype(dtype),
        np.asarray(labels),
        "given" if given else "recovered",
        np.stack(determined).astype(float),
        np.asarray(residuals),
        tuple(certificates),
        tuple(outcome.layers for outcome in outcomes),
        tuple(outcome.candidates for outcome in outcomes),
        {
            "trace": monitor.trace,
            "compile": monitor.compile,
            "solve": monitor.solve,
            "total": time.perf_counter() - start,
        },
    )


def _certify_together(certificates: list[Certificate], examples: int) -> list[Certificate]:
    """The examples of a gradient explain it together: where one is no image, none is trusted."""
    groups = [certificates[k : k + examples] for k in range(0, len(certificates), examples)]
    failed = [next((c for c in group if c.status == "failed"), None) for group in groups]
    return [c if bad is None else bad for group, bad in zip(groups, failed, strict=True) for c in group]


def certify(problem: Problem, outcome: Outcome, unknowns: int) -> Certificate:
    """The certificate of one outcome, for `unknowns` or what its first layer says; see `Certificate`. No truth is used.

    A layer's relative error is estimated by its condition times its residual; where that exceeds 1e-3 at any layer
    nothing is certified, nor where the only answer leaves the input range.
    """
    if not outcome.candidates:
        return Certificate("failed", None, unknowns, None, "head")
    layers = outcome.layers
    unknowns = layers[0].unknowns
    condition = layers[0].condition
    failed = next((info.name for info in reversed(layers) if info.status == "failed"), None)
    if failed is None:
        failed = next((info.name for info in reversed(layers) if not _relative_error(info) <= 1e-3), None)
    if failed is None and not outcome.candidates[0].gradient_residual <= problem.matched:
        failed = next((info.name for info in reversed(layers) if info.status not in _SOLVED), layers[0].name)
    if failed is None:
        failed = next((info.name for info in reversed(layers[1:]) if info.status not in _SOLVED), None)
    if failed is not None:
        return Certificate("failed", None, unknowns, condition, failed)
    whole = layers[0].status in _SOLVED and len(outcome.candidates) == 1
    if whole and not problem.in_range(outcome.candidates[0].image):  # no image
        return Certificate("failed", None, unknowns, condition, layers[0].name)
    return Certificate("exact" if whole else "ambiguous", layers[0].rank, unknowns, condition)


def _relative_error(info: LayerInfo) -> float:
    """What a layer's residual may do to its unknowns, relatively: its condition times its residual."""
    condition = np.inf if info.condition is None else info.condition
    return 0.0 if info.residual == 0 else float(condition * info.residual)
