"""New running statistics that go with a gradient: what an audit and the guard count of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import leakjax
from leakjax.guard import guard, loss_of, update_of
from leakjax.leakage.privacy import DPSGD

SHAPE = (8, 8, 2)
IMAGES = np.random.default_rng(0).uniform(size=(2, *SHAPE))


class Net(nnx.Module):
    """Four filters of 3x3 see a part of two channels, and batch norm hides a constant of each filter."""

    def __init__(self, width=4, norm=True):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, width, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs) if norm else lambda x: x
        self.head = nnx.Linear(16 * width, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.conv(x))).reshape(len(x), -1))


@pytest.mark.parametrize("examples", [1, 2])
def test_an_audit_counts_them_and_no_more(examples):
    asked = {"images": IMAGES[:examples], "labels": np.arange(examples), "train": True}
    without, sent = (leakjax.audit(Net(), SHAPE, buffers=b, **asked) for b in (False, True))
    assert without.leaked_dimensions == without.structural_leaked_dimensions
    assert sent.leaked_dimensions == sent.structural_leaked_dimensions == without.leaked_dimensions + 4
    assert [layer.rank for layer in sent.layers] == [120, None, 64]
    assert [layer.structural_rank for layer in sent.layers] == [120, 64, 64]
    assert "(norm/mean, norm/var) are not counted" in " ".join(without.remarks)
    assert "running statistics" not in " ".join(sent.remarks)


def test_shapes_alone_say_the_same():
    found = leakjax.audit(Net(), SHAPE, train=True, buffers=True, shapes_only=True)
    assert found.structural_leaked_dimensions == 120


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": Net(norm=False)}, "buffers: no running statistics of the batch are left behind"),
        ({"model": Net(), "train": False}, "buffers: no running statistics of the batch are left behind"),
        ({"model": Net(), "train": True, "buffers": 1}, "buffers must be True or False, got 1"),
        ({"model": Net(), "train": True, "dp_sgd": DPSGD(clip=1.0, noise_multipliers=(1.0,))}, "leave out buffers"),
    ],
)
def test_what_cannot_be_counted_is_refused(given, words):
    given = {"buffers": True, **given}
    with pytest.raises(leakjax.InputError, match=words.replace("(", r"\(")):
        leakjax.audit(given.pop("model"), SHAPE, **given)


def test_the_guard_counts_them_in_an_update():
    net, image, label = Net(), IMAGES[:1], np.array([1])
    params = leakjax.read_model(net, train=True).params
    leaks = []
    for asked in ({"loss_fn": loss_of(net, train=True)}, {"update_fn": update_of(net, train=True)}):
        watch = guard(max_leaked_fraction=0.93, method="exact", **asked)
        score = watch.score(params, jnp.asarray(image), jnp.asarray(label))
        leaks.append((round(float(score.leaked_dimensions)), bool(score.allowed)))
    assert leaks == [(116, True), (120, False)]


def test_an_update_without_statistics_is_refused():
    with pytest.raises(leakjax.InputError, match="no running statistics to send"):
        update_of(Net(norm=False))
