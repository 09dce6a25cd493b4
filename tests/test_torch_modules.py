"""PyTorch modules as they are: what they compute, what comes back from their own autograd's gradients, what is refused.

Skipped where the extra `torch` is not installed; `make test-all` installs it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra torch: make torch")
if importlib.util.find_spec("torchax") is None:
    pytest.skip("needs the extra torch: make torch", allow_module_level=True)

import leakjax  # noqa: E402
from leakjax import InputError  # noqa: E402
from leakjax.interop.torch import from_module, read_torch_capture  # noqa: E402
from leakjax.metrics import psnr  # noqa: E402

nn = torch.nn
SHAPE = (8, 8, 3)
ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """A strided convolution, batch norm and a dense head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 14, 5, 2, 2)
        self.norm = nn.BatchNorm2d(14)
        self.head = nn.Linear(14 * 16, 10)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


def nchw(images, like):
    return torch.as_tensor(np.moveaxis(images, -1, 1)).to(next(like.parameters()).dtype)


def step(module, images, labels):
    """The gradient by PyTorch's autograd and the buffers after the step, by name."""
    loss = nn.functional.cross_entropy(module(nchw(images, module)), torch.as_tensor(labels))
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, (g.numpy() for g in gradients), strict=True)), {
        name: b.numpy().copy() for name, b in module.named_buffers()
    }


@pytest.fixture
def batch(rng):
    return rng.uniform(0.1, 0.9, (2, *SHAPE)), np.array([3, 7])


@pytest.mark.parametrize("train", [False, True])
def test_gradients_and_new_buffers_are_those_of_pytorch(batch, train):
    net = Net().double().train(train)
    model = from_module(net)
    assert set(model.variables) == set(net.state_dict())
    observation = leakjax.observe(model, batch, batch_size=2, buffers=True)
    gradients, buffers = step(net, *batch)
    for name, g in gradients.items():
        np.testing.assert_allclose(observation.gradients[name][0], g, rtol=0, atol=1e-12 * max(1, np.abs(g).max()))
    assert set(observation.buffers) == {"norm.running_mean", "norm.running_var"}  # counts say nothing of images
    for name, b in observation.buffers.items():
        np.testing.assert_allclose(b[0], buffers[name], rtol=0, atol=1e-12)
    assert (buffers["norm.num_batches_tracked"] == 1) == train


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 100), (torch.float32, 60)])
@pytest.mark.parametrize("train", [False, True])
def test_images_come_back_from_pytorchs_own_gradients(batch, train, dtype, least):
    images, labels = batch[0][:1], batch[1][:1]
    net = Net().to(dtype).train(train)
    model = from_module(net)
    gradients, buffers = step(net, images, labels)
    observation = leakjax.Observation(
        model=model,
        gradients={name: g[None] for name, g in gradients.items()},
        loss="softmax_cross_entropy",
        input_shape=SHAPE,
        input_range=(0.0, 1.0),
        precision=str(dtype).removeprefix("torch."),
        buffers={name: b[None] for name, b in buffers.items()} if train else {},
    )
    result = leakjax.invert(observation)
    assert psnr(result.images[0], images[0]) > least
    assert result.labels[0] == labels[0]
    assert [layer.name for layer in result.layers[0]][-1] == "head"


def test_the_copy_is_independent_of_the_module(batch):
    net = Net().double().eval()
    model = from_module(net)
    before = np.asarray(model.apply(model.variables, jnp.asarray(batch[0])))
    net.train()
    with torch.no_grad():
        net.head.bias.add_(1)
    np.testing.assert_array_equal(before, model.apply(model.variables, jnp.asarray(batch[0])))


def test_tied_and_frozen_parameters_and_constants(batch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(192, 192).double(), nn.Linear(192, 192).double()
            self.second.weight = self.first.weight
            self.second.bias.requires_grad_(False)
            self.scale = torch.tensor([2.0], dtype=torch.float64)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x.flatten(1)))) * self.scale

    net = Tied()
    model = from_module(net)
    assert set(model.params) == {"first.weight", "first.bias"}
    assert set(model.buffers) == {"second.bias"}
    found = model.apply(model.variables, jnp.asarray(batch[0]))
    np.testing.assert_allclose(found, net(nchw(batch[0], net)).detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: object(), "takes an nn.Module"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5)), "draws random numbers"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(192, 4)), "all batches"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "no shape yet"),
        (lambda: nn.Flatten(), "no parameters"),
    ],
)
def test_what_is_not_read_is_named(make, words, batch):
    with pytest.raises(InputError, match=words):
        leakjax.observe(from_module(make()), batch)


def test_a_module_itself_is_met_with_the_remedy(batch):
    with pytest.raises(InputError, match="from_module"):
        leakjax.observe(Net(), batch)


def recorded(path, **changes):
    """What the recorder of the page writes of a step of `Net`, with arrays replaced, or left out by None."""
    names: dict = {}
    exec(blocks()['title="recorder.py"'], names)
    net, rng = Net().double().train(), np.random.default_rng(5)
    images = rng.uniform(size=(1, *SHAPE))
    names["record"](path, net, nchw(images, net), lambda z: nn.functional.cross_entropy(z, torch.tensor([4])))
    with np.load(path) as file:
        arrays = {**file, **changes}
    np.savez(path, **{key: a for key, a in arrays.items() if a is not None})
    return images


def blocks():
    """The Python blocks of the page, by title."""
    found = re.findall(r"```python([^\n]*)\n(.*?)```", (ROOT / "docs/pytorch.md").read_text(), re.DOTALL)
    return {title.strip() or str(i): textwrap.dedent(code) for i, (title, code) in enumerate(found)}


def test_the_recorder_is_short_and_its_capture_gives_the_image_back(tmp_path):
    assert len(blocks()['title="recorder.py"'].strip().splitlines()) <= 20
    images = recorded(tmp_path / "c.npz")
    observation = read_torch_capture(tmp_path / "c.npz", from_module(Net().train()))
    assert observation.precision == "float64"
    assert set(observation.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    result = leakjax.invert(observation)
    assert psnr(result.images[0], images[0]) > 100
    assert result.certificates[0].status == "exact"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grad/conv.bias": None}, "gradient 'conv.bias' is missing"),
        ({"param/norm.running_var": None}, "parameter 'norm.running_var' is missing"),
        ({"param/conv.bias": np.zeros(3)}, r"has shape \(3,\)"),
        ({"grad/head.extra": np.zeros(3)}, "'head.extra' is not in the model"),
        ({"new_buffers/extra": np.zeros(3)}, "'extra' is not in the model"),
        ({"grad/conv.bias": np.full(14, np.nan)}, "NaN"),
        ({"secret": np.zeros(1)}, "unexpected array 'secret'"),
    ],
)
def test_captures_that_do_not_fit_are_refused_by_name(tmp_path, changes, words):
    recorded(tmp_path / "c.npz", **changes)
    with pytest.raises(InputError, match=words):
        read_torch_capture(tmp_path / "c.npz", from_module(Net().train()))


def test_the_page_runs(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([("pytorch.md", title, code) for title, code in blocks().items()]))
    run = [sys.executable, str(ROOT / "tests/run_pages.py"), str(plan)]
    importable = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=importable, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran ") == len(blocks())


def test_the_command_line_takes_a_module(run, folder):
    (folder / "torch_nets.py").write_text(blocks()['title="torch_nets.py"'])
    words = "audit", "--torch", "torch_nets:small", "--input-shape", "8,8,3", "--shapes-only", "--json", "--out", "o"
    found = run(*words)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["model"] == "torch_nets:small"
    for more, words_of in (
        (("--model", "cnn6"), "--model has no effect beside --torch"),
        (("--layout", "NCHW"), "--layout has no effect"),
    ):
        refused = run(*words, *more)
        assert refused.exit_code == 2
        assert words_of in refused.stderr


def test_the_default_integers_of_pytorch_are_read_without_a_warning(batch):
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = leakjax.audit(from_module(net), SHAPE, shapes_only=True)
    assert found.verdict == "partial"
