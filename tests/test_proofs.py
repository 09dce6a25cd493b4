"""What a certificate proves: `global`, `local`, or that other images have the same gradient."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_nets import convolve, one_layer, patches, pooled
from test_property import psnr

from benchmarks.study_judge import judge
from benchmarks.study_nets import architecture
from leakjax import invert, observe, undetermined_directions
from leakjax.attacks.certificates.moves import moves


def nearest(answer, truth, k=0):
    return max(psnr(candidate.image, truth) for candidate in answer.candidates[k])


def test_layers_that_determine_their_inputs_prove_an_image_globally(rng):
    observation = observe(one_layer(rng, 5), (rng.uniform(size=(1, 6, 6, 1)), np.array([2])))
    assert [c.proof for c in invert(observation, attack="copa").certificates] == ["global"]
    assert [c.proof for c in invert(observation, attack="match").certificates] == ["local"]


@pytest.mark.parametrize("attack", ["match", "copa"])
def test_patches_in_any_order_are_all_candidates(rng, attack):
    images = rng.uniform(size=(1, 4, 4, 1))
    answer = invert(observe(patches(rng), (images, np.array([1]))), attack=attack)
    (certificate,) = answer.certificates
    assert certificate.status == "ambiguous"
    assert "order of patches (2x2)" in certificate.symmetry
    assert len(answer.candidates[0]) == 24
    assert nearest(answer, images[0]) > 100
    assert answer.determined.max() == 0
    assert "24 images" in certificate.reason


def test_an_even_network_has_both_signs_as_candidates(rng):
    images = rng.uniform(-1, 1, size=(1, 6, 6, 1))
    model = one_layer(rng, 5, bias=False, activation="square")
    answer = invert(observe(model, (images, np.array([1])), input_range=(-1.0, 1.0)))
    assert answer.certificates[0].status == "ambiguous"
    assert answer.certificates[0].symmetry.startswith("sign")
    assert nearest(answer, images[0]) > 200
    assert answer.determined.max() == 0
    inside = np.abs(images)
    answer = invert(observe(model, (inside, np.array([1]))))  # -x is no image in [0, 1]
    assert answer.certificates[0].status == "exact"
    assert psnr(answer.images, inside) > 200


@pytest.mark.slow
def test_a_figure_on_black_behind_pooling_may_stand_anywhere(rng):
    images = np.zeros((1, 12, 12, 1))
    images[0, 4:8, 4:7, 0] = rng.uniform(size=(4, 3))
    observation = observe(pooled(rng), (images, np.array([1])))
    answer = invert(observation, attack="match")
    (certificate,) = answer.certificates
    assert certificate.status != "exact"
    assert answer.determined.max() == 0
    if certificate.status == "ambiguous":
        flat = undetermined_directions(observation, answer).reshape(-1, images.size)
        assert certificate.leaked_dimensions == images.size - len(flat)
        error = (answer.images - images).ravel()
        assert np.sum((error - flat.T @ (flat @ error)) ** 2) <= 1e-6 * np.sum(error**2)


def test_what_an_odd_network_leaves_open_is_not_called_determined(rng):
    params = {"k": rng.normal(0, 0.4, (3, 3, 1, 10)), "w": rng.normal(0, 0.3, (160, 1))}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(convolve(x, p["k"])).reshape(len(x), -1) @ p["w"])

    images = rng.uniform(-0.5, 0.5, size=(1, 6, 6, 1))
    options = {"loss": "sigmoid_binary_cross_entropy", "input_range": (-0.5, 0.5)}
    answer = invert(observe((apply, params), (images, np.array([1])), **options))
    assert answer.certificates[0].status == "ambiguous"
    assert len(answer.candidates[0]) == 2
    assert answer.determined.max() == 0
    assert answer.label_sources == ("guessed",)


def test_a_layer_behind_an_activation_without_inverse_is_solved_with_it(rng):
    params = one_layer(rng, 5)[1]

    def apply(p, x):
        z = jnp.sin(2 * (convolve(x, p["k"]) + p["b"].reshape(1, 1, 1, -1)))
        return z.reshape(len(x), -1) @ p["w"] + p["c"][None]

    images = rng.uniform(size=(2, 6, 6, 1))
    answer = invert(observe((apply, params), (images, np.array([1, 4]))), attack="copa")
    assert [c.status for c in answer.certificates] == ["exact", "exact"]
    assert min(psnr(found, truth) for found, truth in zip(answer.images, images, strict=True)) > 200


def test_the_seed_moves_the_starts_of_match(rng):
    images = rng.uniform(size=(1, 6, 6, 1))
    observation = observe(one_layer(rng, 5), (images, np.array([1])))
    found = [invert(observation, attack="match", seed=seed).images for seed in (0, 0, 5)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])
    assert all(psnr(x, images) > 200 for x in found)


@pytest.mark.parametrize("shape", [(6, 6, 2), (5, 3), (7,), (4, 6, 1)])
def test_moves_only_move(shape, rng):
    x = rng.uniform(size=shape)
    before = x.copy()
    for move in moves(shape, (0.0, 1.0)):
        moved = move.apply(x)
        assert moved.shape == shape
        if move.name == "signs of parts":
            assert np.all((moved == x) | (moved == -x) | (moved == 1 - x))
            continue
        values = {"sign": -x, "sign about mid-range": 1 - x}.get(move.name, x)
        np.testing.assert_array_equal(np.sort(moved, axis=None), np.sort(values, axis=None))
    np.testing.assert_array_equal(x, before)


def test_an_answer_of_few_digits_is_moved_all_the_same():
    """A figure on black behind pooling, condition 3e9: the answer's own error is more than what a shift changes."""
    net = architecture(35)
    images, labels = net.images(0, 2), net.label_draws(0, 2)
    observation = observe((net.apply, net.params(0)), (images, labels))
    answer = invert(observation, attack="match")
    assert {v.wrong for v in judge(observation, answer, images, labels)} == {None}
    assert answer.certificates[1].symmetry == "shift"
