"""Ids of tokens read off gradients, judged by the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import leakjax
from leakjax.attacks.sequences.candidates import distances, read_span
from leakjax.attacks.sequences.reading import depend, read_text_model

VOCABULARY, LENGTH, WIDTH, CLASSES = 60, 6, 32, 3


class Block(nnx.Module):
    def __init__(self, causal, rngs, width=WIDTH):
        self.causal = causal
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)])
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(self.norms[0](x)), 3, axis=-1)
        scores = jnp.einsum("bqd,bkd->bqk", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
        if self.causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:], bool))[None], scores, -1e9)
        x = x + self.out(jax.nn.softmax(scores) @ v)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Text(nnx.Module):
    """Two blocks; logits of the next id, by the table itself where `tied`, or of a class."""

    def __init__(self, *, causal, tied=False, positions=True, seed=0, depth=2, pooled="mean"):
        rngs = nnx.Rngs(seed)
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH))) if positions else None
        self.blocks = nnx.List([Block(causal, rngs) for _ in range(depth)])
        self.norm, self.causal, self.pooled = nnx.LayerNorm(WIDTH, rngs=rngs), causal, pooled
        self.head = None if tied else nnx.Linear(WIDTH, VOCABULARY if causal else CLASSES, rngs=rngs)

    def __call__(self, ids):
        x = self.table(ids)
        if self.positions is not None:
            x = x + self.positions[...][None]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.head is None:
            return self.table.attend(x)
        return self.head(x) if self.causal else self.head(x.mean(axis=1) if self.pooled == "mean" else x[:, 0])


def sent(network, ids, labels=None, dtype="float64"):
    """(model, the gradient of the mean loss that a client sends in `dtype`)."""
    with jax.enable_x64(True):
        model = leakjax.read_model(network).astype(dtype)
        ids = jnp.asarray(ids, jnp.int32)

        def loss(params):
            outputs = model.apply({**model.buffers, **params}, ids)
            if labels is not None:
                return optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.asarray(labels)).mean()
            return optax.softmax_cross_entropy_with_integer_labels(outputs[:, :-1], ids[:, 1:]).mean()

        return model, {p: np.asarray(g) for p, g in jax.grad(loss)(dict(model.params)).items()}


def random_ids(rng, examples):
    return rng.integers(0, VOCABULARY, (examples, LENGTH))


def same(found, ids, labels=None):
    """Whether the sequences, with their labels, are those of the client in any order."""
    rows = sorted(map(tuple, np.asarray(found.ids).tolist()))
    if labels is None:
        return rows == sorted(map(tuple, np.asarray(ids).tolist()))
    pairs = sorted(zip(map(tuple, found.ids.tolist()), np.asarray(found.labels).tolist(), strict=True))
    return pairs == sorted(zip(map(tuple, np.asarray(ids).tolist()), np.asarray(labels).tolist(), strict=True))


@pytest.mark.parametrize(
    ("examples", "tied", "dtype"), [(1, False, "float64"), (3, False, "float32"), (4, True, "float64")]
)
def test_next_token_sequences_come_back(rng, examples, tied, dtype):
    ids = random_ids(rng, examples)
    model, gradient = sent(Text(causal=True, tied=tied), ids, dtype=dtype)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=examples, target="next")
    assert found.status == "exact", found.reason
    assert same(found, ids)
    assert found.labels is None
    assert found.gap > 1e3
    assert (found.touched is None) == tied
    assert all(set(ids[:, t]) <= set(found.candidates[t].tolist()) for t in range(LENGTH - 1))


@pytest.mark.parametrize("examples", [1, 3])
def test_classified_sequences_come_back_with_their_labels(rng, examples):
    ids, labels = random_ids(rng, examples), np.array([2, 0, 2])[:examples]
    model, gradient = sent(Text(causal=False), ids, labels)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=examples)
    assert found.status == "exact", found.reason
    assert same(found, ids, labels)
    assert found.rank == examples * LENGTH
    assert found.proof == "global" or examples > 1


def test_candidates_in_plenty_are_solved_for(rng, monkeypatch):
    ids, labels = random_ids(rng, 3), np.array([1, 1, 0])
    model, gradient = sent(Text(causal=False), ids, labels)
    monkeypatch.setattr("leakjax.attacks.sequences.search.MOST_TRIED", 0)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=3)
    assert (found.status, found.proof) == ("exact", "local"), found.reason
    assert same(found, ids, labels)


def test_without_positions_a_causal_model_gives_the_order(rng):
    ids = rng.permutation(VOCABULARY)[:LENGTH][None]
    model, gradient = sent(Text(causal=True, positions=False), ids)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, target="next")
    assert found.status == "exact", found.reason
    assert same(found, ids)


@pytest.mark.parametrize("labels", [[1, 1], [1, 2]])
def test_a_sequence_that_stands_twice_is_found_twice(rng, labels):
    ids = np.repeat(random_ids(rng, 1), 2, axis=0)
    model, gradient = sent(Text(causal=False), ids, labels)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=2)
    assert same(found, ids, labels), found
    assert (found.status, found.proof) == ("exact", "local")  # fewer tokens than two others would have


@pytest.mark.parametrize("depth", [1, 2])
def test_models_that_read_one_token_alone_behind_their_last_attention(rng, depth):
    """Its output matrix has no gradient from the other rows, which do not lie in its span."""
    ids, labels = random_ids(rng, 2), np.array([1, 0])
    model, gradient = sent(Text(causal=False, depth=depth, pooled="first"), ids, labels)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=2)
    told = slice(0, LENGTH if depth == 2 else 1)
    assert sorted(found.ids[:, told].tolist()) == sorted(ids[:, told].tolist())
    assert found.status == "exact" if depth == 2 else "no matrix" in found.reason


def test_the_order_is_not_told_where_none_is_known(rng):
    """Every order has this gradient, and no bidirectional model without positions tells them apart."""
    ids = rng.permutation(VOCABULARY)[:LENGTH][None]
    model, gradient = sent(Text(causal=False, positions=False), ids, [1])
    found = leakjax.recover_tokens(model, gradient, length=LENGTH)
    assert found.status == "ambiguous"
    assert "order" in found.reason
    assert sorted(found.ids[0].tolist()) == sorted(ids[0].tolist())


def test_what_hardly_shows_is_not_replaced_by_a_copy_of_another(rng):
    """A sequence of a loss near zero beside one of a large loss: its tokens drown in rounding."""
    network = Text(causal=False)
    network.head.kernel[...] = network.head.kernel[...] * 30.0
    model = leakjax.read_model(network)
    ids = random_ids(rng, 40)
    logits = np.sort(np.asarray(model.apply(model.variables, jnp.asarray(ids))), axis=1)
    sure = np.argsort(logits[:, -1] - logits[:, -2])[-2:]
    best = np.asarray(model.apply(model.variables, jnp.asarray(ids[sure])))
    labels = np.array([best[0].argmax(), best[1].argsort()[-2]])
    model, gradient = sent(network, ids[sure], labels, "float32")
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=2)
    assert found.status != "exact"
    assert found.reason


def test_sequences_that_stand_twice_have_one_last_id(rng):
    ids = np.repeat(random_ids(rng, 1), 2, axis=0)
    model, gradient = sent(Text(causal=True), ids)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=2, target="next")
    assert found.status == "exact", found.reason
    assert same(found, ids)


def test_a_loss_that_is_nearly_zero_is_matched_by_its_own_digits(rng):
    network = Text(causal=False)
    network.head.bias[...] = jnp.array([12.0, 0.0, 0.0], jnp.float32)
    ids = random_ids(rng, 1)
    model, gradient = sent(network, ids, [0], dtype="float32")
    found = leakjax.recover_tokens(model, gradient, length=LENGTH)
    assert found.status == "exact", found.reason
    assert same(found, ids, [0])


def test_what_is_not_explained_is_not_called_exact(rng):
    ids, labels = random_ids(rng, 2), np.array([0, 1])
    model, gradient = sent(Text(causal=False), ids, labels)
    for change in ({"examples": 1}, {"loss": "softmax_cross_entropy:label_smoothing=0.2"}, {"loss": "unknown"}):
        found = leakjax.recover_tokens(model, gradient, **{"length": LENGTH, "examples": 2, **change})
        assert found.status != "exact", change
        assert found.reason
    noisy = {p: g + 1e-3 * np.max(np.abs(g)) * rng.normal(size=g.shape) for p, g in gradient.items()}
    found = leakjax.recover_tokens(model, noisy, length=LENGTH, examples=2)
    assert found.status == "failed"
    assert "break off" in found.reason
    assert np.all(found.ids == -1)


def test_as_many_tokens_as_the_width_hide_each_other(rng):
    ids = random_ids(rng, 6)  # 36 tokens, width 32
    model, gradient = sent(Text(causal=False), ids, np.zeros(6, int))
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=6)
    assert found.status == "failed"
    assert "fewer tokens than their width" in found.reason


def test_columns_lie_in_the_span_of_the_tokens_that_each_row_depends_on(rng):
    ids = random_ids(rng, 2)
    model, gradient = sent(Text(causal=True), ids)
    with jax.enable_x64(True):
        text = read_text_model(model, LENGTH)
        reads = depend(text, model.variables, VOCABULARY, 5)
        assert [reads.local(k) for k in range(5)] == [True, False, False, False, False]
        assert np.array_equal(reads.depends[4], np.tril(np.ones((LENGTH, LENGTH), bool)))
        assert [reads.own(k).tolist() for k in range(5)] == [list(range(LENGTH))] * 5
        (span,) = [s for s in [read_span(text, gradient, 4, 2 * LENGTH, 1e-16)] if s is not None]
        (each,) = distances(text, model.variables, [span], ids)
    assert span.rank == 2 * (LENGTH - 1)  # nothing is computed from the last id
    assert np.max(each[:, :-1]) < 1e-10 < 1e-2 < np.min(each[:, -1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 0}, "length must be"),
        ({"examples": 1.5}, "examples must be"),
        ({"target": "words"}, "next"),
        ({"target": "next"}, "target 'next' compares"),
        ({"vocabulary": 10**6}, "vocabulary must be at most 60"),
        ({"gradient": {}}, "gradient must be a mapping"),
        ({"gradient": {"head/none": np.zeros(3)}}, "no parameter 'head/none'"),
        ({"gradient": {"head/bias": np.zeros(4)}}, r"shape \(3,\)"),
        ({"gradient": {"head/bias": np.full(3, np.nan)}}, "not finite"),
        ({"loss": "no loss"}, "loss"),
    ],
)
def test_what_does_not_fit_is_refused(rng, change, words):
    model, gradient = sent(Text(causal=False), random_ids(rng, 1), [0])
    with pytest.raises(leakjax.InputError, match=words):
        leakjax.recover_tokens(model, **{"gradient": gradient, "length": LENGTH, **change})


def test_a_model_that_does_not_run_on_ids_says_so(rng):
    model = leakjax.read_model(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    gradient = {p: np.zeros(a.shape) for p, a in model.params.items()}
    with pytest.raises((leakjax.InputError, leakjax.UnreadableModelError)):
        leakjax.recover_tokens(model, gradient, length=5)


def test_random_texts_come_back_as_they_were():
    """Random networks, batches, vocabularies and precisions: whatever is called exact is right, and most is exact."""
    exact = 0
    for seed in range(100, 112):
        rng = np.random.default_rng(seed)
        causal, examples, words = bool(rng.integers(2)), int(rng.integers(1, 5)), int(rng.choice([5, VOCABULARY]))
        ids = rng.integers(0, words, (examples, LENGTH))
        labels = None if causal else rng.integers(0, CLASSES, examples)
        tied, positions = causal and bool(rng.integers(2)), not causal or bool(rng.integers(4))
        network = Text(causal=causal, tied=tied, positions=positions, seed=seed)
        model, gradient = sent(network, ids, labels, str(rng.choice(["float32", "float64"])))
        target = "next" if causal else "class"
        found = leakjax.recover_tokens(model, gradient, length=LENGTH, examples=examples, target=target)
        if found.status == "exact":
            exact += 1
            assert same(found, ids, labels), seed
    assert exact > 9


class Shifted(Text):
    """The row that is taken is the id and one more."""

    def __call__(self, ids):
        return super().__call__((ids + 1) % VOCABULARY)


def test_rows_that_are_not_the_ids_are_no_table_of_theirs(rng):
    ids = random_ids(rng, 1)
    model, gradient = sent(Shifted(causal=False), ids, [1])
    with pytest.raises(leakjax.InputError, match="vocabulary"):
        leakjax.recover_tokens(model, gradient, length=LENGTH)
    found = leakjax.recover_tokens(model, gradient, length=LENGTH, vocabulary=VOCABULARY)
    assert found.touched is None
    assert found.status == "exact", found.reason
    assert same(found, ids, [1])
