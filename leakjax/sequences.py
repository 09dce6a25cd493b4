"""`recover_tokens`: from the gradient of a model that takes ids of tokens to the ids."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from leakjax.arguments import choice, listener, whole
from leakjax.attacks.sequences.candidates import GAP, Span, find_candidates, read_span
from leakjax.attacks.sequences.reading import TextModel, depend, influential, read_text_model, vocabulary_of
from leakjax.attacks.sequences.search import Search, Sequences, alone, batches, find_sequences
from leakjax.attacks.sequences.targets import Client, Explained, explain
from leakjax.attacks.tolerances import Tolerances
from leakjax.errors import InputError
from leakjax.models.calls import Path
from leakjax.models.losses import UNKNOWN, LossSpec, labels_of
from leakjax.models.reader import Model, read_model
from leakjax.reconstruction import TokenReconstruction
from leakjax.runtime.precision import compute_in

TARGETS = ("class", "next")
_NO_BREAK = (
    "the distances of ids from the span of the tokens do not break off: this span, of rank {}, holds all or none; "
    "fewer tokens than their width tell more"
)
_SPANS = 5  # of the first reads: a block has four, and the next one's first sees all of it; later ones cost more
_SPAN = (
    f"the columns of no gradient show a span of tokens: their singular values do not break off (by {GAP:.0f}) before "
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
    rounding = max(float(np.finfo(np.asarray(g).dtype).eps) for g in gradient.values())
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
    spans = _spans(text, gradient, examples)
    count = max([span.read for span in spans], default=0) + 1
    reads = depend(text, model.variables, vocabulary, count)
    local = [span for span in spans if reads.local(span.read)]
    if not local:
        width = text.tokens.reads[0].width if text.tokens.reads and reads.local(0) else None
        where = "any width: no matrix reads tokens one by one" if width is None else f"the width of the first, {width}"
        return _nothing(text, examples, _SPAN + where)
    candidates = find_candidates(text, model.variables, gradient, reads, local, vocabulary)
    if candidates is None:
        return _nothing(text, examples, _NO_BREAK.format(local[0].rank), local[0])
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
    found = find_sequences(search, examples, seed, tell)
    choices = batches(search, found.ids, examples)
    matched = Tolerances.of(np.float64, rounding).matched
    explained: list[Explained] = []
    if client is not None:
        each = (explain(client, gradient, ids, examples, classes) for ids in choices or [])
        explained = sorted((e for e in each if e is not None), key=lambda e: e.residual)
    return _result(search, found, choices, explained, client, examples, matched)


def _spans(text: TextModel, gradient: Mapping[str, Any], examples: int) -> list[Span]:
    found: list[Span] = []
    for k, read in enumerate(text.tokens.reads):
        span = read_span(text, gradient, k, examples * read.tokens) if read.tokens > 1 else None
        found += [] if span is None else [span]
        if len(found) == _SPANS:
            break
    return found


def _result(
    search: Search,
    found: Sequences,
    choices: list[np.ndarray] | None,
    explained: list[Explained],
    client: Client | None,
    examples: int,
    matched: float,
) -> TokenReconstruction:
    fitting = [e for e in explained if e.residual <= matched]
    ids = fitting[0].ids if fitting else choices[0] if choices and len(choices) == 1 else found.ids[:0]
    ids = np.concatenate([ids, np.full((examples - len(ids), search.model.length), -1)])
    proof, reason = None, None
    if not len(found.ids):
        reason = "no sequence of the candidates lies in the spans of the later matrices"
    elif client is None:
        reason = "the loss is not known: what the spans tell was not compared with the gradient as a whole"
    elif not fitting:
        reason = _why(found, choices, explained, examples, matched)
    elif len(fitting) > 1:
        reason = f"{len(fitting)} batches of sequences have this gradient"
    elif np.any(ids < 0):
        reason = "nothing behind the gradient was computed from the ids that are -1"
    elif found.all and search.spans[0].rank == _most(search, client, examples):
        proof = "global"
    elif alone(search, found.ids):
        proof = "local"
    else:
        reason = "a sequence that differs in one token lies in the spans as well"
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
    found: Sequences, choices: list[np.ndarray] | None, explained: list[Explained], examples: int, matched: float
) -> str:
    """Why sequences do not explain a gradient."""
    if choices is None:
        return f"{len(found.ids)} sequences lie in the spans, too many to try which {examples} of them were sent"
    if not explained:
        return f"{len(found.ids)} sequences were found, and they do not make up a gradient of {examples}"
    return (
        f"the gradient of what was found differs by {explained[0].residual:.0e} of its size, more than {matched:.0e}: "
        "it is not that of this loss and target, or a defense has changed it"
    )


def _most(search: Search, client: Client, examples: int) -> int:
    """The rank that the first span has of random sequences: no others can have more tokens than that."""
    span, generator = search.spans[0], np.random.default_rng(0)
    size = max(int(ids.max(initial=0)) for ids in search.candidates.allowed) + 1
    ids = generator.integers(0, size, (examples, search.model.length))
    mean = client.mean(ids, np.zeros(examples, int))
    found = read_span(search.model, mean, span.read, examples * search.model.tokens.reads[span.read].tokens)
    return -1 if found is None else found.rank


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
        if path not in model.params:
            near = ", ".join(list(model.params)[:3])
            raise InputError(f"gradient: the model has no parameter {path!r}; it has {near}, ...")
        a = np.asarray(value)
        if not np.issubdtype(a.dtype, np.floating) or a.shape != tuple(model.params[path].shape):
            wanted = tuple(model.params[path].shape)
            raise InputError(f"gradient[{path!r}] must be floating, of shape {wanted}, got {a.dtype} {a.shape}")
        if not np.all(np.isfinite(a)):
            raise InputError(f"gradient[{path!r}] has entries that are not finite")
        found[path] = a.astype(np.float64)
    return found


def _classes(text: TextModel, model: Model, target: str, vocabulary: int) -> int:
    """How many labels there are, checked against the outputs."""
    import jax

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
