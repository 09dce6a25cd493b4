"""Label maps: given to the attack, found beside the image, and claims about both checked against the truth."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import leakjax
from leakjax.attacks.certificates.certificate import agreed, certify, certify_together
from leakjax.attacks.certificates.label_maps import joint_rank, with_open_maps
from leakjax.attacks.problem import Monitor, Outcome
from leakjax.datasets import load_dataset, luminance_maps
from leakjax.errors import InputError
from leakjax.guard import guard, loss_of
from leakjax.metrics import psnr
from leakjax.models import MODELS, build_model
from leakjax.models.segmentation import FCN, UNet
from leakjax.preparation import Asked, checked, prepare
from leakjax.reconstruction import Candidate, LayerInfo
from leakjax.runtime.precision import compute_in


def net(kind, *, classes=2, activation=jnp.tanh, **more):
    return kind(classes, rngs=nnx.Rngs(0), activation=activation, **more)


def photo(side, index=0):
    """(1, side, side, 3) in [0, 1]."""
    images = load_dataset("samples", [index], (16, 16, 3)).images / 255.0
    return images[:, :: 16 // side, :: 16 // side]


def problem_of(observation, **asked):
    """As `invert` prepares it."""
    options = dict.fromkeys(f.name for f in dataclasses.fields(Asked))
    options |= {"attack": "match", "dtype": "float64", "solver": "auto", "starts": 1, "prior": "none", "seed": 0}
    options |= {"pull_back": "auto", "optimizer": "lbfgs", "adaptive": True} | asked
    with compute_in("float64") as floating:
        return prepare(observation, checked(Asked(**options), observation), floating, Monitor())[0]


def test_maps_are_quantiles_of_the_luminance():
    images = load_dataset("samples", [0, 1, 2], (16, 16, 3)).images
    for classes in (2, 3):
        maps = luminance_maps(images, classes)
        assert maps.shape == (3, 16, 16)
        for picture, found in zip(images, maps, strict=True):
            light = picture @ np.array([0.299, 0.587, 0.114])
            shares = np.bincount(found.ravel(), minlength=classes) / 256
            assert np.all(np.abs(shares - 1 / classes) < 0.03)
            assert all(light[found == k].max() <= light[found == k + 1].min() for k in range(classes - 1))
    with pytest.raises(InputError, match="classes"):
        luminance_maps(images, 1)
    with pytest.raises(InputError, match="images"):
        luminance_maps(images[0])


def test_samples_are_halved():
    small, large = (load_dataset("samples", [4], (side, side, 3)).images[0].astype(float) for side in (16, 32))
    assert np.abs(small[3, 5] - large[6:8, 10:12].mean(axis=(0, 1))).max() <= 0.5


@pytest.mark.parametrize("name", ["fcn", "unet"])
def test_zoo_takes_any_even_size(name):
    assert MODELS[name].maps
    model = leakjax.read_model(build_model(name))
    for shape in ((16, 16, 3), (4, 6, 3)):
        found = jax.eval_shape(model.apply, model.variables, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
        assert found.shape == (2, *shape[:2], 2)


def test_everything_leaks_where_the_map_is_known():
    images, model = photo(4), net(FCN, classes=3)
    found = leakjax.audit(model, (4, 4, 3), images=images, labels=luminance_maps(images, 3), noise=[])
    assert found.leaked_dimensions == found.unknowns == 48
    drawn = leakjax.audit(model, (4, 4, 3), noise=[])  # a random map of a random image
    assert drawn.leaked_dimensions == 48


def test_few_weights_leak_no_more_than_they_are():
    images = photo(4)
    small = net(FCN, width=1)
    weights = sum(a.size for a in jax.tree.leaves(nnx.state(small)))
    found = leakjax.audit(small, (4, 4, 3), images=images, labels=luminance_maps(images), noise=[])
    assert found.leaked_dimensions <= weights - 1 < 48  # dL/db of the head sums to zero


def test_guard_scores_label_maps():
    model, images = leakjax.read_model(net(UNet)), photo(4)
    loss = loss_of(net(UNet))
    protect = guard(loss, max_leaked_fraction=0.5, method="exact")
    score = protect.score(model.params, jnp.asarray(images, jnp.float32), jnp.asarray(luminance_maps(images)))
    assert float(score.worst_leaked_fraction) > 0.9
    assert not bool(score.allowed)


def test_given_maps_give_the_image():
    images = photo(4)
    maps = luminance_maps(images)
    seen = leakjax.observe(net(FCN, activation=jax.nn.softplus), (images, maps))
    assert seen.target == "classes"
    result = leakjax.invert(seen, labels=maps, prior="none")
    assert result.certificates[0].status == "exact"
    assert psnr(images[0], result.images[0]) > 150


def test_the_map_is_found_beside_the_image():
    images = photo(4)
    maps = luminance_maps(images)
    result = leakjax.invert(leakjax.observe(net(UNet), (images, maps)), attack="match", prior="none")
    assert result.certificates[0].status == "exact"
    assert np.array_equal(result.targets[0], maps[0])
    assert psnr(images[0], result.images[0]) > 150


def test_what_is_not_found_is_not_claimed():
    """Fewer weights than numbers of an image and its map."""
    images = photo(4)
    maps = luminance_maps(images)
    result = leakjax.invert(leakjax.observe(net(FCN, width=2), (images, maps)), attack="match", prior="none")
    right = np.array_equal(result.targets[0], maps[0]) if result.targets[0] is not None else False
    assert not right or psnr(images[0], result.images[0]) < 60
    assert result.certificates[0].status in ("failed", "ambiguous")


def truth_as_outcome(seen, images, maps, gradient_residual=0.0, **more):
    problem = problem_of(seen)
    layer = LayerInfo(
        name="network",
        unknowns=images.size,
        rank=images.size,
        rank_deficiency=0,
        condition=1.0,
        residual=0.0,
        pull_back_depth=0,
        steps=0,
        status="determined",
        solver="match",
    )
    candidate = Candidate(images[0], -1, gradient_residual, maps[0])
    outcome = Outcome((candidate,), (layer,), np.ones(images.shape[1:]), **more)
    with compute_in("float64"):
        return with_open_maps(problem, Monitor(), [outcome])[0], joint_rank(problem, images[0], maps[0])


class Circular(nnx.Module):
    """Circular convolutions see no position: shifts of image and map together leave the gradient as it is."""

    def __init__(self, rngs, stride=1, bias=True):
        options = {"padding": "CIRCULAR", "use_bias": bias, "rngs": rngs}
        self.conv = nnx.Conv(3, 40, (3, 3), strides=stride, **options)
        self.head = nnx.Conv(40, 2, (3, 3), **options)

    def __call__(self, x):
        return self.head(jnp.tanh(self.conv(x)))


def test_an_image_that_moves_with_its_map_is_not_exact():
    images = np.random.default_rng(0).uniform(size=(1, 6, 6, 3))
    maps = luminance_maps(images)
    seen = leakjax.observe(Circular(nnx.Rngs(0)), (images, maps))
    outcome, _ = truth_as_outcome(seen, images, maps)
    assert outcome.open_map is not None
    assert "shift" in outcome.open_map
    problem = problem_of(seen)
    (certificate,) = certify_together([certify(problem, outcome, images.size)], [outcome], 1)
    assert certificate.status == "ambiguous"
    assert "shift" in certificate.reason
    assert agreed(outcome, problem.gap) is None


def test_noise_does_not_hide_that_an_image_moves_with_its_map():
    images = np.random.default_rng(0).uniform(size=(1, 6, 6, 3))
    maps = luminance_maps(images)
    seen = leakjax.observe(Circular(nnx.Rngs(0)), (images, maps))
    outcome, _ = truth_as_outcome(seen, images, maps, gradient_residual=1e-3, psnr_estimate=60.0)
    assert "shift" in outcome.open_map
    (certificate,) = certify_together([certify(problem_of(seen), outcome, images.size)], [outcome], 1)
    assert certificate.status == "ambiguous"
    assert certificate.psnr_estimate is None


def test_maps_of_another_size_move_with_the_image():
    """By one entry where the image moves by two."""
    rng = np.random.default_rng(0)
    images, maps = rng.uniform(size=(1, 8, 8, 3)), rng.integers(0, 2, (1, 4, 4))
    seen = leakjax.observe(Circular(nnx.Rngs(0), stride=2), (images, maps))
    outcome, _ = truth_as_outcome(seen, images, maps)
    assert "shift" in outcome.open_map


def test_an_odd_network_exchanges_two_classes():
    """Logits -z of -x: with the classes exchanged the gradient of even parameters is the same."""
    rng = np.random.default_rng(0)
    images, maps = rng.uniform(-1, 1, size=(1, 4, 4, 3)), rng.integers(0, 2, (1, 4, 4))
    module = Circular(nnx.Rngs(0), bias=False)
    outcome, _ = truth_as_outcome(leakjax.observe(module, (images, maps), input_range=(-1.0, 1.0)), images, maps)
    assert "sign" in outcome.open_map
    bright = np.abs(images)  # within [0, 1] there is no -x
    outcome, _ = truth_as_outcome(leakjax.observe(module, (bright, maps)), bright, maps)
    assert "sign" not in outcome.open_map


def test_rank_of_image_and_map_together():
    images = photo(4)
    maps = luminance_maps(images, 3)
    outcome, found = truth_as_outcome(leakjax.observe(net(UNet, classes=3), (images, maps)), images, maps)
    assert found == (48 + 32, 48 + 32)
    assert outcome.open_map is None
    outcome, (rank, unknowns) = truth_as_outcome(
        leakjax.observe(net(FCN, width=1), (images, maps % 2)), images, maps % 2
    )
    assert rank < unknowns == 48 + 16
    assert f"{rank} of the 64" in outcome.open_map


def test_a_loss_of_integers_alone_asks_for_the_maps():
    def strict(outputs, target):
        assert jnp.issubdtype(target.dtype, jnp.integer)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, target))

    images = photo(4)
    maps = luminance_maps(images)
    seen = leakjax.observe(net(UNet), (images, maps), loss=strict)
    with pytest.raises(InputError, match="give them"):
        leakjax.invert(seen, attack="match")


def test_command_line(tmp_path, run):
    images = (255 * photo(4)).astype(np.uint8)
    np.savez(tmp_path / "photos.npz", images=images, labels=np.zeros(1, int))
    options = ["--model", "unet", "--input-shape", "4,4,3", "--images", str(tmp_path / "photos.npz")]
    options += ["--out", str(tmp_path / "out")]
    assert run("audit", *options, "--noise", "1e-3").exit_code == 0
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["leaked_dimensions"] == 48
    assert run("invert", *options, "--labels", "map").exit_code == 0
    (example,) = json.loads((tmp_path / "out" / "report.json").read_text())["examples"]
    assert example["certificate"]["status"] == "exact"
    assert example["psnr"] > 150
    assert example["target"] == luminance_maps(images)[0].tolist()


def test_a_u_net_takes_even_sides():
    with pytest.raises(InputError, match="must be even, got"):
        net(UNet)(jnp.zeros((1, 6, 5, 3)))


def test_labels_of_another_shape_are_refused_before_a_model_is_read(monkeypatch):
    image = photo(8)
    seen = leakjax.observe(net(UNet), (image, luminance_maps(image)))
    monkeypatch.setattr("leakjax.preparation.read_chain", None)
    with pytest.raises(InputError, match="labels must be 1 integers"):
        leakjax.invert(seen, labels=[3])
