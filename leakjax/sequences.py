"""`recover_tokens`: from the gradient of a model that takes ids of tokens to the ids."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.arguments import choice, listener, whole
from leakjax.attacks.sequences.candidates import GAP, Span, distances, find_candidates, read_span
from leakjax.attacks.sequences.reading import (
    TextModel,
    depend,
    influential,
    random_gradient,
    read_text_model,
    vocabulary_of,
)
from leakjax.attacks.sequences.search import Search, Sequences, alone, batches, find_sequences
from leakjax.attacks.sequences.targets import MOST_PAIRS, Client, Explained, explain
from leakjax.attacks.tolerances import Tolerances
from leakjax.errors import InputError
from leakjax.models.calls import Path
from leakjax.models.losses import UNKNOWN, LossSpec, labels_of
from leakjax.models.reader import Model, read_model
from leakjax.reconstruction import TokenReconstruction
from leakjax.runtime.precision import compute_in

TARGETS = ("class", "next")
_EXACTLY = float(np.finfo(np.float64).eps)
_INSIDE = 1e-6  # of a token's size: in float64 those inside a span end below 1e-10, others above 1e-3
_MARGIN = 10.0  # what tells sequences apart stands so far above what counts as matched
_MOST_RESIDUAL = 1e-2  # another label or id leaves as much as the gradient itself
_NO_BREAK = (
    "the distances of ids from the span of the tokens do not break off: this span, of rank {}, holds all or none; "
    "fewer tokens than their width tell more"
)
_SPANS = 5  # of the first reads: a block has four, and the next one's first sees all of it; later ones cost more
_NO_SPAN = (
    "no matrix that reads tokens one by one has a gradient whose columns are their span: they are as many as its width "
    f"or more, the singular values do not break off (by {GAP:.0f}), or the model hides most of its tokens from it"
)


def recover_tokens(
    model: Any,
    gradient: Mapping[str, Any],
    *,
    length: int,
    examples: int = 1,
    loss: LossSpec = "softmax_cross_entropy",
    target: str = "class",
    vocabulary: int | None = None,
    params: Any = None,
    call: Mapping[str, Any] | None = None,
    rngs: Mapping[str, int] | int | None = None,
    output: Path | None = None,
    train: bool | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> TokenReconstruction:
    """Read the ids of tokens off the gradient of B sequences, dL/dtheta with L the mean loss of the B.

    A matrix that reads tokens, v_t = K^T u_t, has the gradient sum_t u_t (dL/dv_t)^T, whose columns lie in the span of
    the tokens. Where they are fewer than their width, an id can stand at a position only if its token lies in it; later
    matrices tell which ids stand together in one sequence.

    Arguments:
    - `model`, `params`, `call`, `rngs`, `output`, `train`: as of `read_model`; it takes ids (B, T) and returns
      (B, classes), or (B, T, vocabulary) for `target` "next";
    - `gradient`: by parameter path, as `jax.grad` gives it for `read_model(model).params`; paths left out were not
      sent;
    - `length`: T, as the client padded it; `examples`: B;
    - `loss`: as of `observe`, or "unknown" (then labels and the gradient as a whole are not checked);
    - `target`: "class" where each sequence has a label, "next" where each output is compared with the next id, and a
      sequence's loss is the mean over its T - 1 outputs;
    - `vocabulary`: how many ids there are, where that is less than the rows of the table, or no table is looked up;
    - `seed`: of the random starts; `progress`: called with a few words at every stage.

    Returns a `TokenReconstruction`. Raises `InputError` for arguments that do not fit, `UnreadableModelError` for a
    model that does not run on ids.

    Reference: DAGER, Petrov et al., NeurIPS 2024, arXiv 2405.15586. Its span checks have thresholds set by hand, and
    its search through sequences without a causal mask is exponential; here the spectra set them, and real weights on
    the candidates are solved for.
    """
    length, examples = whole("length", length, 1), whole("examples", examples, 1)
    choice("target", target, TARGETS)
    vocabulary = None if vocabulary is None else whole("vocabulary", vocabulary, 2)
    seed = whole("seed", seed, 0)
    listener("progress", progress)
    tell = progress or (lambda stage: None)
    read = read_model(model, params, call=call, rngs=rngs, output=output, train=train)
    sent = _checked(gradient, read)
    rounding = max(float(jnp.finfo(np.asarray(g).dtype).eps) for g in gradient.values())
    with compute_in("float64"):
        wide = read.astype(np.float64)
        text = read_text_model(wide, length)
        words = vocabulary_of(text, vocabulary, sent)
        classes = _classes(text, wide, target, words)
        tell("reading where matrices meet tokens")
        client = (
            None
            if loss == UNKNOWN
            else Client(model=text, variables=wide.variables, loss=loss, target=target, paths=tuple(sent))
        )
        return _recover(text, wide, sent, client, target, examples, words, classes, seed, rounding, tell)


def _recover(
    text: TextModel,
    model: Model,
    gradient: Mapping[str, np.ndarray],
    client: Client | None,
    target: str,
    examples: int,
    vocabulary: int,
    classes: int,
    seed: int,
    rounding: float,
    tell: Callable[[str], None],
) -> TokenReconstruction:
    spans = _spans(text, gradient, examples, rounding)
    count = max([span.read for span in spans], default=0) + 1
    reads = depend(text, model.variables, vocabulary, count)
    ids, drawn = random_gradient(text, model.variables, tuple(gradient), examples, vocabulary, target)
    spans = _telling(text, model.variables, spans, ids, drawn)
    local = [span for span in spans if reads.local(span.read)]
    if not local:
        return _nothing(text, examples, _NO_SPAN)
    candidates = find_candidates(text, model.variables, gradient, reads, local, vocabulary, rounding)
    if candidates is None:
        return _nothing(text, examples, _NO_BREAK.format(local[0].rank), local[0])
    spans = [*local, *(span for span in spans if span not in local)]
    seen = influential(text, model.variables, vocabulary, target)
    allowed = tuple(ids if here else ids[:0] for ids, here in zip(candidates.allowed, seen, strict=True))
    search = Search(
        model=text,
        variables=model.variables,
        reads=reads,
        spans=tuple(spans),
        candidates=candidates._replace(allowed=allowed),
    )
    tell(f"{sum(map(len, allowed))} candidates at {len(search.open)} positions")
    if not search.open:
        return _nothing(text, examples, "no id has tokens in the span of the gradient's columns", local[0])
    found = find_sequences(search, examples, seed, tell)
    choices = batches(search, found.ids, examples)
    tolerances = Tolerances.of(np.float64, rounding)
    explained: list[Explained] = []
    if client is not None:
        each = (explain(client, gradient, ids, examples, classes) for ids in choices or [])
        explained = sorted((e for e in each if e is not None), key=lambda e: e.residual)
    most = read_span(text, drawn, local[0].read, examples * text.tokens.reads[local[0].read].tokens, _EXACTLY)
    generic = None if most is None else most.rank
    return _result(search, found, choices, explained, client, examples, tolerances, generic, classes)


def _spans(text: TextModel, gradient: Mapping[str, Any], examples: int, rounding: float) -> list[Span]:
    found: list[Span] = []
    for k, read in enumerate(text.tokens.reads):
        span = read_span(text, gradient, k, examples * read.tokens, rounding) if read.tokens > 1 else None
        found += [] if span is None else [span]
        if len(found) == _SPANS:
            break
    return found


def _telling(
    text: TextModel, variables: Any, spans: list[Span], ids: np.ndarray, drawn: Mapping[str, np.ndarray]
) -> list[Span]:
    """The spans with those of their rows whose tokens lie in them, as random sequences `ids` show by their own gradient
    `drawn`: behind the last attention of a pooled model most rows have none. A later span of fewer columns than such
    sequences have says nothing: some of its tokens drown in rounding."""
    found = []
    for span in spans:
        own = read_span(text, drawn, span.read, len(ids) * text.tokens.reads[span.read].tokens, _EXACTLY)
        if own is None:
            continue
        (each,) = distances(text, variables, [own], ids)
        rows = tuple(int(r) for r in np.flatnonzero(np.max(each, axis=0) <= _INSIDE))
        if rows and (not found or span.rank >= min(own.rank, found[0].rank)):
            found.append(span._replace(rows=rows))
    return found


def _result(
    search: Search,
    found: Sequences,
    choices: list[np.ndarray] | None,
    explained: list[Explained],
    client: Client | None,
    examples: int,
    tolerances: Tolerances,
    generic: int | None,
    classes: int,
) -> TokenReconstruction:
    def allowed(e: Explained) -> float:
        return min(tolerances.matched * max(1.0, 1.0 / e.pull), _MOST_RESIDUAL)

    matched = allowed(explained[0]) if explained else tolerances.matched
    fitting = [e for e in explained if e.residual <= allowed(e)]
    ids = fitting[0].ids if fitting else choices[0] if choices and len(choices) == 1 else found.ids[:0]
    ids = np.concatenate([ids, np.full((examples - len(ids), search.model.length), -1)])
    proof, reason = None, None
    if not len(found.ids):
        reason = "no sequence of the candidates lies in the spans of the later matrices"
    elif client is None:
        reason = "the loss is not known: what the spans tell was not compared with the gradient as a whole"
    elif not fitting:
        reason = _why(found, choices, explained, examples, matched, classes)
    elif len(fitting) > 1:
        reason = f"{len(fitting)} batches of sequences have this gradient"
    elif np.any(ids < 0):
        reason = "nothing behind the gradient was computed from the ids that are -1"
    elif tolerances.coarse:
        reason = "the client rounds so much that other sequences could have this gradient as well"
    elif fitting[0].least <= _MARGIN * allowed(fitting[0]):
        reason = "what was found has too small a part in the gradient: another sequence or label in its place fits too"
    elif not _covers(search, ids):
        reason = "ids whose rows have a gradient stand in no sequence that was found"
    elif found.all and len(found.ids) <= examples and search.spans[0].rank == generic:
        proof = "global"
    elif alone(search, found.ids):
        proof = "local"
    else:
        reason = "a sequence that differs in one token, or has its tokens in another order, lies in the spans as well"
    return TokenReconstruction(
        ids=ids,
        labels=fitting[0].labels if fitting else None,
        status="exact" if proof is not None else "ambiguous" if len(found.ids) else "failed",
        proof=proof,
        reason=reason,
        candidates=search.candidates.allowed,
        touched=search.candidates.touched,
        rank=search.spans[0].rank,
        gap=search.candidates.gap,
        gradient_residual=explained[0].residual if explained else None,
    )


def _why(
    found: Sequences,
    choices: list[np.ndarray] | None,
    explained: list[Explained],
    examples: int,
    matched: float,
    classes: int,
) -> str:
    """Why sequences do not explain a gradient."""
    if np.any(found.ids[:, :-1] < 0):
        return "at the positions of the ids that are -1 no matrix has a gradient that tells them"
    if choices is None:
        return f"{len(found.ids)} sequences lie in the spans, too many to try which {examples} of them were sent"
    if not explained:
        if len(found.ids) * classes > MOST_PAIRS:
            return f"labels were not read: {len(found.ids)} x {classes} gradients are more than {MOST_PAIRS}"
        return f"what was found, {len(found.ids)} of {examples} sequences, does not make up the gradient"
    return (
        f"the gradient of what was found differs by {explained[0].residual:.0e} of its size, more than {matched:.0e}: "
        "it is not that of this loss and target, a defense has changed it, or what tells the last ids was not sent"
    )


def _covers(search: Search, ids: np.ndarray) -> bool:
    """Whether every id whose row has a gradient stands in a sequence."""
    touched = search.candidates.touched
    return touched is None or set(touched.tolist()) <= set(ids.ravel().tolist())


def _nothing(text: TextModel, examples: int, reason: str, span: Span | None = None) -> TokenReconstruction:
    return TokenReconstruction(
        ids=np.full((examples, text.length), -1),
        labels=None,
        status="failed",
        proof=None,
        reason=reason,
        candidates=(),
        touched=None,
        rank=None if span is None else span.rank,
        gap=None,
        gradient_residual=None,
    )


def _checked(gradient: Any, model: Model) -> dict[str, np.ndarray]:
    """The gradient by path in float64, of known paths and their shapes."""
    if not isinstance(gradient, Mapping) or not gradient:
        raise InputError("gradient must be a mapping from parameter paths to arrays, as jax.grad gives it for params")
    found = {}
    for path, value in gradient.items():
        if isinstance(value, Mapping):
            raise InputError(f"gradient[{path!r}] is a mapping; pass one of paths, as {next(iter(model.params))!r}")
        if path not in model.params:
            near = ", ".join(list(model.params)[:3])
            raise InputError(f"gradient: the model has no parameter {path!r}; it has {near}, ...")
        a = np.asarray(value)
        if not jnp.issubdtype(a.dtype, jnp.floating) or a.shape != tuple(model.params[path].shape):
            wanted = tuple(model.params[path].shape)
            raise InputError(f"gradient[{path!r}] must be floating, of shape {wanted}, got {a.dtype} {a.shape}")
        found[path] = a.astype(np.float64)
        if not np.all(np.isfinite(found[path])):
            raise InputError(f"gradient[{path!r}] has entries that are not finite")
    return found


def _classes(text: TextModel, model: Model, target: str, vocabulary: int) -> int:
    """How many labels there are, checked against the outputs."""
    outputs = jax.eval_shape(
        text.outputs, dict(model.variables), jax.ShapeDtypeStruct((1, text.length), np.dtype(np.int32))
    ).shape
    if target == "class":
        if len(outputs) != 2:
            raise InputError(f"the model's outputs have shape {outputs}, and target 'class' compares (1, classes)")
        return labels_of(outputs[-1])
    if len(outputs) != 3 or outputs[1] != text.length or outputs[2] < vocabulary:
        raise InputError(
            f"the model's outputs have shape {outputs}, and target 'next' compares (1, {text.length}, {vocabulary})"
        )
    if text.length < 2:
        raise InputError("target 'next' compares outputs with the ids after them: length must be 2 or more")
    return 0
