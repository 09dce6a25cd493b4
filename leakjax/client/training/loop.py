"""A small training loop, so that leakage can be measured over epochs and accuracy beside privacy."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float

from leakjax.arguments import MOST, instance, listener, shown, whole
from leakjax.client.defenses import Setting, build_defense
from leakjax.client.training.examples import Examples, examples_of
from leakjax.client.training.steps import make_accuracy, make_steps, start, steps_at_once
from leakjax.errors import InputError
from leakjax.models.losses import LossSpec, known_loss, labels_of
from leakjax.models.reader import Arrays, Model, output_count, read_model
from leakjax.runtime.precision import compute_in


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """What `train` returns, for E epochs.

    - `model`: with the weights after the last epoch;
    - `kept`: for each epoch that was asked for the parameters after it; 0 is the initialization;
    - `loss` (E,): the mean training loss of each epoch, over its steps, in nats or what the loss counts in;
    - `accuracy` (E + 1,): the share of test examples with the right label, before training and after each epoch; NaN
      without test examples.
    """

    model: Model
    kept: Mapping[int, Arrays]
    loss: Float[np.ndarray, " E"]
    accuracy: Float[np.ndarray, " E+1"]

    def at(self, epoch: int) -> Model:
        """The model after `epoch`, one of `kept`; it goes where any model goes, as into `observe` or `audit`."""
        if epoch not in self.kept:
            raise InputError(f"epoch {epoch} was not kept; kept are {', '.join(map(str, self.kept))}")
        return self.model.with_arrays(self.kept[epoch], self.model.buffers)


def train(
    model: Any,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 32,
    clients: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    loss: LossSpec = "softmax_cross_entropy",
    defense: str | optax.GradientTransformation | None = None,
    test: Any = None,
    keep: Collection[int] | None = None,
    input_range: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    dtype: str = "float32",
    params: Any = None,
    progress: Callable[[str], None] | None = None,
) -> Training:
    """Train by federated SGD: with g_k = d/dtheta (1/B) sum_b loss(model(x_kb), y_kb) of client k = 1..K, each step is

        theta <- theta + optimizer( (1/K) sum_k defense_k(g_k) ),

    on K B examples drawn without replacement; an epoch leaves out the remainder, at random.

    Arguments:
    - `model`, `params`: as `read_model` takes them. Buffers (batch norm's running values) stay as they are;
    - `data`, `test`: pairs (images (N, H, W, C), labels (N,)) or data sources of records {"image", "label"}, such as
      `tfds.data_source` gives; uint8 images are mapped from 0..255 onto `input_range`, others must lie in it. Labels
      of a one-logit model are 0 or 1;
    - `batch_size`: B, examples of one client in one step; `clients`: K, whose gradients one step averages;
    - `optimizer`: of Optax (default `optax.adam(1e-3)`);
    - `defense`: as typed for `observe` ("gaussian:1e-3"), new random numbers for every client and step; or an
      `optax.GradientTransformation` applied to each client's gradient, a state for each client; random keys in that
      state are made different. Its update is given `images` and `labels`, as `guard` wants them;
    - `keep`: epochs, 0..E, whose parameters are kept (default: all); `seed`: of the order of the examples and
      of a defense's random numbers;
    - `dtype`: "float32" or "float64".

    Same arguments, same device, same result. Steps run in one `lax.scan` an epoch while its examples take less than
    1 GiB, else in several.

    Raises `InputError` for data that do not fit the model, numbers out of range, or a loss that is not finite.
    """
    known_loss(loss)
    listener("progress", progress)
    if optimizer is not None:
        instance("optimizer", optimizer, optax.GradientTransformation, "of Optax")
    kept_epochs = _check_numbers(epochs, batch_size, clients, seed, keep)
    chosen = build_defense(defense) if isinstance(defense, str) else defense
    if not (chosen is None or isinstance(chosen, Setting | optax.GradientTransformation)):
        raise InputError(f"defense must be a specification or an Optax transformation, got a {type(defense).__name__}")
    told = progress or (lambda stage: None)
    examples = examples_of(data, "data", input_range)
    tests = None if test is None else examples_of(test, "test", input_range)
    per_step = batch_size * clients
    if len(examples.labels) < per_step:
        raise InputError(
            f"batch_size {batch_size} with {clients} clients takes {per_step} examples a step; data has "
            f"{len(examples.labels)}"
        )
    with compute_in(dtype) as floating:
        read = read_model(model, params).astype(floating)
        for name, given in (("data", examples), ("test", tests)):
            if given is not None:
                _check_fit(name, given, read)
        optimizer = optimizer or optax.adam(1e-3)
        run_steps = make_steps(read, loss, optimizer, chosen, examples, floating)
        accuracy = (lambda params: np.nan) if tests is None else make_accuracy(read, tests, loss, floating)
        first = examples.scaled(examples.images[:batch_size], floating)
        state = start(read, optimizer, chosen, clients, seed, first)
        kept, losses, accuracies = {}, [], []
        order = np.random.default_rng(seed)
        for epoch in range(epochs + 1):
            if epoch > 0:
                told(f"epoch {epoch} of {epochs}")
                steps = order.permutation(len(examples.labels))[: len(examples.labels) // per_step * per_step]
                steps, found = steps.reshape(-1, clients, batch_size), []
                for chunk in steps_at_once(steps, examples):
                    state, chunk_losses = run_steps(state, examples.images[chunk], examples.labels[chunk])
                    found.append(np.asarray(chunk_losses, np.float64))
                losses.append(np.concatenate(found).mean())
                if not np.isfinite(losses[-1]):
                    raise InputError(
                        f"training diverged in epoch {epoch}: the loss is {losses[-1]}; lower the learning rate"
                    )
            accuracies.append(accuracy(state.params))
            if epoch in kept_epochs:
                kept[epoch] = jax.tree.map(np.asarray, dict(state.params))
        last = jax.tree.map(np.asarray, dict(state.params))
    return Training(read.with_arrays(last, read.buffers), kept, np.array(losses), np.array(accuracies))


def _check_numbers(epochs: Any, batch_size: Any, clients: Any, seed: Any, keep: Any) -> set[int]:
    for name, value, least, most in (
        ("epochs", epochs, 0, 10**6),
        ("batch_size", batch_size, 1, MOST),
        ("clients", clients, 1, MOST),
        ("seed", seed, 0, 2**63 - 1),
    ):
        whole(name, value, least, most, f"an integer >= {least}")
    try:
        kept = set(range(epochs + 1)) if keep is None else set(keep)
    except TypeError:
        raise InputError(f"keep must name epochs in 0..{epochs}, as [0, 5], got {shown(keep)}") from None
    for epoch in kept:
        if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or not 0 <= epoch <= epochs:
            raise InputError(f"keep must name epochs in 0..{epochs}, got {epoch!r}")
    return kept


def _check_fit(name: str, examples: Examples, model: Model) -> None:
    outputs = output_count(model, examples.images.shape[1:])
    low, high = examples.labels.min(), examples.labels.max()
    if low < 0 or high >= labels_of(outputs):
        known = labels_of(outputs) - 1
        raise InputError(f"{name}: labels are {low}..{high}, a model with {outputs} outputs has 0..{known}")
