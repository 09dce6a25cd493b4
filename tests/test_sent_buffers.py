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


class Normalizer(Net):
    """A net that keeps a running mean of its images, pixel by pixel, or their largest."""

    def __init__(self, kept):
        super().__init__(2)
        self.kept, self.seen = kept, nnx.BatchStat(jnp.zeros(SHAPE, jnp.float32))

    def __call__(self, x):
        old = self.seen[...]
        self.seen[...] = (0.9 * old + 0.1 * self.kept(x, 0)).astype(old.dtype)
        return super().__call__(x - old[None])


@pytest.mark.parametrize("kept", [jnp.mean, jnp.max])
def test_any_buffer_that_the_images_move_is_counted(kept):
    found = leakjax.audit(Normalizer(kept), SHAPE, images=IMAGES[:1], labels=np.array([1]), train=True, buffers=True)
    assert found.leaked_dimensions == found.structural_leaked_dimensions == 128


def test_a_momentum_of_one_tells_nothing():
    net = Net()
    net.norm.momentum = 1.0
    found = leakjax.audit(net, SHAPE, images=IMAGES[:1], labels=np.array([1]), train=True, buffers=True)
    assert (found.leaked_dimensions, found.layers[0].rank) == (116, 116)


class Last(nnx.Module):
    """A batch norm right before the loss."""

    def __init__(self):
        self.flat = nnx.Linear(128, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.flat(x.reshape(len(x), -1)))


def test_bounds_hold_for_a_norm_at_the_end():
    images = np.random.default_rng(1).uniform(size=(4, *SHAPE))
    found = leakjax.audit(Last(), SHAPE, images=images, labels=np.array([0, 1, 1, 0]), train=True, buffers=True)
    assert found.leaked_dimensions is not None
    assert found.leaked_dimensions <= found.structural_leaked_dimensions
    assert not found.layers[0].structural_exact


def test_rows_of_stacked_weights_are_audited_without_them():
    class Stacked(Net):
        def __init__(self):
            super().__init__()
            self.rows = nnx.Param(jnp.full((2, 64, 64), 0.2, jnp.float32))

        def __call__(self, x):
            z = jnp.tanh(self.norm(self.conv(x))).reshape(len(x), -1)
            for k in range(2):
                z = jnp.tanh(z @ self.rows[k])
            return self.head(z)

    assert leakjax.audit(Stacked(), SHAPE, train=True, shapes_only=True).structural_leaked_dimensions == 116
    with pytest.raises(leakjax.InputError, match="stacked weights"):
        leakjax.audit(Stacked(), SHAPE, train=True, buffers=True, shapes_only=True)


class Rounded(Net):
    """A net that sees its images in steps of a tenth."""

    def __call__(self, x):
        return super().__call__(jnp.round(10 * x) / 10)


def test_what_a_rounding_hides_is_said_to_be_left_out():
    asked = {"images": IMAGES[:1], "labels": np.array([1]), "train": True, "buffers": True}
    found = leakjax.audit(Rounded(), SHAPE, **asked)
    assert "new running statistics are not counted" in " ".join(found.remarks)
