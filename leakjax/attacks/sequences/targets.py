"""What a gradient says besides of sequences that are known: their labels, how often each stands in it, last ids.

    g = (1/B) sum_b g(ids_b, y_b) = sum_(s, y) c_sy g(s, y),      sum c = 1

is linear in the shares c >= 0 of every sequence s with every label y, and c B are whole numbers. (Without c >= 0 it
would not tell: the cross-entropy's g(s, y), weighted by the model's own probabilities of y, add up to zero.) An id that
no output is computed from is a target of the next-token loss alone, whose gradient is linear in the one-hot vector of
that target.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from scipy.optimize import nnls

from leakjax.attacks.sequences.reading import TextModel
from leakjax.models.losses import LossSpec, read_loss
from leakjax.models.reader import Arrays
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep

_MOST_REPEATS = 64  # ways in which sequences may stand several times
_ROUNDS = 6  # of last ids that tables shared with the input blur: the second was enough wherever one was wrong
_ROWS_EACH = 8  # equations for each unknown share: the rank of fewer may be short
_ROWS = 30_000  # equations at least, where there are as many: those of biases alone, in float32, are badly conditioned
MOST_PAIRS = 1024  # of sequences and labels: each takes a gradient


class Explained(NamedTuple):
    """`ids` (B, T), `labels` (B,) or None where there are none, `residual` = ||g(ids, labels) - g|| / ||g||.

    `pull`: the largest ||dL/d(outputs)|| of a sequence. The client rounds its probabilities to u, and so this to u over
    its size: of a loss that is nearly zero the gradient has few digits. `least`: the least share of ||g|| that a
    sequence with its label has in it, or that tells it from another one with another label.
    """

    ids: Int[np.ndarray, "B T"]
    labels: Int[np.ndarray, " B"] | None
    residual: float
    pull: float
    least: float


class _Programs(NamedTuple):
    """Compiled, of (variables, ids (1, T), label ()): the gradient of one sequence's loss by parameters, and the norm
    of that by its outputs."""

    gradient: Callable[..., Any]
    pull: Callable[..., Any]


@keep(16)
def _programs(model: TextModel, loss: LossSpec, target: str, paths: tuple[str, ...]) -> _Programs:
    one = read_loss(loss)

    def of_outputs(outputs: Array, ids: Array, label: Array) -> Array:
        if target == "class":
            return one(outputs[0], label)
        return jnp.mean(jax.vmap(one)(outputs[0, :-1], ids[0, 1:]))

    def loss_of(params: Arrays, variables: Arrays, ids: Array, label: Array) -> Array:
        return of_outputs(model.outputs({**variables, **params}, ids), ids, label)

    def gradient(variables: Arrays, ids: Array, label: Array) -> dict[str, Array]:
        return jax.grad(loss_of)({path: variables[path] for path in paths}, variables, ids, label)

    def pull(variables: Arrays, ids: Array, label: Array) -> Array:
        return jnp.linalg.norm(jnp.ravel(jax.grad(of_outputs)(model.outputs(variables, ids), ids, label)))

    return _Programs(jax.jit(gradient), jax.jit(pull))


class Client(NamedTuple):
    """How the gradient was computed: the model, its weights, the loss, what it compares outputs with, and the `paths`
    of what was sent."""

    model: TextModel
    variables: Arrays
    loss: LossSpec
    target: str
    paths: tuple[str, ...]

    def gradient(self, ids: Any, label: int = 0) -> dict[str, np.ndarray]:
        """Of one sequence (T,)."""
        found = self._run.gradient(dict(self.variables), *self._given(ids, label))
        return {p: np.asarray(a, np.float64) for p, a in found.items()}

    def pull(self, ids: Any, label: int) -> float:
        """The norm of dL/d(outputs) of one sequence."""
        return float(self._run.pull(dict(self.variables), *self._given(ids, label)))

    @property
    def _run(self) -> _Programs:
        return _programs(self.model, self.loss, self.target, self.paths)

    def _given(self, ids: Any, label: int) -> tuple[Array, Array]:
        return to_device(np.asarray(ids, np.int32)[None]), to_device(np.int32(label))

    def mean(self, ids: Any, labels: Any) -> dict[str, np.ndarray]:
        """Of a batch (B, T)."""
        parts = [self.gradient(one, label) for one, label in zip(ids, labels, strict=True)]
        return {p: np.mean([part[p] for part in parts], axis=0) for p in self.paths}


def explain(
    client: Client, gradient: Mapping[str, np.ndarray], ids: np.ndarray, examples: int, classes: int
) -> Explained | None:
    """The batch of `examples` that sequences `ids` (n, T) make up; None where no whole numbers of them do.

    Ids that nothing tells, -1, are the last ones of each, and targets alone.
    """
    if not 0 < len(ids) <= examples:
        return None
    if client.target == "class":
        return _with_labels(client, gradient, ids, examples, classes)
    return _with_last(client, gradient, ids, examples)


def _with_labels(
    client: Client, gradient: Mapping[str, np.ndarray], ids: np.ndarray, examples: int, classes: int
) -> Explained | None:
    known = np.where(ids < 0, 0, ids)
    pairs = [(s, y) for s in range(len(ids)) for y in range(classes)]
    if len(pairs) > MOST_PAIRS:
        return None
    paths = _enough(gradient, max(_ROWS_EACH * len(pairs), _ROWS))
    columns = np.stack([_flat(client.gradient(known[s], y), paths) for s, y in pairs], axis=1)
    size = np.linalg.norm(columns)
    if not size > 0:
        return None
    flat = _flat(gradient, paths)
    rows = np.concatenate([columns / size, np.ones((1, len(pairs)))])
    shares = nnls(rows, np.append(flat / size, 1.0))[0] * examples
    counts = np.rint(shares).astype(int)
    if counts.sum() != examples:
        return None
    chosen = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    found, labels = ids[[s for s, _ in chosen]], np.array([y for _, y in chosen])
    told = _compared(client, gradient, found, labels)._replace(labels=labels)
    return told._replace(least=min(told.least, _telling(columns, counts) / (examples * np.linalg.norm(flat))))


def _telling(columns: np.ndarray, counts: np.ndarray) -> float:
    """The least distance of a column that is taken from one that is not."""
    taken, others = columns[:, counts > 0].T, columns[:, counts == 0]
    far = [np.min(np.linalg.norm(others - one[:, None], axis=0), initial=np.inf) for one in taken]
    return float(min(far))


def _enough(gradient: Mapping[str, np.ndarray], rows: int) -> list[str]:
    """The smallest parameters that have so many entries together, or all."""
    paths, entries = [], 0
    for path in sorted((p for p in gradient if np.any(gradient[p])), key=lambda p: gradient[p].size):
        paths, entries = [*paths, path], entries + gradient[path].size
        if entries >= rows:
            break
    return paths


def _flat(arrays: Mapping[str, np.ndarray], paths: Sequence[str]) -> np.ndarray:
    return np.concatenate([np.ravel(arrays[p]) for p in paths])


def _compared(client: Client, gradient: Mapping[str, np.ndarray], ids: np.ndarray, labels: Any) -> Explained:
    paths, known = list(gradient), np.where(ids < 0, 0, ids)
    parts = [client.gradient(one, label) for one, label in zip(known, labels, strict=True)]
    flat, each = _flat(gradient, paths), np.stack([_flat(part, paths) for part in parts]) / len(parts)
    size = float(np.linalg.norm(flat))
    return Explained(
        ids=ids,
        labels=None,
        residual=float(np.linalg.norm(each.sum(0) - flat)) / size,
        pull=max(client.pull(one, label) for one, label in zip(known, labels, strict=True)),
        least=float(np.min(np.linalg.norm(each, axis=1))) / size,
    )


def _with_last(client: Client, gradient: Mapping[str, np.ndarray], ids: np.ndarray, examples: int) -> Explained | None:
    """The last id of each sequence is the row of the output layer that is missing from the gradient of all others."""
    if np.any(ids[:, :-1] < 0):
        return None
    if len(ids) < examples:
        repeats = itertools.combinations_with_replacement(range(len(ids)), examples - len(ids))
        batches = (ids[[*range(len(ids)), *more]] for more in itertools.islice(repeats, _MOST_REPEATS))
        each = [e for e in (_with_last(client, gradient, batch, examples) for batch in batches) if e is not None]
        return min(each, key=lambda e: e.residual, default=None)
    labels, guess = np.zeros(examples, int), np.where(ids < 0, 0, ids)
    if np.any(ids[:, -1] < 0):
        for _ in range(_ROUNDS):
            last = np.where(ids[:, -1] < 0, _targets(client, gradient, guess), guess[:, -1])
            if np.array_equal(last, guess[:, -1]):
                break
            guess[:, -1] = last
    return _compared(client, gradient, guess, labels)


def _targets(client: Client, gradient: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Better last ids (B,) than those of `ids`.

    The gradient of an output layer has the row sum_t (p_t - [id_(t+1) = v]) h_t for the id v, and h_(T-1) is what
    another last id changes there. A table that is looked up as well changes in the rows of the sequence's ids besides,
    less so the more last ids are right.
    """
    new = next((v for v in range(_outputs(client)) if v not in ids), 0)  # its row is no token's, but in small tables
    other = ids.copy()
    other[:, -1] = new
    places = [(p, k) for p in gradient for k, n in enumerate(gradient[p].shape) if n == _outputs(client)]
    here = [client.gradient(one) for one in ids]
    there = [client.gradient(one) for one in other]

    def by_id(arrays: Mapping[str, np.ndarray], place: tuple[str, int]) -> np.ndarray:
        a = np.moveaxis(arrays[place[0]], place[1], 0)
        return a.reshape(len(a), -1)

    def apart(place: tuple[str, int]) -> tuple[float, int]:
        """The share of what moved that stands in the rows of both ids, as in an output layer alone; and its size."""
        moved = by_id(here[0], place) - by_id(there[0], place)
        both = np.linalg.norm(moved[[ids[0, -1], new]])
        return round(float(both / (np.linalg.norm(moved) or np.inf)), 6), moved.size

    place = max(places, key=apart, default=None)
    if place is None or not apart(place)[0] > 0:
        return ids[:, -1]
    hidden = np.stack([(by_id(a, place) - by_id(b, place))[new] for a, b in zip(here, there, strict=True)]) / len(ids)
    rest = np.mean([by_id(a, place) for a in here], axis=0) - by_id(gradient, place)
    shares = np.linalg.lstsq(hidden.T, rest.T, rcond=None)[0]
    shares[np.arange(len(ids)), ids[:, -1]] += 1.0  # what stands there now
    return np.argmax(shares, axis=1)


def _outputs(client: Client) -> int:
    ids = jax.ShapeDtypeStruct((1, client.model.length), jnp.int32)
    return jax.eval_shape(client.model.outputs, dict(client.variables), ids).shape[-1]
