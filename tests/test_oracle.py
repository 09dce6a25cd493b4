"""The matrix-free layer systems against R-GAP's matrices, built by loops in `oracle`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from leakjax import invert, observe, read_model
from leakjax.constraints.layer import layer_system, segment_rows
from leakjax.models.activations import Preimage
from leakjax.segments.chain import read_segments
from leakjax.solvers.linear import materialize

CASES = {
    "plain": ((5, 5, 2), (3, 3, 3), {}),
    "stride": ((6, 7, 2), (3, 2, 4), {"stride": (2, 3)}),
    "asymmetric padding": ((5, 4, 1), (3, 3, 2), {"padding": ((0, 2), (1, 0))}),
    "padding wider than the kernel": ((3, 3, 1), (2, 2, 2), {"padding": ((3, 1), (0, 3))}),
    "dilation": ((7, 6, 2), (2, 3, 2), {"dilation": (3, 2)}),
    "groups": ((4, 5, 4), (3, 2, 6), {"groups": 2}),
    "depthwise": ((4, 4, 3), (2, 2, 6), {"groups": 3}),
    "everything": (
        (7, 6, 4),
        (3, 2, 6),
        {"stride": (2, 1), "padding": ((2, 1), (0, 3)), "dilation": (2, 3), "groups": 2},
    ),
    "same, stride 2": (
        (6, 5, 1),
        (3, 4, 2),
        {"stride": (2, 2), "padding": (oracle.same_padding(6, 3, 2), oracle.same_padding(5, 4, 2))},
    ),
}


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def conv_segment(rng, input_shape, window, *, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    kh, kw, filters = window
    params = {
        "kernel": rng.normal(size=(kh, kw, input_shape[2] // groups, filters)),
        "bias": rng.normal(size=filters),
    }

    def apply(p, x):
        z = jax.lax.conv_general_dilated(
            x,
            p["kernel"],
            stride,
            padding,
            rhs_dilation=dilation,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(z + p["bias"][None, None, None])

    model = read_model((apply, params)).astype(jnp.float64)
    (segment,) = read_segments(model, input_shape, jnp.float64).segments
    return segment, model.variables


def dense_segment(rng, inputs, outputs):
    params = {"kernel": rng.normal(size=(inputs, outputs)), "bias": rng.normal(size=outputs)}
    model = read_model((lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"][None]), params)).astype(jnp.float64)
    (segment,) = read_segments(model, (inputs,), jnp.float64).segments
    return segment, model.variables


def check_against(rng, segment, variables, forward, gradient, dz):
    """Rows of `segment_rows` equal [W; K]; the operator's rows are those, times the documented weights."""
    shape, outputs = segment.input.shape, segment.output.shape
    dz = jnp.asarray(dz).reshape(outputs)

    slope = jnp.asarray(rng.uniform(0.1, 1.0, outputs))
    x = rng.normal(size=shape)
    basis = jnp.eye(forward.shape[1]).reshape(-1, *shape)

    @jax.jit
    def everything(variables, dz, x):
        rows = functools.partial(segment_rows, segment, variables, dz)
        z, g = rows(x)
        known = jnp.ones(outputs, bool)
        system = layer_system(segment, variables, Preimage(z, known, slope, known), dz, g)
        return rows(jnp.zeros(shape)), jax.vmap(rows)(basis), materialize(system.operator, system.vector)

    origin, columns, (matrix, vector) = everything(variables, dz, jnp.asarray(x))
    matrix, vector = np.asarray(matrix), np.asarray(vector)

    # what the layer shows of itself, minus the same at 0, column by column
    seen_forward = np.asarray(columns[0] - origin[0][None]).reshape(len(basis), -1).T
    seen_gradient = np.asarray(columns[1]["kernel"] - origin[1]["kernel"][None]).reshape(len(basis), -1).T
    assert relative(seen_forward, forward) < 1e-12
    assert relative(seen_gradient, gradient) < 1e-12

    # the system: rows (W diag-scaled by the slopes, nothing of the bias, K), each block over its right-hand side's rms
    assert relative(matrix @ x.ravel(), vector) < 1e-12
    weighted = np.asarray(slope).reshape(-1, 1) * forward
    rhs_forward, rhs_gradient = weighted @ x.ravel(), gradient @ x.ravel()
    rows = forward.shape[0]
    rms_forward = np.sqrt(np.mean(rhs_forward**2))
    assert relative(matrix[:rows], weighted / rms_forward) < 1e-12
    bias_rows = variables["bias"].size
    assert not np.any(matrix[rows : rows + bias_rows])  # flattened in alphabetical order: the bias comes first
    block = matrix[rows + bias_rows :]
    rms_gradient = np.sqrt(np.sum(rhs_gradient**2) / (rhs_gradient.size + bias_rows))
    assert relative(block, gradient / rms_gradient) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_has_the_matrices_of_the_loops(case, rng):
    input_shape, window, options = CASES[case]
    segment, variables = conv_segment(rng, input_shape, window, **options)
    dz = rng.normal(size=segment.output.shape[1:])
    forward, gradient = oracle.conv_matrices(np.asarray(variables["kernel"]), input_shape, dz, **options)
    check_against(rng, segment, variables, forward, gradient, dz)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (4, 7), (6, 1)])
def test_a_dense_layer_has_the_matrices_of_the_loops(inputs, outputs, rng):
    segment, variables = dense_segment(rng, inputs, outputs)
    dz = rng.normal(size=outputs)
    check_against(rng, segment, variables, *oracle.dense_matrices(np.asarray(variables["kernel"]), dz), dz)


def test_the_adjoint_is_the_transposed_matrix(rng):
    input_shape, window, options = CASES["everything"]
    segment, variables = conv_segment(rng, input_shape, window, **options)
    dz = jnp.asarray(rng.normal(size=segment.output.shape))
    z, g = segment_rows(segment, variables, dz, jnp.asarray(rng.normal(size=segment.input.shape)))
    known = jnp.ones(z.shape, bool)
    system = layer_system(segment, variables, Preimage(z, known, jnp.ones_like(z), known), dz, g)
    matrix, vector = map(np.asarray, materialize(system.operator, system.vector))
    back = np.ravel(system.operator.transpose().mv(system.vector))
    assert relative(back, matrix.T @ vector) < 1e-12
    assert matrix.shape[0] == ravel_pytree(system.vector)[0].size


def test_rows_of_unknown_entries_are_dropped(rng):
    input_shape, window, options = CASES["stride"]
    segment, variables = conv_segment(rng, input_shape, window, **options)
    dz = rng.normal(size=segment.output.shape)
    z, g = segment_rows(segment, variables, jnp.asarray(dz), jnp.asarray(rng.normal(size=segment.input.shape)))
    known = np.ones(z.shape, bool)
    known[0, 0, 0, 1] = known[0, 1, 0, 2] = False
    slope_known = np.ones(z.shape, bool)
    slope_known[..., 3] = False  # the last filter's dz is a guess somewhere
    preimage = Preimage(z, jnp.asarray(known), jnp.ones_like(z), jnp.asarray(slope_known))
    system = layer_system(segment, variables, preimage, jnp.asarray(dz), g)
    matrix = np.asarray(materialize(system.operator, system.vector)[0])
    dead = ~np.any(matrix != 0, axis=1)
    assert np.array_equal(dead[: z.size], ~known.ravel())
    kernel = dead[z.size + window[2] :].reshape(variables["kernel"].shape)
    assert np.all(kernel[..., 3])
    assert not np.any(kernel[..., :3])


def test_a_weight_that_meets_hidden_entries_with_both_signs_is_dropped(rng):
    def signs(params, x):
        z = x @ params["w"]
        return jnp.tanh(jnp.concatenate([z, -z], axis=1))

    model = read_model((signs, {"w": rng.normal(size=(4, 3))})).astype(jnp.float64)
    (segment,), variables = read_segments(model, (4,), jnp.float64).segments, model.variables
    dz = jnp.asarray(rng.normal(size=segment.output.shape))
    z, g = segment_rows(segment, variables, dz, jnp.asarray(rng.normal(size=segment.input.shape)))
    known = jnp.ones(z.shape, bool)
    system = layer_system(segment, variables, Preimage(z, known, jnp.ones_like(z), ~known), dz, g)
    matrix = np.asarray(materialize(system.operator, system.vector)[0])
    assert not np.any(matrix[z.size :])


def observed(net, rng):
    image = rng.uniform(size=(1, 32, 32, 3))
    return image, observe(net, (image, np.array([3])), input_range=(0.0, 1.0))


def true_states(net, observation, image):
    """(x, dz) of every segment at the truth, by JAX on the chain."""
    segments = read_segments(observation.model, (32, 32, 3), jnp.float64).segments
    variables = observation.model.variables
    inputs, x = [], jnp.asarray(image)
    for segment in segments:
        inputs.append(x)
        x = segment.activation.function(variables, segment.function(variables, x))

    def loss_from(k, z):
        x = segments[k].activation.function(variables, z)
        for segment in segments[k + 1 :]:
            x = segment.activation.function(variables, segment.function(variables, x))
        return -jax.nn.log_softmax(x[0])[3]

    zs = [s.function(variables, x) for s, x in zip(segments, inputs, strict=True)]
    return segments, inputs, [jax.grad(lambda z, k=k: loss_from(k, z))(z) for k, z in enumerate(zs)]


class ReferenceNet(nnx.Module):
    """Convolutions (filters, kernel, stride, padding) without bias, tanh after each, a dense head."""

    def __init__(self, convolutions, rngs):
        self.depth, side, channels = len(convolutions), 32, 3
        for k, (filters, kernel, stride, padding) in enumerate(convolutions, 1):
            bound = (channels * kernel**2) ** -0.5
            layer = nnx.Conv(
                channels,
                filters,
                (kernel, kernel),
                strides=stride,
                padding=padding,
                use_bias=False,
                kernel_init=lambda key, shape, dtype, b=bound: jax.random.uniform(key, shape, dtype, -b, b),
                rngs=rngs,
            )
            setattr(self, f"conv{k}", layer)
            side, channels = (side + 2 * padding - kernel) // stride + 1, filters
        self.head = nnx.Linear(side**2 * channels, 10, rngs=rngs)

    def __call__(self, x):
        for k in range(1, self.depth + 1):
            x = jnp.tanh(getattr(self, f"conv{k}")(x))
        return self.head(x.reshape(x.shape[0], -1))


# (net, layer) of table 1: filters, kernel, stride, padding -> the deficiency found there
TABLE_1 = {
    "cnn2_c4": ([(1, 3, 1, 0)], 0, -2146),
    "cnn3_c2, layer 2": ([(6, 4, 2, 0), (3, 3, 2, 0)], 1, -1050),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_reported_ranks_are_the_oracles_and_the_papers(name, rng):
    convolutions, layer, deficiency = TABLE_1[name]
    net = ReferenceNet(convolutions, nnx.Rngs(0))
    image, observation = observed(net, rng)
    segments, inputs, dzs = true_states(net, observation, image)
    _, _, stride, padding = convolutions[layer]
    kernel = np.asarray(observation.model.variables[f"conv{layer + 1}/kernel"])
    forward, gradient = oracle.conv_matrices(
        kernel,
        inputs[layer].shape[1:],
        np.asarray(dzs[layer])[0],
        stride=(stride,) * 2,
        padding=((padding,) * 2,) * 2,
    )
    rank = oracle.stacked_rank(forward, gradient)
    info = invert(observation, attack="rgap").layers[0][layer]
    assert info.name == segments[layer].name
    assert info.unknowns == forward.shape[1]
    assert info.rank == rank
    assert info.rank_deficiency == rank - forward.shape[1] == deficiency
    assert info.status == "deficient"
