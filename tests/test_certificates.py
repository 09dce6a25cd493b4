"""No certificate is wrong: random architectures, deficient ones and such with symmetries among them.

`exact`: the truth is below 60 dB in no case. `ambiguous`: of the squared error at most 1e-6 lies outside the directions
and candidates that are said to be open, and their number is the rank that the Jacobian has there.
"""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_property import psnr

from leakjax import InputError, UnreadableModelError, invert, observe, undetermined_directions

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "leaky_relu": lambda z: jnp.where(z > 0, z, 0.2 * z),
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
}


def convolve(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(rng):
    """A random convolutional net on 6x6 images, often deficient; every third one has no bias and one logit."""
    activation = str(rng.choice(sorted(ACTIVATIONS)))
    depth, bare = int(rng.integers(1, 4)), bool(rng.random() < 1 / 3)
    act, channels, side = ACTIVATIONS[activation], int(rng.integers(1, 4)), 6
    shape, params, plan = (side, side, channels), {}, []
    for k in range(depth):
        filters, kernel = int(rng.integers(1, 9)), int(rng.integers(2, 4))
        stride, padding = int(rng.integers(1, 3)), str(rng.choice(["SAME", "VALID"]))
        if padding == "VALID" and side < kernel + 1:
            padding = "SAME"
        params[f"w{k}"] = rng.normal(0, (kernel**2 * channels) ** -0.5, (kernel, kernel, channels, filters))
        if not bare:
            params[f"b{k}"] = rng.normal(0, 0.2, filters)
        plan.append((stride, padding))
        side, channels = -(-(side if padding == "SAME" else side - kernel + 1) // stride), filters
    outputs = 1 if bare else int(rng.integers(2, 6))
    params["v"] = rng.normal(0, (side**2 * channels) ** -0.5, (side**2 * channels, outputs))
    if not bare:
        params["c"] = rng.normal(0, 0.2, outputs)

    def apply(p, x):
        for k, (stride, padding) in enumerate(plan):
            x = convolve(x, p[f"w{k}"], stride, padding)
            x = act(x if bare else x + p[f"b{k}"].reshape(1, 1, 1, -1))
        z = x.reshape(x.shape[0], -1) @ p["v"]
        return z if bare else z + p["c"][None]

    loss = "sigmoid_binary_cross_entropy" if bare else "softmax_cross_entropy"
    return activation, (apply, params), shape, max(outputs, 2), loss


def judge_batches(observation, answer, images, labels):
    """`judge` for gradients of several examples, which have no order of their own."""
    found, examples = [], observation.examples
    for v in range(observation.victims):
        group = slice(v * examples, (v + 1) * examples)
        certificate, mine, truth = answer.certificates[v * examples], answer.candidates[group], images[group]
        orders = [truth[list(order)] for order in itertools.permutations(range(examples))]
        answers = list(itertools.product(*mine))
        best = max((psnr(np.stack([c.image for c in a]), o) for a in answers for o in orders), default=-np.inf)
        if certificate.status == "exact":
            assert best >= 60, (best, certificate, answer.layers[v * examples])
            assert sorted(answer.labels[group]) == sorted(labels[group])
        if certificate.status == "ambiguous" and best < 60:
            open_directions = undetermined_directions(observation, answer, v)
            flat = open_directions.reshape(len(open_directions), -1)
            assert certificate.leaked_dimensions == certificate.unknowns - len(flat)
            errors = [(np.stack([c.image for c in a]) - o).ravel() for a in answers for o in orders]
            outside = min(np.sum((e - flat.T @ (flat @ e)) ** 2) / np.sum(e**2) for e in errors)
            assert outside <= 1e-6, (outside, certificate, answer.layers[v * examples])
        found += [answer.certificates[v * examples + b].status for b in range(examples)]
    return found


def judge(observation, answer, images, labels):
    """The statuses of all victims; raises where one is wrong."""
    if observation.examples > 1:
        return judge_batches(observation, answer, images, labels)
    found = []
    for k, certificate in enumerate(answer.certificates):
        candidates = answer.candidates[k]
        best = max((psnr(c.image, images[k]) for c in candidates), default=-np.inf)
        if certificate.status == "exact":
            assert len(candidates) == 1
            assert best >= 60, (best, certificate, answer.layers[k])
            assert answer.labels[k] == labels[k]
        if certificate.status == "ambiguous" and best < 60:
            open_directions = undetermined_directions(observation, answer, k)
            assert certificate.leaked_dimensions == certificate.unknowns - len(open_directions)
            flat = open_directions.reshape(len(open_directions), -1)
            outside = []
            for c in candidates:
                error = (c.image - images[k]).ravel()
                outside.append(np.sum((error - flat.T @ (flat @ error)) ** 2) / np.sum(error**2))
            assert min(outside) <= 1e-6, (outside, certificate, answer.layers[k])
        found.append(certificate.status)
    return found


def study(first, count, attacks, victims, examples=1):
    statuses = collections.Counter()
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        name, model, shape, labels_of, loss = draw(rng)
        images, labels = rng.uniform(size=(victims, *shape)), rng.integers(0, labels_of, victims)
        try:
            observation = observe(model, (images, labels), loss=loss, batch_size=examples)
            answers = [(attack, invert(observation, attack=attack)) for attack in attacks]
        except (InputError, UnreadableModelError):
            statuses["refused"] += 1
            continue
        for attack, answer in answers:
            try:
                for status in judge(observation, answer, images, labels):
                    statuses[status] += 1
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {name}, {loss}, {attack}: {error}") from error
        jax.clear_caches()
    return statuses


def test_certificates_of_random_networks():
    """Rates are at least 90 % of those measured: 8 exact and 4 ambiguous of 12."""
    statuses = study(0, 3, ["copa", "match"], victims=2)
    assert statuses["exact"] >= 8  # 7.2
    assert statuses["exact"] + statuses["ambiguous"] >= 11  # 10.8


def test_every_layerwise_answer_of_a_deficient_network_stays_a_candidate():
    """Two roots and two signs, none of whose images needs to lie inside the range as long as directions are open."""
    assert set(study(425, 1, ["copa", "match"], victims=4)) == {"ambiguous"}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_certificates_of_many_random_networks(part):
    statuses = study(1000 + 13 * part, 13, ["copa", "match"], victims=4)
    assert statuses["exact"] + statuses["ambiguous"] >= 10


def test_certificates_of_random_networks_and_batches():
    """Rates are at least 90 % of those measured: of two networks one is refused, all of the other's are exact."""
    statuses = study(40, 2, ["copa"], victims=4, examples=2)
    assert statuses["exact"] >= 4  # 3.6


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_certificates_of_many_random_networks_and_batches(part):
    statuses = study(3000 + 20 * part, 20, ["copa"], victims=4, examples=2)
    assert statuses["exact"] + statuses["ambiguous"] >= 10
