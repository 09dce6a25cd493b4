"""Activations: recognized by value, inverted where the output determines the input, and masked where it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leakjax.models.activations import ACTIVATIONS, build_activation, parse_activation

NON_MONOTONE = ("gelu", "silu")
MONOTONE = [name for name in ACTIVATIONS if name not in NON_MONOTONE]


def build(function, dtype=jnp.float64):
    return build_activation(lambda _, z: function(z), {}, dtype)


def sigmoid_by_hand(z):
    return 0.5 * (1.0 + jnp.tanh(0.5 * z))


# The members written the way users write them, with the name (and parameter) that they are recognized under.
WRITTEN_DIFFERENTLY = {
    "identity": (lambda z: 1.0 * z, "identity"),
    "relu, maximum": (lambda z: jnp.maximum(z, 0.0), "relu"),
    "relu, where": (lambda z: jnp.where(z > 0, z, jnp.zeros_like(z)), "relu"),
    "relu, product": (lambda z: z * (z > 0), "relu"),
    "leaky_relu, maximum": (lambda z: jnp.maximum(z, 0.2 * z), "leaky_relu:0.2"),
    "leaky_relu, two relus": (lambda z: jax.nn.relu(z) - 0.05 * jax.nn.relu(-z), "leaky_relu:0.05"),
    "leaky_relu, absolute value": (lambda z: 0.505 * z + 0.495 * jnp.abs(z), "leaky_relu:0.01"),
    "elu, where": (lambda z: jnp.where(z > 0, z, 0.7 * jnp.expm1(jnp.minimum(z, 0.0))), "elu:0.7"),
    "selu, by its constants": (
        lambda z: 1.0507009873554805 * jnp.where(z > 0, z, 1.6732632423543772 * jnp.expm1(jnp.minimum(z, 0.0))),
        "selu",
    ),
    "celu, from elu": (lambda z: jnp.maximum(z, 0.0) + 1.5 * jnp.expm1(jnp.minimum(z, 0.0) / 1.5), "celu:1.5"),
    "softplus, logaddexp": (lambda z: jnp.logaddexp(z, 0.0), "softplus"),
    "sigmoid, exp": (lambda z: 1.0 / (1.0 + jnp.exp(-z)), "sigmoid"),
    "tanh, exp": (lambda z: 1.0 - 2.0 / (jnp.exp(2.0 * z) + 1.0), None),  # cancels near 0: any name, or none
    "tanh, two": (lambda z: -jnp.tanh(-z), "tanh"),
    "hard_tanh, clip": (lambda z: jnp.clip(z, -1.0, 1.0), "hard_tanh"),
    "soft_sign": (lambda z: z / (1.0 + jnp.abs(z)), "soft_sign"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_members_are_recognized_by_their_own_values(name):
    activation = build(parse_activation(name))
    if name in NON_MONOTONE:
        assert activation.kind is None
        assert {p.trend for p in activation.pieces} >= {-1, 1}
    else:
        assert activation.kind is ACTIVATIONS[name] or activation.name.startswith("elu:1")  # celu:1 is elu:1
        assert activation.parameter == pytest.approx(ACTIVATIONS[name].default)


@pytest.mark.parametrize("name", WRITTEN_DIFFERENTLY)
def test_members_are_recognized_however_written(name):
    function, expected = WRITTEN_DIFFERENTLY[name]
    activation = build(function)
    if expected is None:
        assert activation.name in ("tanh", "elementwise")
    else:
        assert activation.name == expected


@pytest.mark.parametrize("slope", [0.01, 0.05, 0.3, 1.7])
def test_parameters_are_recovered(slope):
    activation = build(functools.partial(jax.nn.leaky_relu, negative_slope=slope))
    assert activation.parameter == pytest.approx(slope, rel=1e-14)
    assert build(functools.partial(jax.nn.elu, alpha=slope)).parameter == pytest.approx(slope, rel=1e-14)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: jnp.where(z > 0, z, 0.2 * z + 0.001),
        lambda z: jnp.tanh(1.001 * z),
        lambda z: jnp.maximum(z, 0.0) + 1e-6,
        lambda z: jnp.minimum(jnp.maximum(z, 0.0), 6.0),
        lambda z: jnp.clip(z, -0.99, 1.0),
    ],
)
def test_near_misses_are_not_recognized(function):
    assert build(function).kind is None


def test_a_function_of_parameters_is_never_taken_for_a_closed_form():
    activation = build_activation(
        lambda v, z: jnp.where(z > 0, z, v["slope"] * z), {"slope": jnp.asarray(0.2)}, jnp.float64, parametric=True
    )
    assert activation.kind is None
    z = jnp.asarray([-2.0, -0.1, 0.3])
    for slope in (0.2, 0.5):  # the same pieces serve other weights
        variables = {"slope": jnp.asarray(slope)}
        answer = activation.preimage(variables, activation.function(variables, z), 1e-12)
        assert np.all(answer.known)
        np.testing.assert_allclose(answer.value, z, rtol=1e-12)


def points(rng):
    """Both sides of 0 at many sizes, none so far out that float64 saturates the tails beyond use."""
    z = np.concatenate([rng.normal(size=60), np.geomspace(1e-3, 6.0, 20), -np.geomspace(1e-3, 6.0, 20)])
    return jnp.asarray(z)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "leaky_relu:0.01", "elu:0.3", "celu:2", "leaky_relu:3"])
def test_known_entries_are_the_true_ones(name, rng):
    """inverse(function(z)) == z and slope == act'(z) wherever the mask says known; never a wrong known value."""
    function = parse_activation(name)
    activation = build(function)
    z = points(rng)
    x = function(z)
    answer = activation.preimage({}, x, 1e-12)
    slope = jax.vmap(jax.grad(function))(z)
    known = np.asarray(answer.known)
    sensitivity = 1.0 / np.maximum(np.abs(np.asarray(slope)), 1e-300)
    error = np.abs(np.asarray(answer.value - z))
    allowed = 1e-13 * (1 + np.abs(np.asarray(z))) + 4e-16 * sensitivity * (1 + np.abs(np.asarray(x)))
    assert np.all(error[known] <= 20 * allowed[known])
    np.testing.assert_allclose(np.asarray(answer.slope)[known], np.asarray(slope)[known], rtol=1e-6, atol=1e-9)
    assert np.all(np.asarray(answer.value)[~known] == 0)
    assert np.all(np.asarray(answer.slope)[~known] == 0)
    assert np.all(np.asarray(answer.slope_known)[known])
    if name not in (*NON_MONOTONE, "relu", "hard_tanh"):
        assert np.all(known)


def test_zeros_of_relu_are_unknown_and_their_slope_is_known():
    activation = build(jax.nn.relu)
    answer = activation.preimage({}, jnp.asarray([0.0, -0.0, 1e-9, 0.5, 2.0]), 1e-8)
    assert answer.known.tolist() == [False, False, False, True, True]
    assert answer.slope_known.tolist() == [True] * 5
    assert answer.slope.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert answer.value.tolist() == [0.0, 0.0, 0.0, 0.5, 2.0]


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "hard_tanh", "soft_sign"])
def test_saturation_is_unknown(name):
    function = parse_activation(name)
    activation = build(function)
    low, high = ACTIVATIONS[name].domain(None)
    middle = 0.5 * (low + high) + 0.25
    for noise in (0.0, 1e-9):
        answer = activation.preimage({}, jnp.asarray([low, high, low - 1e-3, high + 1e-3, middle]), noise)
        assert answer.known.tolist() == [False] * 4 + [True]
        assert np.all(np.isfinite(answer.value))
        assert np.all(np.isfinite(answer.slope))
        assert answer.slope.tolist()[:4] == [0.0] * 4
    assert not activation.preimage({}, function(jnp.asarray([60.0])), 1e-15).known[0] or name == "soft_sign"


def test_an_elu_below_its_floor_is_unknown():
    activation = build(parse_activation("elu:0.5"))
    answer = activation.preimage({}, jnp.asarray([-0.5, -0.6, -0.4999, 1.0]), 1e-9)
    assert answer.known.tolist() == [False, False, True, True]


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "softplus", "elu", "hard_tanh"])
@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_the_noise_level_widens_the_unknown(name, noise):
    """An output within `noise` of the boundary of the domain may be on it: unknown; just beyond, known."""
    kind = ACTIVATIONS[name]
    activation = build(parse_activation(name))
    for boundary, inward in zip(kind.domain(kind.default), (1.0, -1.0), strict=True):
        if np.isfinite(boundary):
            x = jnp.asarray([boundary + inward * 0.9 * noise, boundary + inward * 1.1 * noise])
            assert activation.preimage({}, x, noise).known.tolist() == [False, True]


def test_the_noise_level_may_be_an_array_under_jit():
    activation = build(jax.nn.relu)
    known = jax.jit(lambda x, noise: activation.preimage({}, x, noise).known)
    x = jnp.asarray([1e-4, 1.0])
    assert known(x, jnp.asarray(1e-5)).tolist() == [True, True]
    assert known(x, jnp.asarray(1e-3)).tolist() == [False, True]


@pytest.mark.parametrize("name", NON_MONOTONE)
def test_ambiguous_entries_of_non_monotone_activations_are_masked(name):
    function = parse_activation(name)
    activation = build(function)
    grid = np.linspace(-12.0, 12.0, 200001)
    values = np.asarray(function(jnp.asarray(grid)))
    lowest = values.min()
    x = np.array([0.9 * lowest, 0.5 * lowest, 0.01 * lowest, 1e-3, 0.5, 3.0])
    answer = activation.preimage({}, jnp.asarray(x), 1e-10)
    assert answer.known.tolist() == [False, False, False, True, True, True]
    assert answer.slope_known.tolist() == [False, False, False, True, True, True]
    np.testing.assert_allclose(function(answer.value[3:]), x[3:], rtol=1e-12)
    below = activation.preimage({}, jnp.asarray([1.1 * lowest]), 1e-10)  # no preimage at all
    assert not below.known[0]


def mish(z):
    return z * jnp.tanh(jax.nn.softplus(z))


CUSTOM = {
    "arcsinh": (jnp.arcsinh, (-8.0, 8.0)),
    "cubic": (lambda z: z + z**3, (-3.0, 3.0)),
    "x + sin x / 2": (lambda z: z + 0.5 * jnp.sin(z), (-9.0, 9.0)),
    "falling": (lambda z: -2.0 * z - jnp.tanh(z), (-5.0, 5.0)),
    "softplus, sharp": (lambda z: jax.nn.softplus(3.0 * z) / 3.0, (-4.0, 6.0)),
    "softplus, shifted": (lambda z: jax.nn.softplus(z) - jnp.log(2.0), (-6.0, 6.0)),
    "squareplus": (jax.nn.squareplus, (-5.0, 5.0)),
    "scaled tanh": (lambda z: 1.7159 * jnp.tanh(2.0 * z / 3.0), (-4.0, 4.0)),
    "mish, its rising branch above 0": (mish, (0.01, 8.0)),
    "elu, by a cancelling exp(z) - 1": (lambda z: jnp.where(z > 0, z, jnp.exp(jnp.minimum(z, 0.0)) - 1.0), (-3.0, 3.0)),
    "sinh": (jnp.sinh, (-4.0, 4.0)),  # overflows on the grid
    "log1p, right": (lambda z: jnp.where(z > 0, jnp.log1p(z), z), (-5.0, 5.0)),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_monotone_functions_are_inverted_by_bracketing(name, rng):
    function, (low, high) = CUSTOM[name]
    activation = build(function)
    assert activation.kind is None
    z = jnp.asarray(rng.uniform(low, high, size=(3, 17)))
    answer = activation.preimage({}, function(z), 1e-13)
    slope = jax.vmap(jax.vmap(jax.grad(function)))(z)
    assert np.all(answer.known)
    assert np.all(np.abs(answer.value - z) <= 1e-13 * 10 + 1e-15 * (1 + np.abs(function(z))) / np.abs(slope))
    np.testing.assert_allclose(answer.slope, slope, rtol=1e-6)


def test_the_falling_branch_of_mish_is_masked():
    activation = build(mish)
    z = jnp.asarray([-4.0, -2.0, -0.5, -0.1])
    answer = activation.preimage({}, mish(z), 1e-10)
    assert not np.any(answer.known)
    assert not np.any(answer.slope_known)


def test_relu6_is_known_strictly_inside_and_its_flats_have_slope_0():
    activation = build(jax.nn.relu6)
    answer = activation.preimage({}, jnp.asarray([0.0, 1e-10, 0.5, 5.9, 6.0 - 1e-10, 6.0]), 1e-9)
    assert answer.known.tolist() == [False, False, True, True, False, False]
    assert answer.slope_known.tolist() == [True] * 6
    np.testing.assert_allclose(answer.slope, [0, 0, 1, 1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(answer.value, [0, 0, 0.5, 5.9, 0, 0], atol=1e-12)


@pytest.mark.parametrize(
    "function", [jnp.abs, jnp.square, lambda z: jnp.cos(0.02 * z), lambda z: jnp.sin(0.02 * z + 1.5)]
)
def test_even_and_periodic_functions_are_never_known(function):
    answer = build(function).preimage({}, function(jnp.asarray([-2.0, -0.3, 0.4, 1.1])), 1e-10)
    assert not np.any(answer.known)


@pytest.mark.parametrize("function", [jnp.sign, jnp.zeros_like, lambda z: jnp.floor(0.01 * z)])
def test_steps_are_never_known(function):
    z = jnp.asarray([-2.3, -0.3, 0.4, 1.1])
    assert not np.any(build(function).preimage({}, function(z), 1e-10).known)


def test_functions_undefined_on_one_side_give_no_known_nonsense():
    """log is NaN below 0: what is called known must still be the truth."""
    z = jnp.asarray([0.3, 1.0, 2.5])
    answer = build(jnp.log).preimage({}, jnp.log(z), 1e-12)
    known = np.asarray(answer.known)
    np.testing.assert_allclose(np.asarray(answer.value)[known], np.asarray(z)[known], rtol=1e-9)


def test_float32_activations_are_recognized_and_inverted():
    z = jnp.asarray([-1.5, -0.2, 0.4, 2.0], jnp.float32)
    for name in MONOTONE:
        activation = build(parse_activation(name), jnp.float32)
        assert activation.kind is not None, name
        answer = activation.preimage({}, activation.function({}, z), 1e-6)
        assert answer.value.dtype == jnp.float32
        np.testing.assert_allclose(answer.value[answer.known], z[answer.known], rtol=2e-5)


def test_bad_activation_names_say_what_to_do():
    with pytest.raises(ValueError, match="leaky_relu"):
        parse_activation("leaky-relu")
    with pytest.raises(ValueError, match="takes no parameter"):
        parse_activation("tanh:2")
    for text in ("leaky_relu:x", "leaky_relu:-1", "elu:nan"):
        with pytest.raises(ValueError, match="parameter"):
            parse_activation(text)


@pytest.mark.parametrize(
    ("function", "linear", "homogeneous"),
    [
        (jax.nn.relu, True, True),
        (lambda z: jnp.where(z > 0, z, 0.2 * z), True, True),
        (lambda z: jnp.maximum(z, 0.2 * z - 1.0), True, False),
        (jax.nn.hard_tanh, True, False),
        (jnp.tanh, False, False),
        (jax.nn.elu, False, False),
    ],
)
def test_piecewise_linear_and_homogeneous_activations_are_known_by_their_values(function, linear, homogeneous):
    activation = build_activation(lambda _, z: function(z), {}, jnp.float64)
    assert activation.is_piecewise_linear({}, jnp.float64) == linear
    assert activation.is_homogeneous({}, jnp.float64) == homogeneous
