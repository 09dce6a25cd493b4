"""Models in training mode do not pass in silence."""

import io
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from rich.console import Console

import leakjax
from leakjax.models import build_model
from leakjax.models.reader import read_model
from leakjax.report.reconstruction.record import RunInfo, build_report
from leakjax.report.reconstruction.table import print_report
from leakjax.segments.training_mode import training_remarks

DRAW = np.random.default_rng(0)
SHAPE = (6, 6, 2)
IMAGES, LABELS = DRAW.uniform(size=(1, *SHAPE)), np.array([2])


class Normed(nnx.Module):
    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        norms = {"batch": lambda: nnx.BatchNorm(4, rngs=rngs), "layer": lambda: nnx.LayerNorm(4, rngs=rngs)}
        norms |= {"group": lambda: nnx.GroupNorm(4, 2, rngs=rngs), "none": lambda: lambda x: x}
        self.norm = norms[kind]()
        self.head = nnx.Linear(144, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.conv(x))).reshape(x.shape[0], -1))


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train)(linen.Conv(4, (3, 3))(x))
        return linen.Dense(3)(jnp.tanh(x).reshape(x.shape[0], -1))


def linen_model(train):
    module = LinenNormed()
    variables = module.init(jax.random.key(0), IMAGES, False)

    def apply(params, x):
        logits, _ = module.apply({**variables, "params": params}, x, train, mutable=["batch_stats"])
        return logits

    return read_model(apply, variables["params"])


def by_hand(p, x):
    x = x - jnp.mean(x, 0, keepdims=True)
    return x.reshape(x.shape[0], -1) @ p["w"]


def one_by_one(p, x):
    """Each image by its own statistics, whatever else is in the batch."""
    z = (x - jnp.mean(x, (1, 2, 3), keepdims=True)).reshape(x.shape[0], -1)
    return z @ p["w"] + 0 * jnp.sum(p["w"])


PARAMS = {"w": DRAW.normal(size=(72, 3))}
TRAINING = {
    "nnx": lambda: read_model(Normed("batch")),
    "linen": lambda: linen_model(True),
    "function": lambda: read_model(by_hand, PARAMS),
}
EVALUATION = {
    "nnx": lambda: read_model(nnx.view(Normed("batch"), use_running_average=True)),
    "linen": lambda: linen_model(False),
    "function": lambda: read_model(one_by_one, PARAMS),
    "layer norm": lambda: read_model(Normed("layer")),
    "group norm": lambda: read_model(Normed("group")),
    "no norm": lambda: read_model(Normed("none")),
    "zoo": lambda: read_model(build_model("cnn6")),
}


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_batchs_own_statistics_are_remarked(kind, dtype):
    start = time.perf_counter()
    (remark,) = training_remarks(TRAINING[kind]().astype(dtype), SHAPE, jnp.dtype(dtype))
    assert time.perf_counter() - start < 10
    assert "train-mode batch norm" in remark
    assert "model.eval()" in remark
    assert ("norm/mean" in remark) == (kind == "nnx")


@pytest.mark.parametrize("kind", EVALUATION)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nothing_is_said_of_models_that_take_images_one_by_one(kind, dtype):
    shape = (32, 32, 3) if kind == "zoo" else SHAPE
    assert training_remarks(EVALUATION[kind]().astype(dtype), shape, jnp.dtype(dtype)) == ()


class Dropping(nnx.Module):
    def __init__(self):
        self.first, self.last = nnx.Linear(72, 40, rngs=nnx.Rngs(0)), nnx.Linear(40, 3, rngs=nnx.Rngs(1))
        self.drop = nnx.Dropout(0.3, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.first(x.reshape(x.shape[0], -1)))))


def test_an_answer_through_dropout_says_whose_mask_it_is():
    model = Dropping()
    found = leakjax.invert(leakjax.observe(model, (IMAGES[:1], LABELS[:1])), attack="match")
    (remark,) = found.remarks
    assert "dropout" in remark
    assert "drew the same" in remark
    model.eval()
    assert leakjax.invert(leakjax.observe(model, (IMAGES[:1], LABELS[:1])), attack="match").remarks == ()


def test_a_norm_that_is_never_called_is_not_spoken_of():
    class Net(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(72, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(72, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(x.reshape(x.shape[0], -1))

    assert training_remarks(read_model(Net()).astype("float64"), SHAPE, jnp.float64) == ()


def test_a_model_of_its_own_batch_size_is_not_refused():
    def apply(p, x):
        return x.reshape(1, 72) @ p["w"]

    assert training_remarks(read_model(apply, PARAMS).astype("float64"), SHAPE, jnp.float64) == ()


def test_inversions_and_audits_carry_the_remark():
    heard = []
    model = Normed("batch")
    observation = leakjax.observe(model, (IMAGES, LABELS))
    found = leakjax.invert(observation, attack="dlg", steps=2, progress=heard.append)
    (remark,) = found.remarks
    assert remark in heard
    assert remark in leakjax.audit(model, SHAPE).remarks
    report = build_report(RunInfo("net", None, 0), observation, found)
    assert report["remarks"] == [remark]
    printed = io.StringIO()
    print_report(Console(file=printed, width=999), report)
    assert printed.getvalue().count(remark) == 1
    model.eval()
    assert leakjax.invert(leakjax.observe(model, (IMAGES, LABELS)), attack="dlg", steps=2).remarks == ()
