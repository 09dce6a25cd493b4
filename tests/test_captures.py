import json

import jax
import numpy as np
import pytest
from flax import linen, nnx

from leakjax.captures.capture import read_capture, write_capture
from leakjax.client.observation import observe
from leakjax.errors import InputError
from leakjax.inversion import invert
from leakjax.models.reader import read_model

SHAPE = (6, 6, 2)
NETS = """
from test_captures import Normed


def normed(seed):
    return Normed(seed)
"""


class Normed(nnx.Module):
    """A convolution with an eval-mode batch norm of its own statistics, then a dense head."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(2, 5, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
        draw = np.random.default_rng(seed)
        self.norm.mean.set_value(np.float32(0.1 * draw.normal(size=5)))
        self.norm.var.set_value(np.float32(draw.uniform(0.5, 2, 5)))
        self.head = nnx.Linear(180, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.numpy.tanh(self.norm(self.conv(x))).reshape(x.shape[0], -1))


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(linen.Conv(5, (3, 3))(x))
        return linen.Dense(3)(jax.numpy.tanh(x).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(0, 256, (2, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def observation(images):
    return observe(Normed(0), (images / 255, np.array([2, 0])))


@pytest.fixture(scope="module")
def path(observation, tmp_path_factory):
    path = tmp_path_factory.mktemp("captures") / "capture.npz"
    write_capture(observation, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with a factory in it."""
    (tmp_path / "captures_nets.py").write_text(NETS)
    return tmp_path


def rewritten(path, target, **changes):
    """A copy of a capture with arrays replaced (None: removed)."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    for key, value in changes.items():
        arrays.pop(key.replace("__", "/"), None)
        if value is not None:
            arrays[key.replace("__", "/")] = value
    np.savez(target, **arrays)
    return target


def with_meta(path, target, **changes):
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
    return rewritten(path, target, meta=np.array(json.dumps({**meta, **changes})))


def test_a_capture_holds_the_contracts_keys(path, observation):
    with np.load(path, allow_pickle=False) as file:
        assert {key.partition("/")[0] for key in file.files} == {"params", "gradients", "buffers", "meta"}
        meta = json.loads(str(file["meta"]))
        names = {key for key in file.files if key.startswith("params/")}
        assert names == {f"params/{p}" for p in observation.model.params}
        assert {key for key in file.files if key.startswith("buffers/")} == {"buffers/norm/mean", "buffers/norm/var"}
        for name in names:
            assert file[name.replace("params", "gradients")].shape == (2, *file[name].shape)
    assert meta == {
        "loss": "softmax_cross_entropy",
        "input_shape": [6, 6, 2],
        "input_range": [0.0, 1.0],
        "examples": 1,
        "reduction": "mean",
        "victims": 2,
    }


def test_a_capture_holds_no_image_and_no_label(path, images):
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            assert file[key].size != images[0].size, key
        assert "label" not in str(file["meta"])


def test_one_victim_has_gradients_of_the_parameters_shapes(images, tmp_path):
    one = observe(Normed(0), (images[:1] / 255, np.array([2])))
    write_capture(one, tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as file:
        assert file["gradients/conv/kernel"].shape == file["params/conv/kernel"].shape
        assert "victims" not in json.loads(str(file["meta"]))
    again = read_capture(tmp_path / "one.npz", read_model(Normed(9)))
    assert again.victims == 1


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_round_trip(images, tmp_path, dtype):
    written = observe(Normed(0), (images / 255, np.array([2, 0])), dtype=dtype)
    write_capture(written, tmp_path / "c.npz")
    read = read_capture(tmp_path / "c.npz", read_model(Normed(9)))
    assert (read.victims, read.examples, read.precision) == (2, 1, dtype)
    assert (read.loss, read.input_shape, read.input_range) == (written.loss, written.input_shape, written.input_range)
    for part in ("params", "buffers"):
        ours, theirs = getattr(read.model, part), getattr(written.model, part)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    for name in written.gradients:
        np.testing.assert_array_equal(read.gradients[name], written.gradients[name])


def test_batches_keep_their_count(images, tmp_path):
    batch = observe(Normed(0), (images / 255, np.array([2, 0])), batch_size=2)
    write_capture(batch, tmp_path / "c.npz")
    read = read_capture(tmp_path / "c.npz", read_model(Normed(0)))
    assert (read.victims, read.examples) == (1, 2)


def test_linen_buffers_round_trip(images, tmp_path):
    module = LinenNormed()
    variables = module.init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32))
    variables = {**variables, "batch_stats": jax.tree.map(lambda a: a + 0.25, variables["batch_stats"])}
    write_capture(observe((module, variables), (images / 255, np.array([2, 0]))), tmp_path / "c.npz")
    fresh = module.init(jax.random.key(1), np.zeros((1, *SHAPE), np.float32))
    read = read_capture(tmp_path / "c.npz", read_model((module, fresh)))
    np.testing.assert_allclose(read.model.buffers["batch_stats/BatchNorm_0/mean"], 0.25)


def test_a_bare_array_of_parameters_round_trips(images, tmp_path):
    def apply(kernel, x):
        return x.reshape(x.shape[0], -1) @ kernel

    kernel = 0.1 * np.random.default_rng(0).normal(size=(72, 3))
    write_capture(observe((apply, kernel), (images / 255, np.array([2, 0]))), tmp_path / "c.npz")
    read = read_capture(tmp_path / "c.npz", read_model((apply, 0 * kernel)))
    np.testing.assert_array_equal(read.model.params[""], kernel)


def test_inverting_a_capture_is_inverting_directly(path, observation, images):
    direct, captured = invert(observation), invert(read_capture(path, read_model(Normed(5))))
    np.testing.assert_allclose(direct.images, images / 255, atol=1e-6)
    np.testing.assert_allclose(captured.images, direct.images, atol=1e-9)
    assert list(captured.labels) == list(direct.labels) == [2, 0]


def test_command_line_round_trip_with_and_without_truth(run, tmp_path, images):
    np.savez(tmp_path / "images.npz", images=images, labels=np.array([2, 0]))
    model = ("--model", "captures_nets:normed")
    words = (*model, "--input-shape", "6,6,2", "--images", "images.npz", "--index", "1,0", "--seed", "3", "--out", "o")
    assert run("capture", *words).exit_code == 0
    blind = json.loads(run("invert", *model, "--capture", "o/capture.npz", "--out", "p", "--json").stdout)
    nulls = ("psnr", "psnr_determined", "ssim", "mse")
    assert [[e[name] for name in nulls] for e in blind["examples"]] == [[None] * 4] * 2
    assert [e["label"] for e in blind["examples"]] == [0, 2]
    np.savez(tmp_path / "truth.npz", images=images[::-1], labels=np.array([0, 2]))
    words = (*model, "--capture", "o/capture.npz", "--truth", "truth.npz", "--out", "q", "--json")
    seeing = json.loads(run("invert", *words).stdout)
    assert min(e["psnr"] for e in seeing["examples"]) > 100
    with np.load("p/reconstruction.npz") as a, np.load("q/reconstruction.npz") as b:
        np.testing.assert_allclose(a["images"], b["images"], atol=1e-9)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("gradients/conv/kernel", lambda a: a * np.nan, "'conv/kernel' holds NaN"),
        ("gradients/conv/kernel", lambda a: a / 0, "'conv/kernel' holds NaN or inf"),
        ("gradients/conv/kernel", lambda a: None, "gradient of 'conv/kernel' is missing"),
        ("gradients/conv/kernel", lambda a: a[:, :2], "'conv/kernel' has shape"),
        ("gradients/conv/kernel", lambda a: a.astype(int), "'conv/kernel' has dtype int64"),
        ("gradients/conv/kernel", lambda a: a.astype(complex), "'conv/kernel' has dtype complex128"),
        ("gradients/conv/kernel", lambda a: np.array("text"), "'conv/kernel' has"),
        ("gradients/conv/extra", lambda a: np.ones((2, 3)), "'conv/extra' belongs to no parameter"),
        ("params/conv/kernel", lambda a: None, "parameter 'conv/kernel' is missing"),
        ("params/conv/kernel", lambda a: a[:2], "parameter 'conv/kernel' has shape"),
        ("params/conv/kernel", lambda a: a.astype(int), "parameter 'conv/kernel' has dtype int64"),
        ("params/conv/kernel", lambda a: a * np.nan, "parameter 'conv/kernel' holds NaN"),
        ("params/extra", lambda a: np.ones(3), "parameter 'extra' is not in the model"),
        ("buffers/norm/mean", lambda a: None, "buffer 'norm/mean' is missing"),
        ("buffers/norm/var", lambda a: a[:2], "buffer 'norm/var' has shape"),
        ("image", lambda a: np.ones(3), "unexpected array 'image'"),
        ("meta", lambda a: None, "'meta'"),
        ("meta", lambda a: np.array("{"), "not JSON"),
        ("meta", lambda a: np.array("[1]"), "JSON object"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_capture_that_does_not_fit_names_the_tensor(path, tmp_path, key, change, message):
    with np.load(path) as file:
        value = change(file[key] if key in file.files else None)
    bad = rewritten(path, tmp_path / "bad.npz", **{key.replace("/", "__"): value})
    with pytest.raises(InputError, match=message):
        read_capture(bad, read_model(Normed(0)))


def test_an_all_zero_gradient_is_refused(path, tmp_path):
    with np.load(path) as file:
        zeros = {key.replace("/", "__"): 0 * file[key] for key in file.files if key.startswith("gradients")}
    with pytest.raises(InputError, match="zero everywhere"):
        read_capture(rewritten(path, tmp_path / "zero.npz", **zeros), read_model(Normed(0)))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "softmax"},
        {"loss": ["softmax_cross_entropy"]},
        {"input_shape": "6,6,2"},
        {"input_shape": [6, 6, 0]},
        {"input_shape": [6, 6, True]},
        {"input_range": [1, 0]},
        {"input_range": [0, float("inf")]},
        {"input_range": [0, float("nan")]},
        {"input_range": [0]},
        {"examples": 0},
        {"examples": "one"},
        {"victims": 0},
        {"reduction": "median"},
    ],
    ids=str,
)
def test_meta_is_checked(path, tmp_path, changes):
    with pytest.raises(InputError, match=f"meta.*{next(iter(changes))}"):
        read_capture(with_meta(path, tmp_path / "bad.npz", **changes), read_model(Normed(0)))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "pickled", "empty", "absent"])
def test_a_damaged_file_is_refused(path, tmp_path, damage):
    bad, data = tmp_path / "bad.npz", bytearray(path.read_bytes())
    if damage == "pickled":
        np.savez(bad, meta=np.array([{}], object))
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
        bad.write_bytes(data)
    elif damage != "absent":
        bad.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(InputError, match="pickled objects" if damage == "pickled" else "--capture"):
        read_capture(bad, read_model(Normed(0)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "squared_error"), "contradicts the capture's own softmax_cross_entropy"),
        (("--input-shape", "8,8,2"), "contradicts"),
        (("--input-range", "0,2"), "contradicts"),
        (("--truth", "absent.npz"), "--truth absent.npz: no such file"),
    ],
)
def test_options_that_contradict_a_capture_are_refused(run, path, words, message):
    result = run("invert", "--model", "captures_nets:normed", "--capture", path, *words, "--out", "o")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
