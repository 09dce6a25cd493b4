"""Heads: labels, dL/dz and inputs of the last segment from its gradient alone; the second root; the honest failures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import brentq

from leakjax import InputError, invert, observe, read_model
from leakjax.attacks.heads.single import bias_path, read_head
from leakjax.attacks.heads.wanted import Wanted
from leakjax.models.losses import LOSSES, labels_of, read_loss
from leakjax.segments.chain import read_segments

LOGITS = {"identity": lambda z: z, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "leaky_relu": jax.nn.leaky_relu}
SIZE = 7


def head_of(rng, outputs, *, bias, logits="identity", scale=0.5):
    params = {"kernel": rng.normal(0, scale, (SIZE, outputs))}
    if bias:
        params["bias"] = rng.normal(0, 0.3, outputs)

    def apply(p, x):
        z = x @ p["kernel"]
        return LOGITS[logits](z + p["bias"][None] if "bias" in p else z)

    model = read_model((apply, params)).astype(jnp.float64)
    (segment,) = read_segments(model, (SIZE,), jnp.float64).segments
    return segment, model


def gradient_of(model, loss, x, label):
    """Gradients with a leading victim axis of 1, and dL/dz where z is the kernel's product."""

    def value(params):
        return read_loss(loss)(model.apply(params, x)[0], label)

    return {p: np.asarray(g)[None] for p, g in jax.grad(value)(model.params).items()}


def informing(rng, model, loss, label):
    """An input at which the gradient is not zero, as that of a hinge may be."""
    while True:
        x = jnp.asarray(rng.uniform(size=(1, SIZE)))
        if np.any(gradient_of(model, loss, x, label)["kernel"]):
            return x


def read(segment, model, gradients, loss, labels=None):
    outputs = int(np.prod(segment.output.shape))
    wanted = Wanted(labels, tuple(range(labels_of(outputs))))
    reading = read_head(segment, model.variables, gradients, loss, wanted=wanted, tolerance=1e-15, accept=1e-8)
    return reading.candidates


def off(a, b):
    return np.linalg.norm(np.ravel(a) - np.ravel(b)) / np.linalg.norm(b)


def outputs_for(loss):
    several = ("softmax_cross_entropy", "poly_loss_cross_entropy", "multiclass_hinge_loss")
    return [2, 5] if loss.partition(":")[0] in several else [1, 4]


PARAMETERS = (
    "softmax_cross_entropy:label_smoothing=0.2",
    "sigmoid_binary_cross_entropy:label_smoothing=0.1,pos_weight=3",
    "sigmoid_focal_loss:gamma=1,alpha=0.25",
    "huber_loss:delta=0.3",
)
CASES = [(loss, outputs, "identity") for loss in (*LOSSES, *PARAMETERS) for outputs in outputs_for(loss)]
CASES += [
    ("softmax_cross_entropy", 4, "tanh"),
    ("softmax_cross_entropy", 3, "sigmoid"),
    ("softmax_cross_entropy", 3, "leaky_relu"),
    ("sigmoid_binary_cross_entropy", 1, "tanh"),
    ("sigmoid_binary_cross_entropy", 3, "leaky_relu"),
    ("squared_error", 3, "sigmoid"),
    ("squared_error", 1, "tanh"),
]


@pytest.mark.parametrize(("loss", "outputs", "logits"), CASES)
def test_with_a_bias_everything_is_recovered(loss, outputs, logits, rng):
    segment, model = head_of(rng, outputs, bias=True, logits=logits)
    assert bias_path(segment, model.variables) == "bias"
    for label in range(labels_of(outputs)):
        x = informing(rng, model, loss, label)
        sent = {k: gradient_of(model, loss, x, k)["kernel"] for k in range(labels_of(outputs))}
        alike = [k for k, g in sent.items() if off(g, sent[label]) < 1e-9]  # both ends of a Huber loss, for one
        found = read(segment, model, gradient_of(model, loss, x, label), loss)
        assert [c.label for c in found] == alike
        for one in found:
            assert one.victim == 0
            assert off(one.x, x) < 1e-9
            assert one.residual < 1e-9


@pytest.mark.parametrize(("loss", "outputs", "logits"), CASES)
def test_without_a_bias_the_truth_is_among_the_candidates(loss, outputs, logits, rng):
    segment, model = head_of(rng, outputs, bias=False, logits=logits)
    assert bias_path(segment, model.variables) is None
    for label in {0, labels_of(outputs) - 1}:
        x = informing(rng, model, loss, label)
        gradients = gradient_of(model, loss, x, label)
        candidates = read(segment, model, gradients, loss)
        assert [c for c in candidates if c.label == label and off(c.x, x) < 1e-7]
        for c in candidates:  # every one of them explains the gradient
            again = gradient_of(model, loss, jnp.asarray(c.x), c.label)
            assert off(again["kernel"], gradients["kernel"]) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_softmax_labels_need_no_guessing(bias, rng):
    """Several victims at once; one negative entry of dz is the label."""
    segment, model = head_of(rng, 6, bias=bias)
    xs, labels = rng.uniform(size=(6, 1, SIZE)), rng.permutation(6)
    sent = [gradient_of(model, "softmax_cross_entropy", jnp.asarray(x), y) for x, y in zip(xs, labels, strict=True)]
    stacked = {p: np.concatenate([g[p] for g in sent]) for p in model.params}
    candidates = read(segment, model, stacked, "softmax_cross_entropy")
    assert {c.victim for c in candidates} == set(range(6))
    for c in candidates:
        assert c.label == labels[c.victim]
    for v in range(6):
        assert min(off(c.x, xs[v]) for c in candidates if c.victim == v) < 1e-7


def test_a_given_label_is_obeyed(rng):
    segment, model = head_of(rng, 3, bias=True)
    x = jnp.asarray(rng.uniform(size=(1, SIZE)))
    gradients = gradient_of(model, "softmax_cross_entropy", x, 2)
    (right,) = read(segment, model, gradients, "softmax_cross_entropy", np.array([2]))
    (wrong,) = read(segment, model, gradients, "softmax_cross_entropy", np.array([0]))
    assert right.label == 2
    assert wrong.label == 0
    assert right.residual < 1e-9 < 1e-2 < wrong.residual


def roots(c):
    """All u with -u / (1 + e^u) = c: R-GAP's scalar equation, here by scipy."""

    def excess(u):
        return -u / (1.0 + np.exp(u)) - c

    lowest = 1.2784645427610738  # where -u / (1 + e^u) is least: -0.2785
    found = [brentq(excess, -60.0, lowest, xtol=1e-15)]
    if c < 0:
        found.append(brentq(excess, lowest, 60.0, xtol=1e-15))
    return found


@functools.cache
def logistic_head():
    """One segment for all cases: its programs compile once."""
    return head_of(np.random.default_rng(11), 1, bias=False)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("logit", [-3.0, -0.4, 0.4, 1.0, 2.2, 5.0])
def test_one_logistic_output_has_the_roots_of_the_paper(logit, label, rng):
    """u = +-z for label 1 or 0, and u dL/du = <g, w> = -u / (1 + e^u): one root for c >= 0, two below.

    The image is only known up to its sign times a label: both of each root, x with y and -x with 1 - y.
    """
    segment, model = logistic_head()
    kernel = np.asarray(model.params["kernel"])[:, 0]
    x = rng.uniform(size=SIZE)
    x *= logit / (x @ kernel)
    gradients = gradient_of(model, "sigmoid_binary_cross_entropy", jnp.asarray(x[None]), label)
    c = float(gradients["kernel"].ravel() @ kernel)
    u = logit if label == 1 else -logit
    assert c == pytest.approx(-u / (1 + np.exp(u)))

    expected = roots(c)
    assert len(expected) == (1 if c >= 0 else 2)
    assert min(abs(r - u) for r in expected) < 1e-9
    candidates = read(segment, model, gradients, "sigmoid_binary_cross_entropy")
    found = sorted((k.label, float(k.x.ravel() @ kernel) * (1 if k.label == 1 else -1)) for k in candidates)
    wanted = sorted((y, r) for y in (0, 1) for r in expected)
    assert [y for y, _ in found] == [y for y, _ in wanted]
    np.testing.assert_allclose([r for _, r in found], [r for _, r in wanted], rtol=1e-7)
    assert min(off(k.x, x) for k in candidates if k.label == label) < 1e-7


def test_squared_error_without_a_bias(rng):
    """dz = 2 (z - onehot) / K has no tell-tale sign: every label is tried and only true roots stand."""
    segment, model = head_of(rng, 4, bias=False)
    x = jnp.asarray(rng.uniform(size=(1, SIZE)))
    gradients = gradient_of(model, "squared_error", x, 1)
    candidates = read(segment, model, gradients, "squared_error")
    best = min(candidates, key=lambda c: c.residual)
    assert best.label == 1
    assert off(best.x, x) < 1e-8


@functools.cache
def dense_net(bias):
    """Two dense layers on 4 x 3 images, LeakyReLU between them; one model for all tests, to compile it once."""
    rng = np.random.default_rng(3)
    params = {"a": {"kernel": rng.normal(0, 0.4, (12, 20))}, "b": {"kernel": rng.normal(0, 0.4, (20, 4))}}
    if bias:
        params["b"]["bias"] = rng.normal(0, 0.2, 4)

    def apply(p, x):
        h = jax.nn.leaky_relu(x.reshape(x.shape[0], -1) @ p["a"]["kernel"], 0.2)
        z = h @ p["b"]["kernel"]
        return z + p["b"]["bias"][None] if "bias" in p["b"] else z

    return read_model((apply, params)).astype(jnp.float64)


def observed(bias, images, labels, **options):
    observation = observe(dense_net(bias), (images, np.array(labels)), **options)
    return dataclasses.replace(observation, model=dense_net(bias))


@pytest.mark.parametrize("labels", [[0, 2], [1, 1]])
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_passed_off_as_one_example_is_never_exact(bias, labels, rng):
    """A gradient averaged over two images that claims to be of one: no image explains it, and the report says so."""
    honest = observed(bias, rng.uniform(size=(2, 4, 3, 1)), labels, batch_size=2)
    answer = invert(dataclasses.replace(honest, examples=1), attack="rgap")
    assert answer.certificates[0].status == "failed"
    assert np.all(answer.determined == 0)


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_network_and_one_example_is_exact(bias, rng):
    """The control of the test above."""
    image = rng.uniform(size=(1, 4, 3, 1))
    answer = invert(observed(bias, image, [2]), attack="rgap")
    assert answer.certificates[0].status == "exact"
    assert answer.labels.tolist() == [2]
    assert off(answer.images, image) < 1e-8


def test_inversion_does_not_need_x64_switched_on(rng):
    image = rng.uniform(size=(1, 4, 3, 1))
    observation = observed(True, image, [1])
    with jax.enable_x64(False):
        answer = invert(observation, attack="rgap")
        assert jnp.zeros(1).dtype == jnp.float32  # and the setting is as it was
    assert answer.images.dtype == np.float64
    assert off(answer.images, image) < 1e-8


@pytest.mark.parametrize("bias", [True, False])
def test_labels_that_give_one_gradient_are_all_listed(bias, rng):
    """Dead ReLU logits: dL/dz of two labels is the same, and nothing can tell them apart."""
    kernel = np.abs(rng.normal(0, 0.5, (SIZE, 4))) * np.array([1.0, 1.0, -1.0, -1.0])
    params = {"kernel": kernel, "bias": np.zeros(4)} if bias else {"kernel": kernel}

    def apply(p, x):
        return jax.nn.relu(x @ p["kernel"] + (p["bias"][None] if bias else 0.0))

    model = read_model((apply, params)).astype(jnp.float64)
    (segment,) = read_segments(model, (SIZE,), jnp.float64).segments
    x = np.abs(rng.normal(size=(1, SIZE)))
    gradients = gradient_of(model, "softmax_cross_entropy", x, 3)
    assert {2, 3} <= {c.label for c in read(segment, model, gradients, "softmax_cross_entropy")}


def test_no_candidate_is_a_failure_and_no_crash(rng):
    params = {f"w{k}": rng.normal(0, 0.5, (6, 6)) for k in range(3)} | {"head": rng.normal(0, 0.5, (6, 1))}

    def apply(p, x):
        for k in range(3):
            x = jnp.tanh(x @ p[f"w{k}"])
        return jnp.tanh(x @ p["head"])

    observation = observe((apply, params), (rng.uniform(size=(1, 6)), np.array([1])), loss="squared_error")
    noisy = {p: g + rng.normal(0, 10 * np.abs(g).max(), g.shape) for p, g in observation.gradients.items()}
    answer = invert(dataclasses.replace(observation, gradients=noisy))
    assert answer.certificates[0].status == "failed"
    assert np.all(np.isfinite(answer.images))


def test_half_precision_noise_is_never_exact(rng):
    params = {"kernel": rng.normal(0, 0.5, (20, 1)), "bias": np.zeros(1)}
    image = rng.uniform(size=(1, 20))
    observation = observe(
        (lambda p, x: x @ p["kernel"] + p["bias"][None], params),
        (image, np.array([0])),
        loss="sigmoid_binary_cross_entropy",
    )
    noisy = {p: (g * (1 + 0.3 * rng.normal(size=g.shape))).astype(np.float16) for p, g in observation.gradients.items()}
    answer = invert(dataclasses.replace(observation, gradients=noisy, precision="float16"))
    assert answer.certificates[0].status == "failed"


def test_a_model_that_ends_without_parameters_is_refused(rng):
    def apply(p, x):
        return jnp.mean(jnp.tanh(x @ p["kernel"]), axis=1)

    observation = observe((apply, {"kernel": rng.normal(size=(3, 4))}), (rng.uniform(size=(1, 5, 3)), np.array([1])))
    with pytest.raises(InputError, match="no head to start from"):
        invert(observation, attack="rgap")


def test_two_images_in_range_with_one_gradient_are_both_given():
    """Bias-free, one logit, LeakyReLU: the image scaled by u'/u has the very same gradient (R-GAP, section 3.2)."""
    rng = np.random.default_rng(8)
    params = {"a": rng.normal(0, 0.5, (12, 20)), "b": rng.normal(0, 0.5, (20, 1))}

    def apply(p, x):
        return jax.nn.leaky_relu(x @ p["a"], 0.2) @ p["b"]

    image = rng.uniform(0.1, 0.6, size=(1, 12))
    params["b"] *= 1.1 / float(apply(params, image)[0, 0])  # u = 1.1 of label 1; the other root is near 1.48
    observation = observe((apply, params), (image, np.array([1])), loss="sigmoid_binary_cross_entropy")
    answer = invert(observation)
    assert answer.certificates[0].status == "ambiguous"
    images = sorted((c.image for c in answer.candidates[0]), key=lambda x: float(x.sum()))
    assert len(images) == 2
    np.testing.assert_allclose(images[0], image[0], atol=1e-12)
    ratio = images[1] / image[0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    assert 1.3 < ratio[0] < 1.4
    again = observe((apply, params), (images[1][None], np.array([1])), loss="sigmoid_binary_cross_entropy")
    for path, g in observation.gradients.items():
        np.testing.assert_allclose(again.gradients[path], g, rtol=1e-9, atol=1e-14)


def test_a_model_of_half_precision_is_inverted_in_float64(rng):
    """Its own roundings are taken out of the model; the gradient keeps them, and no certificate is `exact`."""

    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(2, 6, (3, 3), padding="VALID", dtype=jnp.bfloat16, rngs=rngs)
            self.head = nnx.Linear(96, 4, dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.tanh(self.conv(x)).reshape(len(x), -1))

    x = rng.uniform(size=(1, 6, 6, 2))
    answer = invert(observe(Net(), (x, np.array([1])), dtype="float32"), attack="match")
    assert answer.certificates[0].status != "exact"
    assert np.sqrt(np.mean((answer.images - x) ** 2)) < 0.05
