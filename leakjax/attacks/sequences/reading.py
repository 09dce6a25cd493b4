"""A model that takes ids of tokens: where its matrices read them, and which of them a read can tell of.

Which ids a row of a read depends on is tried with random ids; on one alone, as before any attention; on those up to its
own, as behind a causal one; or on all.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from leakjax.errors import InputError, UnreadableModelError, first_line
from leakjax.models.reader import Arrays, Model
from leakjax.runtime.arrays import to_device
from leakjax.runtime.programs import keep
from leakjax.segments.tracing import evaluation, jaxprs
from leakjax.segments.tracing.lookups import Lookups, read_lookups
from leakjax.segments.tracing.rules import RULES
from leakjax.segments.tracing.tokens import Tokens, read_tokens

BLOCK, TOGETHER = 128, 32  # sequences a call, and at once: their hidden layers stand in memory together
_PROBES = 2  # random sequences: a weight of attention may vanish for one of them
_SEEN = 1e-10  # of a read's largest entry: what an id changes stands far above rounding, what it does not is zero


@dataclasses.dataclass(frozen=True, eq=False)
class TextModel:
    """One architecture at one length: `outputs(variables, ids (1, T))`, its `tokens` and `lookups`."""

    outputs: Any
    tokens: Tokens
    lookups: Lookups
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Reads:
    """`depends[k]` (rows of read k, T): the ids that each row depends on."""

    depends: tuple[Bool[np.ndarray, "rows T"], ...]

    def own(self, read: int) -> Int[np.ndarray, " rows"]:
        """The last position that each row depends on, -1 for rows that no id changes (a class token)."""
        seen = self.depends[read]
        return np.where(seen.any(1), seen.shape[1] - 1 - np.argmax(seen[:, ::-1], axis=1), -1)

    def local(self, read: int) -> bool:
        """Whether every row depends on one id at most, and some on one."""
        counts = self.depends[read].sum(1)
        return bool(counts.max() == 1)

    def causal(self, read: int) -> bool:
        """Whether there is a row for the ids up to each position and no later one."""
        return len(set(self.own(read).tolist()) - {-1}) > 1


def read_text_model(model: Model, length: int) -> TextModel:
    """Trace a model for ids (1, `length`). `UnreadableModelError` where it does not run or no matrix meets tokens."""
    return _read(model.apply, model.structs, length)


@keep(16)
def _read(apply: Any, structs: Any, length: int) -> TextModel:
    arrays = {path: jax.ShapeDtypeStruct(shape, kind) for path, shape, kind in structs}
    paths = list(arrays)
    try:
        graph = jaxprs.trace_by_path(apply, arrays, jax.ShapeDtypeStruct((1, length), jnp.int32))
    except (InputError, UnreadableModelError):
        raise
    except Exception as error:
        raise UnreadableModelError(
            f"the model does not run on ids of shape (1, {length}): {first_line(error)}"
        ) from error
    equations = graph.needed(graph.output, [*graph.variables, graph.input])

    def outputs(variables: Arrays, ids: Int[Any, "1 T"]) -> Float[Any, "1 ..."]:
        env = {i: variables[path] for i, path in zip(graph.variables, paths, strict=True)}
        return evaluation.evaluate(equations, {**env, graph.input: ids}, graph.output, RULES)

    return TextModel(outputs, read_tokens(graph, paths), read_lookups(graph, paths), length)


@keep(16)
def _values_program(model: TextModel, count: int) -> Any:
    """Compiled: (variables, ids (BLOCK, T)) -> the tokens of the first `count` reads, (BLOCK, rows, width) each."""

    def one(variables: Arrays, ids: Any) -> Any:
        return model.tokens.values(variables, ids[None], count)

    return jax.jit(lambda variables, ids: jax.lax.map(lambda each: one(variables, each), ids, batch_size=TOGETHER))


def depend(model: TextModel, variables: Arrays, vocabulary: int, count: int) -> Reads:
    """Which ids each row of the first `count` reads depends on: random sequences, each id exchanged for another."""
    generator = np.random.default_rng(0)
    seen: list[Any] = [None] * count
    for _ in range(_PROBES):
        others = _exchanged(generator, vocabulary, model.length)
        for k, u in enumerate(tokens_of(model, variables, others, count)):
            moved = _SEEN * np.max(np.abs(u)) < np.max(np.abs(u[:-1] - u[-1:]), axis=2).T
            seen[k] = moved if seen[k] is None else seen[k] | moved
    return Reads(tuple(seen))


def influential(model: TextModel, variables: Arrays, vocabulary: int, target: str) -> Bool[np.ndarray, " T"]:
    """Whether the outputs that a loss compares depend on each id: of the next token, not the last output."""
    generator, found = np.random.default_rng(1), np.zeros(model.length, bool)
    run = _outputs_program(model)
    for _ in range(_PROBES):
        exchanged = _exchanged(generator, vocabulary, model.length)
        outputs = [np.asarray(run(dict(variables), to_device(one[None].astype(np.int32))))[0] for one in exchanged]
        z = np.stack([o[:-1] if target == "next" else o for o in outputs]).reshape(len(outputs), -1)
        found |= np.max(np.abs(z[:-1] - z[-1:]), axis=1) > _SEEN * np.max(np.abs(z))
    return found


@keep(16)
def _outputs_program(model: TextModel) -> Any:
    return jax.jit(model.outputs)


def random_gradient(
    model: TextModel, variables: Arrays, paths: Sequence[str], examples: int, vocabulary: int, target: str
) -> tuple[Int[np.ndarray, "B T"], dict[str, np.ndarray]]:
    """Random sequences, and a gradient of theirs by `paths`: of outputs weighted at random, as a loss weighs them."""
    generator = np.random.default_rng(2)
    ids = generator.integers(0, vocabulary, (examples, model.length))
    shape = (1, *jax.eval_shape(model.outputs, dict(variables), to_device(ids[:1].astype(np.int32))).shape[1:])
    program, total = _weighted_program(model, tuple(paths)), dict.fromkeys(paths, 0.0)
    for one in ids:
        weights = generator.normal(size=shape)
        if target == "next":
            weights[:, -1] = 0.0
        part = program(dict(variables), to_device(one[None].astype(np.int32)), to_device(weights))
        total = {p: total[p] + np.asarray(part[p], np.float64) for p in paths}
    return ids, {p: np.asarray(a) for p, a in total.items()}


@keep(16)
def _weighted_program(model: TextModel, paths: tuple[str, ...]) -> Any:
    def total(params: Arrays, variables: Arrays, ids: Array, weights: Array) -> Array:
        return jnp.sum(weights * model.outputs({**variables, **params}, ids))

    def gradient(variables: Arrays, ids: Array, weights: Array) -> Any:
        return jax.grad(total)({p: variables[p] for p in paths}, variables, ids, weights)

    return jax.jit(gradient)


def _exchanged(generator: np.random.Generator, vocabulary: int, length: int) -> Int[np.ndarray, "T+1 T"]:
    """A random sequence, last, and before it the same with one id exchanged at each position."""
    base = generator.integers(0, vocabulary, length)
    found, index = np.repeat(base[None], length + 1, axis=0), np.arange(length)
    found[index, index] = (base + 1 + generator.integers(0, vocabulary - 1, length)) % vocabulary
    return found


def tokens_of(
    model: TextModel, variables: Arrays, ids: Int[np.ndarray, "n T"], count: int
) -> tuple[Float[np.ndarray, "n rows width"], ...]:
    """The tokens of sequences at the first `count` reads."""
    program, arrays = _values_program(model, count), dict(variables)
    return tuple(in_blocks(lambda block: program(arrays, block), ids))


def in_blocks(
    program: Callable[[Int[Array, "BLOCK T"]], Sequence[Array]], ids: Int[np.ndarray, "n T"]
) -> list[np.ndarray]:
    """What a program says of sequences, `BLOCK` of them a call: it is compiled for that number alone."""
    parts = []
    for start in range(0, len(ids), BLOCK):
        part = ids[start : start + BLOCK]
        padded = np.concatenate([part, np.repeat(part[:1], BLOCK - len(part), axis=0)]).astype(np.int32)
        parts.append([np.asarray(a)[: len(part)] for a in program(to_device(padded))])
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def vocabulary_of(model: TextModel, given: int | None, parameters: Mapping[str, Any]) -> int:
    """How many ids there are: the rows of the smallest table that the ids take, or what is `given`."""
    rows = min((table.rows for table in model.lookups.tables), default=None)
    if given is None and rows is None:
        others = ", ".join(map(repr, model.lookups.others))
        if others:
            raise InputError(
                f"{others} is looked up by other integers than the ids; where the model shifts them itself, pass it "
                "without the shift, and length + 1; else pass vocabulary, how many ids there are"
            )
        raise InputError("no table of the model is looked up by ids; pass vocabulary, how many ids there are")
    if given is not None and rows is not None and given > rows:
        raise InputError(f"vocabulary must be at most {rows}, the rows of {model.lookups.tables[0].path}, got {given}")
    return int(given if given is not None else rows)  # type: ignore[arg-type]
