"""Integers between layers: no activation acts on them, and who reads the model layer by layer is told so."""

import jax.numpy as jnp
import numpy as np
import pytest

import leakjax
from leakjax.errors import UnreadableModelError
from leakjax.models.reader import read_model
from leakjax.segments.chain import read_segments

DRAW = np.random.default_rng(0)
IMAGES, LABELS = DRAW.uniform(size=(1, 4, 4, 1)), np.array([2])


def flat(x):
    return x.reshape(x.shape[0], -1)


def looked_up(p, x):
    """The row of the largest entry."""
    return p["v"][jnp.argmax(flat(x) @ p["w"], 1)]


def looked_up_by_pixel(p, x):
    return p["e"][(7 * flat(x)).astype(int)].reshape(x.shape[0], -1) @ p["u"]


SIZES = {"w": (16, 8), "v": (8, 3), "e": (8, 2), "u": (32, 3)}
NETS = {looked_up: "wv", looked_up_by_pixel: "eu"}


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
@pytest.mark.parametrize("attack", ["copa", "rgap"])
def test_a_layerwise_attack_says_so(net, attack):
    params = {name: DRAW.normal(size=SIZES[name]) for name in NETS[net]}
    with pytest.raises(UnreadableModelError) as caught:
        read_segments(read_model((net, params)), (4, 4, 1), "float64")
    assert "cannot read" in str(caught.value)
    observation = leakjax.observe((net, params), (IMAGES, LABELS))
    with pytest.raises(UnreadableModelError):
        leakjax.invert(observation, attack=attack)


def test_matching_and_audits_go_on_without_layers():
    params = {name: DRAW.normal(size=SIZES[name]) for name in "wv"}
    observation = leakjax.observe((looked_up, params), (IMAGES, LABELS))
    assert leakjax.invert(observation, attack="match").certificates[0].status != "exact"
    assert leakjax.audit((looked_up, params), (4, 4, 1)).verdict == "unknown"
