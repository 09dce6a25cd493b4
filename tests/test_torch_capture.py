"""Captures in PyTorch's layout, written by a forward pass of our own: NCHW, OIHW, channel-first flatten, (out, in)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from leakjax.client.observation import observe
from leakjax.datasets import load_dataset
from leakjax.errors import InputError
from leakjax.interop.torch import read_torch_capture
from leakjax.models import build_model
from leakjax.models.reader import read_model

CNN6 = [(12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]
LENET = [(12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2)]
SHAPE = (10, 8, 3)  # sides that differ, so that a transposed flatten shows


def conv(x, weight, stride=1, padding=0):
    numbers = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), [(padding, padding)] * 2, dimension_numbers=numbers
    )


def leaky(slope):
    return lambda z: jnp.where(z > 0, z, slope * z)


def average(x, height, width):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // height, height, w // width, width).mean((3, 5))


def shift(bias):
    return bias[None, :, None, None]


def torch_convnet(layers, activation, features, outputs, *, bias, rng):
    """state dict and forward(state, x NCHW) of a torch.nn.Sequential-like net, and its names in state-dict order."""
    state, channels = {}, 3
    for k, (filters, size, _, _) in enumerate(layers):
        bound = 1 / np.sqrt(channels * size**2)
        state[f"body.{k}.layer.weight"] = rng.uniform(-bound, bound, (filters, channels, size, size))
        if bias:
            state[f"body.{k}.layer.bias"] = rng.uniform(-bound, bound, filters)
        channels = filters
    state["fc.weight"] = rng.uniform(-1, 1, (outputs, features)) / np.sqrt(features)
    if bias:
        state["fc.bias"] = rng.uniform(-1, 1, outputs) / np.sqrt(features)

    def forward(state, x):
        for k, (_, _, stride, padding) in enumerate(layers):
            x = conv(x, state[f"body.{k}.layer.weight"], stride, padding)
            if bias:
                x = x + shift(state[f"body.{k}.layer.bias"])
            x = activation(x)
        z = x.reshape(1, -1) @ state["fc.weight"].T
        return z + state["fc.bias"][None] if bias else z

    return {k: np.float32(v) for k, v in state.items()}, forward


def logistic(z, label):
    return jnp.sum(jnp.logaddexp(0.0, z) - label * z)


def softmax(z, label):
    return jax.nn.logsumexp(z) - z[0, label]


def write(path, state, forward, x, label, loss, *, buffers=(), input_range=(0, 1), **changes):
    """Write a capture of `forward`'s float32 gradient at an image x (H, W, C); `changes` replace arrays."""
    value = {"sigmoid_binary_cross_entropy": logistic, "softmax_cross_entropy": softmax}[loss]
    image = np.float32(np.moveaxis(x, -1, 0)[None])
    fixed = {k: state[k] for k in buffers}
    free = {k: v for k, v in state.items() if k not in buffers}
    gradient = jax.jit(jax.grad(lambda free: value(forward({**free, **fixed}, image), label)))(free)
    meta = {"loss": loss, "input_shape": list(x.shape), "input_range": list(input_range)}
    arrays = {"names": np.array(list(state)), "meta": np.array(json.dumps(meta))}
    arrays |= {f"param/{k}": v for k, v in state.items()} | {f"grad/{k}": np.asarray(v) for k, v in gradient.items()}
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def check_conversion(path, model, x, label):
    """The converted weights, run by Flax at the image, give the converted gradient."""
    converted = read_torch_capture(path, read_model(model))
    again = observe(
        converted.model, (x[None], np.array([label])), loss=converted.loss, input_range=converted.input_range
    )
    assert again.gradients.keys() == converted.gradients.keys()
    for name, gradient in again.gradients.items():
        np.testing.assert_allclose(converted.gradients[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())
    return converted


@pytest.fixture(scope="module")
def photo():
    return load_dataset("samples", [1], (32, 32, 3))


@pytest.fixture
def cnn6_capture(tmp_path, rng, photo):
    def make(**changes):
        state, forward = torch_convnet(CNN6, leaky(0.2), 3200, 1, bias=False, rng=rng)
        image = photo.images[0] / 255
        return write(tmp_path / "cnn6.npz", state, forward, image, 1, "sigmoid_binary_cross_entropy", **changes)

    return make


def test_cnn6_from_float32_reaches_80_db(run, tmp_path, cnn6_capture, photo):
    np.savez(tmp_path / "truth.npz", images=photo.images, labels=photo.labels)
    words = ("--model", "cnn6", "--torch-capture", cnn6_capture(), "--truth", "truth.npz", "--out", "o", "--json")
    report = json.loads(run("invert", *words).stdout)
    assert report["dtype"] == "float64"
    assert report["examples"][0]["psnr"] >= 80
    assert report["examples"][0]["label"] == 1


def test_lenet_with_biases(tmp_path, rng, photo):
    state, forward = torch_convnet(LENET, leaky(0.01), 768, 10, bias=True, rng=rng)
    x = photo.images[0] / 255 - 0.5
    path = write(tmp_path / "c.npz", state, forward, x, 4, "softmax_cross_entropy", input_range=(-0.5, 0.5))
    converted = check_conversion(path, build_model("lenet"), x, 4)
    assert converted.input_range == (-0.5, 0.5)


class Pooled(nnx.Module):
    """Convolution, average pooling, flatten, two dense layers; the second one as wide as the map before pooling."""

    def __init__(self, transpose=False, norm=False):
        rngs = nnx.Rngs(0)
        self.transpose = transpose
        self.conv = nnx.Conv(3, 6, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(120, use_running_average=True, rngs=rngs) if norm else None
        self.dense = nnx.Linear(120, 480, rngs=rngs)
        self.head = nnx.Linear(480, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(jnp.tanh(self.conv(x)), (2, 2), strides=(2, 2))
        x = jnp.transpose(x, (0, 3, 1, 2)) if self.transpose else x
        x = x.reshape(x.shape[0], -1)
        x = x if self.norm is None else self.norm(x)
        return self.head(jnp.tanh(self.dense(x)))


def pooled_state(rng, *, norm=False):
    shapes = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,)}
    if norm:
        shapes |= {f"norm.{leaf}": (120,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"dense.weight": (480, 120), "dense.bias": (480,), "head.weight": (3, 480), "head.bias": (3,)}
    return {
        name: np.float32(
            rng.uniform(0.1, 0.3, shape) * rng.choice([-1, 1], shape)
            if "running_var" not in name
            else rng.uniform(0.5, 2, shape)
        )
        for name, shape in shapes.items()
    }


def pooled_forward(state, x):
    x = average(jnp.tanh(conv(x, state["conv.weight"], 1, 1) + shift(state["conv.bias"])), 2, 2).reshape(1, -1)
    if "norm.weight" in state:
        scale = state["norm.weight"] / jnp.sqrt(state["norm.running_var"] + 1e-5)
        x = (x - state["norm.running_mean"][None]) * scale[None] + state["norm.bias"][None]
    x = jnp.tanh(0.1 * x @ (10 * state["dense.weight"].T) + state["dense.bias"][None])
    return x @ state["head.weight"].T + state["head.bias"][None]


@pytest.mark.parametrize("transpose", [False, True])
def test_a_pooled_map_before_the_flatten(tmp_path, rng, transpose):
    x = rng.random(SHAPE)
    path = write(tmp_path / "c.npz", pooled_state(rng), pooled_forward, x, 2, "softmax_cross_entropy")
    check_conversion(path, Pooled(transpose), x, 2)


def test_a_batch_norm_after_the_flatten_with_its_statistics(tmp_path, rng):
    x, state = rng.random(SHAPE), pooled_state(rng, norm=True)
    buffers = ("norm.running_mean", "norm.running_var")
    counter = {"param/norm.num_batches_tracked": np.array(7)}
    path = write(tmp_path / "c.npz", state, pooled_forward, x, 2, "softmax_cross_entropy", buffers=buffers, **counter)
    converted = check_conversion(path, Pooled(norm=True), x, 2)
    assert np.ptp(converted.model.buffers["norm/mean"]) > 0.1


def test_running_statistics_must_be_given(tmp_path, rng):
    x, state = rng.random(SHAPE), pooled_state(rng, norm=True)
    for leaf, value in (("mean", 0), ("var", 1)):
        state[f"norm.running_{leaf}"] = np.full(120, value, np.float32)
    names = [name for name in state if "running" not in name]
    path = write(
        tmp_path / "c.npz",
        state,
        pooled_forward,
        x,
        2,
        "softmax_cross_entropy",
        names=np.array(names),
        **{f"{part}/norm.running_{leaf}": None for part in ("param", "grad") for leaf in ("mean", "var")},
    )
    with pytest.raises(InputError, match=r"layer 'norm' has bias and scale, the model's 'norm' has .*mean"):
        read_torch_capture(path, read_model(Pooled(norm=True)))


class GlobalPool(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Conv(6, (3, 3), padding=1)(x))
        return linen.Dense(3)(jnp.mean(x, (1, 2)))


def test_linen_with_global_pooling(tmp_path, rng):
    shapes = {"0.weight": (6, 3, 3, 3), "0.bias": (6,), "1.weight": (3, 6), "1.bias": (3,)}
    state = {name: np.float32(0.3 * rng.normal(size=shape)) for name, shape in shapes.items()}

    def forward(state, x):
        x = jnp.tanh(conv(x, state["0.weight"], 1, 1) + shift(state["0.bias"])).mean((2, 3))
        return x @ state["1.weight"].T + state["1.bias"][None]

    x = rng.random(SHAPE)
    path = write(tmp_path / "c.npz", state, forward, x, 1, "softmax_cross_entropy")
    module = GlobalPool()
    check_conversion(path, (module, module.init(jax.random.key(0), x[None])), x, 1)


def dense_only(state, x):
    x = jnp.tanh(x.reshape(1, -1) @ state["0.weight"].T + state["0.bias"][None])
    return x @ state["1.weight"].T + state["1.bias"][None]


class DenseOnly(nnx.Module):
    """The second layer has as many inputs as the image has entries, and must not be permuted."""

    def __init__(self, kind=""):
        rngs = nnx.Rngs(0)
        self.kind = kind
        self.first, self.second = nnx.Linear(240, 240, rngs=rngs), nnx.Linear(240, 3, rngs=rngs)
        if kind == "unflatten":
            self.conv = nnx.Conv(3, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        if self.kind == "sliced":
            x = jnp.concatenate([x[:, 120:], x[:, :120]], 1)
        x = jnp.tanh(self.first(x))
        if self.kind == "unflatten":
            x = self.conv(x.reshape(-1, *SHAPE)).reshape(x.shape[0], -1)
        return self.second(x)


@pytest.fixture
def dense_capture(tmp_path, rng):
    shapes = {"0.weight": (240, 240), "0.bias": (240,), "1.weight": (3, 240), "1.bias": (3,)}
    state = {name: np.float32(0.1 * rng.normal(size=shape)) for name, shape in shapes.items()}
    x = rng.random(SHAPE)
    return write(tmp_path / "c.npz", state, dense_only, x, 0, "softmax_cross_entropy"), x


def test_only_a_flattened_map_is_permuted(dense_capture):
    path, x = dense_capture
    check_conversion(path, DenseOnly(), x, 0)


@pytest.mark.parametrize(("kind", "message"), [("sliced", "were flattened"), ("unflatten", "channel-first")])
def test_what_cannot_be_told_is_refused(dense_capture, kind, message):
    with pytest.raises(InputError, match=message):
        read_torch_capture(dense_capture[0], read_model(DenseOnly(kind)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad/body.2.layer.weight": None}, "'grad/body.2.layer.weight' is missing"),
        ({"param/body.2.layer.weight": None}, "'param/body.2.layer.weight' is missing"),
        ({"grad/extra": np.ones(3)}, "'grad/extra' is in the file but not in 'names'"),
        ({"grad/body.2.layer.weight": np.ones((36, 36, 3))}, "'grad/body.2.layer.weight' has shape"),
        ({"grad/fc.weight": np.full((1, 3200), np.nan)}, "'grad/fc.weight' holds NaN"),
        ({"param/fc.weight": np.full((1, 3200), np.inf)}, "'param/fc.weight' holds NaN or inf"),
        ({"grad/fc.weight": np.ones((1, 3200), int)}, "'grad/fc.weight' has dtype int64"),
        ({"names": None}, "'names'"),
        ({"meta": None}, "'meta'"),
    ],
    ids=str,
)
def test_a_damaged_capture_names_the_array(cnn6_capture, changes, message):
    path = cnn6_capture(**changes)
    with pytest.raises(InputError, match=message):
        read_torch_capture(path, read_model(build_model("cnn6")))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("cnn6d", "layer 'body.1.layer' differs from the model's 'conv2'"),
        ("lenet", "layer 'body.0.layer' has kernel, the model's 'conv1' has bias and kernel"),
        ("lenet2", "layer 'body.0.layer' differs from the model's 'conv1'"),
    ],
)
def test_the_first_layer_that_differs_is_named(run, cnn6_capture, model, message):
    result = run("invert", "--model", model, "--torch-capture", cnn6_capture(), "--out", "o")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_a_longer_capture_names_the_layer_without_counterpart(tmp_path, rng, dense_capture):
    path, _ = dense_capture
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    extra = {f"{part}/2.{leaf}": np.ones(3, np.float32) for part in ("param", "grad") for leaf in ("weight", "bias")}
    names = np.array([*arrays["names"], "2.weight", "2.bias"])
    np.savez(tmp_path / "long.npz", **{**arrays, **extra, "names": names})
    with pytest.raises(InputError, match="layer '2' has no counterpart in the model"):
        read_torch_capture(tmp_path / "long.npz", read_model(DenseOnly()))


def test_a_channels_first_function_is_refused(tmp_path, rng):
    state, forward = torch_convnet([(4, 3, 1, 1)], jnp.tanh, 320, 3, bias=True, rng=rng)
    x = rng.random(SHAPE)
    path = write(tmp_path / "c.npz", state, forward, x, 0, "softmax_cross_entropy")
    params = {
        "conv": {"kernel": np.ones((3, 3, 3, 4)), "bias": np.ones(4)},
        "head": {"kernel": np.ones((320, 3)), "bias": np.ones(3)},
    }

    def apply(params, x):
        kernel = jnp.transpose(params["conv"]["kernel"], (3, 2, 0, 1))
        x = conv(jnp.transpose(x, (0, 3, 1, 2)), kernel, 1, 1) + shift(params["conv"]["bias"])
        return jnp.tanh(x).reshape(x.shape[0], -1) @ params["head"]["kernel"] + params["head"]["bias"][None]

    with pytest.raises(InputError, match="not channels-last"):
        read_torch_capture(path, read_model((apply, params)))
