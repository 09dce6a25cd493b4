"""Models as published: how they are called, what they return, and whose classes they are; judged by the truth."""

import sys
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from small_nets import one_layer

import leakjax
from leakjax import InputError
from leakjax.cli.calling import calling
from leakjax.cli.options import ModelOptions
from leakjax.errors import cannot_run
from leakjax.guard import loss_of
from leakjax.metrics import psnr
from leakjax.models.calls import read_call
from leakjax.segments.tail import without_tail

SHAPE = (8, 8, 3)
LABELS = np.array([1, 3])


@pytest.fixture
def images(rng):
    return rng.uniform(0.1, 0.9, (2, *SHAPE))


@pytest.fixture
def grey(rng):
    return rng.uniform(0.1, 0.9, (2, 6, 6, 1))


def comes_back(model, images, **how):
    """Whether `invert` returns the images and labels, and every certificate is `exact`."""
    result = leakjax.invert(leakjax.observe(model, (images, LABELS), **how))
    assert [c.status for c in result.certificates] == ["exact", "exact"]
    assert result.labels.tolist() == LABELS.tolist()
    return min(float(psnr(a, b)) for a, b in zip(result.images, images, strict=True)) > 200


class Trained(linen.Module):
    """Batch norm and dropout behind a flag without a default, and several outputs."""

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(12, (3, 3), strides=2)(x)
        x = jnp.tanh(linen.BatchNorm(use_running_average=not train)(x)).reshape(len(x), -1)
        logits = linen.Dense(5)(linen.Dropout(0.2, deterministic=not train)(x))
        return {"logits": logits, "features": [2 * logits]}


@pytest.fixture
def trained():
    module = Trained()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return module, module.init(keys, jnp.zeros((1, *SHAPE)), train=False)


@pytest.mark.parametrize("output", ["logits", ("features", 0)])
def test_a_linen_module_is_called_as_it_was_published(trained, output, images):
    assert comes_back(trained, images, call={"train": False}, output=output)


def test_what_is_missing_is_named_in_the_callers_words(trained, images):
    batch = images, LABELS
    for how, words in (
        ({}, r"call=\{'train': False\} \(--call train=False\)"),
        ({"call": {"train": False}}, r"output='logits' \(1, 5\)"),
        ({"call": {"train": False}, "output": "logit"}, "output 'logit' is not among what the model returns"),
        ({"call": {"train": False}, "output": ("logits", 0)}, "the path is too long"),
        ({"call": {"train": False}, "output": ("features", "count")}, "'count' is not among"),
        ({"call": {"train": True}, "output": "logits"}, r"rngs=\{'dropout': 0\} \(--rngs dropout=0\)"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            leakjax.observe(trained, batch, **how)
        assert len(str(caught.value).splitlines()) == 1


def test_audit_and_guard_take_the_same_arguments(trained, images):
    how: dict[str, Any] = {"call": {"train": False}, "output": "logits"}
    assert leakjax.audit(trained, SHAPE, shapes_only=True, **how).structural_leaked_dimensions == 192
    read = leakjax.read_model(trained, **how)
    value = loss_of(trained, **how)(read.params, jnp.asarray(images, jnp.float32), jnp.asarray(LABELS))
    logits = read.apply(read.variables, jnp.asarray(images, jnp.float32))
    expected = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), LABELS])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 12, (3, 3), strides=2, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(192, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(jnp.tanh(self.conv(x)).reshape(len(x), -1)))


def test_dropout_is_read_where_its_key_is_known(images):
    model = Dropped(nnx.Rngs(0))
    observation = leakjax.observe(model, (images, LABELS))
    with pytest.raises(InputError, match="pass its seed"):
        leakjax.invert(observation)
    with pytest.raises(InputError, match="no random stream 'drop'; it has default"):
        leakjax.observe(model, (images, LABELS), rngs={"drop": 5})
    assert comes_back(model, images, rngs={"default": 5})
    one, again, other = (leakjax.observe(model, (images, LABELS), rngs=seed) for seed in (5, {"default": 5}, 6))
    np.testing.assert_array_equal(one.gradients["head/kernel"], again.gradients["head/kernel"])
    assert np.max(np.abs(one.gradients["head/kernel"] - other.gradients["head/kernel"])) > 1e-3


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 12, 3, 2, 1, key=first)
        self.drop, self.head = eqx.nn.Dropout(0.2), eqx.nn.Linear(192, 5, key=second)

    def __call__(self, x, key=None):
        return self.head(self.drop(jnp.tanh(self.conv(x)).ravel(), key=key))


class Stateful(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 12, 3, 2, 1, key=first)
        self.norm = eqx.nn.BatchNorm(12, axis_name="batch", mode="batch")
        self.head = eqx.nn.Linear(192, 5, key=second)

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.head(jnp.tanh(x).ravel()), state


def test_equinox_modules_take_channels_first(images):
    module = Equinox(jax.random.key(0))
    with pytest.raises(InputError, match='layout="NCHW"'):
        leakjax.observe(module, (images, LABELS))
    with pytest.raises(InputError, match="pass the seed"):
        leakjax.observe(module, (images, LABELS), layout="NCHW")
    assert comes_back(eqx.nn.inference_mode(module), images, layout="NCHW")
    assert comes_back(module, images, layout="NCHW", rngs=0)
    with pytest.raises(InputError, match="takes one key"):
        leakjax.observe(module, (images, LABELS), layout="NCHW", rngs={"a": 1, "dropout": 2})
    model, state = eqx.nn.make_with_state(Stateful)(jax.random.key(0))
    assert comes_back((eqx.nn.inference_mode(model), state), images, layout="NCHW")


def test_maps_of_a_model_of_channels_first_are_turned_back(images):
    function = lambda params, x: x * params["w"][None, :, None, None]  # noqa: E731
    read = leakjax.read_model((function, {"w": np.array([1.0, 2.0, 3.0])}), layout="NCHW")
    np.testing.assert_allclose(read.apply(read.params, jnp.asarray(images)), images * [1, 2, 3], rtol=1e-6)


class Transformed(NamedTuple):
    """As `haiku.transform` returns it."""

    init: Any
    apply: Any


class TransformedWithState(NamedTuple):
    init: Any
    apply: Any


def test_haiku_transforms(rng, grey):
    apply, params = one_layer(rng, 5)

    def keyed(weights, rng, x, is_training=False):
        out = apply(weights, x)
        if is_training:
            if rng is None:
                raise ValueError("You must pass a non-None PRNGKey to init and/or apply.")
            out = out + jax.random.normal(rng, out.shape)
        return out

    assert comes_back((Transformed(None, lambda params, x: apply(params, x)), params), grey)
    assert comes_back((Transformed(None, keyed), params), grey)
    assert comes_back((Transformed(None, keyed), params), grey, call={"is_training": True}, rngs=3)
    with pytest.raises(InputError, match="rngs="):
        leakjax.observe((Transformed(None, keyed), params), (grey, LABELS), call={"is_training": True})
    stateful = TransformedWithState(None, lambda p, state, rng, x: (apply(p, x + state["shift"][0]), state))
    assert comes_back((stateful, (params, {"shift": np.full(1, 0.1)})), grey)
    with pytest.raises(InputError, match=r"\(transform, \(params, state\)\)"):
        leakjax.observe((stateful, params), (grey, LABELS))
    with pytest.raises(InputError, match="what its init returned"):
        leakjax.observe(Transformed(None, keyed), (grey, LABELS))


def test_transformers_flax_classes(trained, images):
    class Pretrained:
        """The module with its weights beside it."""

        module, params = trained[0], trained[1]

    assert comes_back(Pretrained(), images, call={"train": False}, output="logits")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail", [jax.nn.log_softmax, jax.nn.softmax])
def test_a_softmax_at_the_end_is_part_of_the_loss(tail, bias, rng, grey):
    apply, params = one_layer(rng, 5, bias=bias)
    model = (lambda p, x: tail(apply(p, x))), params
    own = lambda outputs, label: -outputs[label] if tail is jax.nn.log_softmax else -jnp.log(outputs[label])  # noqa: E731
    for loss in ("softmax_cross_entropy", own):
        observation = leakjax.observe(model, (grey, LABELS), loss=loss)
        result = leakjax.invert(observation)
        assert [c.status for c in result.certificates] == ["exact", "exact"]
        assert result.labels.tolist() == LABELS.tolist()
        assert min(float(psnr(a, b)) for a, b in zip(result.images, grey, strict=True)) > 150
        assert len(result.layers[0]) == 2


TAILS = {
    "one example alone": lambda z: jnp.broadcast_to(z[:1], z.shape),
    "less their mean": lambda z: z - 0.5 * z.mean(0, keepdims=True),
    "with another": lambda z: z + 0.5 * jnp.flip(z, 0),
}


@pytest.mark.parametrize("mix", TAILS.values(), ids=TAILS)
def test_a_tail_that_mixes_its_examples_is_no_part_of_the_loss(mix, rng, grey):
    apply, params = one_layer(rng, 5)
    plain = (lambda p, x: mix(apply(p, x))), params
    model = (lambda p, x: jax.nn.log_softmax(mix(apply(p, x)))), params
    one, other = (leakjax.audit(m, (6, 6, 1), images=grey, labels=LABELS, noise=()) for m in (plain, model))
    assert other.leaked_dimensions == one.leaked_dimensions
    assert (one.leaked_dimensions == 36) == (mix is TAILS["one example alone"])
    with pytest.raises(InputError):
        leakjax.invert(leakjax.observe(model, (grey, LABELS), batch_size=2))


def test_a_tail_need_not_be_defined_everywhere(rng):
    apply, params = one_layer(rng, 5)
    model = (lambda p, x: (lambda z: z - jnp.log(z - 100).sum(-1, keepdims=True))(apply(p, x))), params
    assert without_tail(leakjax.read_model(model), (6, 6, 1), "float64", 1)[1] is not None


def test_batches_behind_a_softmax(rng, grey):
    apply, params = one_layer(rng, 5)
    model = (lambda p, x: jax.nn.log_softmax(apply(p, x))), params
    result = leakjax.invert(leakjax.observe(model, (grey, LABELS), batch_size=2))
    order = np.argsort(result.labels)
    assert result.labels[order].tolist() == LABELS.tolist()
    assert min(float(psnr(a, b)) for a, b in zip(result.images[order], grey, strict=True)) > 100


def test_bad_calls_are_one_clear_error(rng, grey):
    model = one_layer(rng, 5)
    for how, words in (
        ({"call": 3}, "call must be keyword arguments"),
        ({"call": {"train": True}}, "unexpected keyword argument"),
        ({"rngs": 1.5}, "must be a seed"),
        ({"rngs": {1: 2}}, "seeds by name"),
        ({"rngs": 1}, "goes with modules"),
        ({"output": 1.5}, "output must be an index"),
        ({"output": ()}, "output must be an index"),
        ({"output": 0}, "the path is too long"),
        ({"output": b"a"}, "output must be an index"),
        ({"output": ""}, "output must be an index"),
        ({"rngs": -1}, "rngs must be a seed"),
        ({"call": {"dtype": np.float32}}, "unexpected keyword argument"),
        ({"call": {"dtype": jnp.uint32}}, "unexpected keyword argument"),
        ({"layout": "HWC"}, "did you mean 'NHWC'"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            leakjax.observe(model, (grey, LABELS), **how)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError, match="read before"):
        leakjax.observe(leakjax.read_model(model), (grey, LABELS), layout="NCHW")


def test_a_call_of_equal_words_is_one_architecture(trained):
    first, second = (leakjax.read_model(trained, call={"train": False}, output="logits") for _ in range(2))
    other = leakjax.read_model(trained, call={"train": False}, output=("features", 0))
    assert first.apply is second.apply
    assert first.apply is not other.apply
    function = lambda p, x, k: p["w"][None] * x * (2.0 if k is True else 1.0)  # noqa: E731
    true, number = (leakjax.read_model((function, {"w": np.ones(3)}), call={"k": k}) for k in (True, 1))
    np.testing.assert_array_equal(true.apply(true.params, np.ones((1, 3))), 2 * np.ones((1, 3)))
    np.testing.assert_array_equal(number.apply(number.params, np.ones((1, 3))), np.ones((1, 3)))
    assert read_call(None, None, None, "NHWC") == read_call({}, {}, None, "NHWC")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TypeError("f() missing 1 required positional argument: 'train'"), "call={'train': False}"),
        (TypeError("f() missing 1 required keyword-only argument: 'deterministic'"), "call={'deterministic': True}"),
        (
            ValueError('Parameter "use_running_average" must be passed'),
            "'use_running_average': True",
        ),
        (TypeError("f() missing 1 required positional argument: 'time'"), "call={'time': ...}"),
        (TypeError("f() missing 1 required positional argument: 'z_rng'"), "--call z_rng=key:0"),
        (TypeError("f() missing 1 required positional argument: 'rngs'"), "rngs=0 (--rngs 0)"),
        (TypeError("f() takes 1 positional argument but 2 were given"), "a function (params, x) -> outputs"),
        (NameError("Found an unbound axis name: batch."), "evaluation mode"),
        (ValueError("something else."), "something else"),
    ],
)
def test_errors_name_the_remedy(error, words):
    said = str(cannot_run((1, 8, 8, 3), error))
    assert words in said
    assert not said.endswith((";", "; "))


class Streamed(Dropped):
    """One that is handed its streams at every call."""

    def __call__(self, x, rngs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.head(self.drop(jnp.tanh(self.conv(x)).reshape(len(x), -1), rngs=rngs))


def test_streams_that_a_call_is_handed(images):
    model = Streamed(nnx.Rngs(0))
    with pytest.raises(InputError, match=r"rngs=0 \(--rngs 0\)"):
        leakjax.observe(model, (images, LABELS))
    assert comes_back(model, images, rngs=3)
    assert comes_back(model, images, rngs={"dropout": 3})
    with pytest.raises(InputError, match="by their seeds"):
        leakjax.observe(model, (images, LABELS), call={"rngs": nnx.Rngs(3)})


def test_a_key_among_the_arguments_is_known(rng, grey):
    apply, params = one_layer(rng, 5)
    model = lambda p, x, key: apply(p, x * jax.random.bernoulli(key, 0.9, x.shape))  # noqa: E731
    seen = leakjax.read_model((model, params), call={"key": jax.random.key(1)})
    assert seen.known_keys
    observation = leakjax.observe((model, params), (grey, LABELS), call={"key": jax.random.key(1)})
    result = leakjax.invert(observation)
    assert {c.status for c in result.certificates} <= {"exact", "ambiguous"}  # pixels that the mask hides
    mask = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.9, (1, 6, 6, 1)))
    np.testing.assert_allclose(result.images * mask, grey * mask, atol=1e-9)


def test_values_as_typed():
    typed = "train=No,deep=true,k=2,rate=0.5,mode=same,none=None"
    options = ModelOptions(call=typed, rngs="dropout=3", output="0.logits")
    assert calling(options) == {
        "call": {"train": False, "deep": True, "k": 2, "rate": 0.5, "mode": "same", "none": None},
        "rngs": {"dropout": 3},
        "output": [0, "logits"],
        "layout": "NHWC",
        "train": None,
    }


class Shifted(nnx.Module):
    """Predicts each id from those before it: the shift is its own, as in flax's language model."""

    def __init__(self, rngs, *, shift=True):
        self.table, self.shift = nnx.Embed(20, 16, rngs=rngs), shift
        self.mix, self.head = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 20, rngs=rngs)

    def __call__(self, ids):
        before = jnp.pad(ids.astype("int32"), ((0, 0), (1, 0)))[:, :-1] if self.shift else ids
        return self.head(jnp.cumsum(jnp.tanh(self.mix(self.table(before))), axis=1))


def test_models_of_text_are_named_to_the_door_for_text():
    model, ids = Shifted(nnx.Rngs(0)), np.array([[4, 7, 19]])
    for call in (
        lambda: leakjax.observe(model, (ids, ids)),
        lambda: leakjax.audit(model, (3,), images=ids, labels=ids),
    ):
        with pytest.raises(InputError, match=r"; if they are ids of tokens, recover_tokens reads them$"):
            call()
    with pytest.raises(InputError, match=r"input_range$"):
        leakjax.observe(model, (ids / 1.0, ids))
    drawn = leakjax.audit(model, (3,), images=np.array([[0.2, 0.4, 0.9]]), labels=ids, noise=())
    assert any("'table/embedding'" in r and r.endswith("recover_tokens reads the ids of a text") for r in drawn.remarks)
    read = leakjax.read_model(model)
    compared = optax.softmax_cross_entropy_with_integer_labels
    gradient = jax.grad(lambda params: compared(read.apply(params, ids), ids).mean())(dict(read.params))
    with pytest.raises(InputError, match="'table/embedding' is looked up by other integers than the ids"):
        leakjax.recover_tokens(model, gradient, length=3, target="next")
    found = leakjax.recover_tokens(Shifted(nnx.Rngs(0), shift=False), gradient, length=4, target="next")
    assert found.ids.tolist() == [[0, 4, 7, 19]]


def test_nothing_but_flax_is_imported_for_a_model():
    assert "haiku" not in sys.modules
    assert "transformers" not in sys.modules
