"""Reading models: maps and activations are read exactly, and what no derivative can follow is refused by name."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from leakjax import UnreadableModelError, read_model
from leakjax.segments.chain import read_segments

HERE = Path(__file__).name
NHWC = ("NHWC", "HWIO", "NHWC")


def read(model, input_shape):
    model = read_model(model).astype(jnp.float64)
    return model, read_segments(model, input_shape, jnp.float64)


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b)


def check(model, input_shape, activations, *, nonlinear=()):
    """The chain evaluates to the model's logits, the activations have these names, and the maps at the positions
    `nonlinear`, and no others, are not affine."""
    model, chain = read(model, input_shape)
    rng = np.random.default_rng(5)
    x, u = (jnp.asarray(rng.normal(size=(1, *input_shape))) for _ in range(2))

    @jax.jit
    def everything(variables, x, u):
        pairs, value = [], x
        for segment in chain.segments:
            other = u.ravel()[: value.size]
            other = jnp.resize(other, value.shape) + 0.5 * value
            halfway = segment.function(variables, 0.5 * (value + other))
            mean = 0.5 * (segment.function(variables, value) + segment.function(variables, other))
            pairs.append((halfway, mean))
            value = segment.activation.function(variables, segment.function(variables, value))
        return model.apply(variables, x), value, pairs

    logits, value, pairs = everything(model.variables, x, u)
    assert float(jnp.linalg.norm(logits)) > 0
    assert close(value, logits)
    for k, (segment, (halfway, mean)) in enumerate(zip(chain.segments, pairs, strict=True)):
        assert segment.linear == close(halfway, mean) == (k not in nonlinear), segment.name
        assert halfway.shape == segment.output.shape
    assert [segment.activation.name for segment in chain.segments] == activations
    assert chain.segments[0].input.shape == (1, *input_shape)
    return model, chain


def params_of(rng, **shapes):
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def conv(x, kernel, stride=(1, 1), padding="VALID", **options):
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=NHWC, **options)


# --- what is read ----------------------------------------------------------------------------------------------------


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(2, 3, (3, 2), strides=(2, 1), padding="SAME", rngs=rngs)
        self.bn = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(
            3, 6, (2, 2), feature_group_count=3, kernel_dilation=2, padding=((1, 0), (0, 2)), rngs=rngs
        )
        self.head = nnx.Linear(1 * 3 * 6, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.leaky_relu(self.bn(self.conv1(x)), 0.1)
        x = jnp.tanh(self.conv2(x))
        x = nnx.avg_pool(x, (2, 2), strides=(1, 2))
        return self.head(x.reshape(x.shape[0], -1))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(3, (3, 2), strides=(2, 1), padding="SAME")(x)
        x = linen.leaky_relu(linen.BatchNorm(use_running_average=True)(x), 0.1)
        x = jnp.tanh(linen.Conv(6, (2, 2), feature_group_count=3, kernel_dilation=2, padding=((1, 0), (0, 2)))(x))
        x = linen.avg_pool(x, (2, 2), strides=(1, 2))
        return linen.Dense(4)(x.reshape(x.shape[0], -1))


def test_an_nnx_module_is_read():
    model, chain = check(NnxNet(nnx.Rngs(0)), (6, 7, 2), ["leaky_relu:0.1", "tanh", "identity"])
    assert [s.name for s in chain.segments] == ["conv1+bn", "conv2", "head"]
    assert set(chain.segments[0].paths) == {"conv1/kernel", "conv1/bias", "bn/scale", "bn/bias"}
    assert set(model.buffers) >= {"bn/mean", "bn/var"}
    assert not set(model.buffers) & set(model.params)


def test_a_linen_module_is_read():
    net = LinenNet()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 6, 7, 2)))
    model, chain = check((net, variables), (6, 7, 2), ["leaky_relu:0.1", "tanh", "identity"])
    assert [s.name for s in chain.segments] == ["Conv_0+BatchNorm_0", "Conv_1", "Dense_0"]
    assert set(model.params) & set(chain.segments[1].paths) == {"Conv_1/kernel", "Conv_1/bias"}


def test_a_plain_function_is_read(rng):
    params = {"first": params_of(rng, w=(12, 5), b=(5,)), "second": params_of(rng, w=(5, 3))}

    def apply(p, x):
        x = jax.nn.elu(x.reshape(x.shape[0], -1) @ p["first"]["w"] + p["first"]["b"][None])
        return x @ p["second"]["w"]

    model, chain = check((apply, params), (2, 3, 2), ["elu:1", "identity"])
    assert [set(s.paths) for s in chain.segments] == [{"first/b", "first/w"}, {"second/w"}]
    assert read_model(apply, params).params.keys() == model.params.keys()


CONVOLUTIONS = {
    "stride": {"stride": (2, 3)},
    "same with a stride": {"stride": (2, 2), "padding": "SAME"},
    "same, even kernel axis": {"padding": "SAME"},
    "asymmetric padding": {"padding": ((2, 0), (0, 1))},
    "negative padding": {"padding": ((-1, 0), (0, -2))},
    "dilation": {"rhs_dilation": (2, 3)},
    "groups": {"feature_group_count": 2},
    "transposed": {"lhs_dilation": (2, 3), "padding": ((2, 1), (1, 1))},
    "all at once": {
        "stride": (2, 1),
        "padding": ((1, 3), (2, 0)),
        "rhs_dilation": (2, 1),
        "lhs_dilation": (1, 2),
        "feature_group_count": 2,
    },
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_any_convolution_on_any_image(name, rng):
    """Non-square images, kernels of one even side; the chain's own evaluation rule against XLA's convolution."""
    options = CONVOLUTIONS[name]
    depth = 4 // options.get("feature_group_count", 1)
    params = params_of(rng, k=(3, 2, depth, 6), h=(6, 2))

    def apply(p, x):
        return jnp.sum(jnp.tanh(conv(x, p["k"], **options)), (1, 2)) @ p["h"]

    check((apply, params), (7, 9, 4), ["tanh", "identity"])


def test_batch_groups(rng):
    params = params_of(rng, k=(3, 2, 1, 6), h=(12, 2))

    def apply(p, x):
        x = conv(jnp.transpose(x, (3, 1, 2, 0)), p["k"], batch_group_count=2)
        return jnp.sum(jnp.tanh(x), (1, 2)).reshape(1, -1) @ p["h"]

    check((apply, params), (7, 9, 4), ["tanh", "identity"])


def test_other_layouts_and_dimensions(rng):
    params = params_of(rng, k=(5, 3, 3, 2), one=(3, 2, 4))

    def apply(p, x):
        x = jnp.transpose(x, (0, 3, 1, 2))
        x = jax.lax.conv_general_dilated(x, p["k"], (1, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = jax.nn.sigmoid(x).reshape(x.shape[0], 5 * 6, -1)
        x = jnp.concatenate([x, x], axis=2)[:, :, :2]
        x = jax.lax.conv_general_dilated(x, p["one"], (3,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return x.reshape(x.shape[0], -1)

    check((apply, params), (6, 5, 3), ["sigmoid", "identity"])


def test_transposed_convolution_modules(rng):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.ConvTranspose(2, 3, (3, 3), strides=(2, 2), padding="SAME", rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.mean(jnp.tanh(self.up(x)), axis=(1, 2)))

    check(Net(nnx.Rngs(0)), (3, 4, 2), ["tanh", "identity"])


def test_affine_odds_and_ends_join_one_segment(rng):
    """Padding, reversal, transpose, slices, gather, cumulative sums, pooling, scaling, conversion: one affine map."""
    params = params_of(rng, w=(4, 3), b=(3,))

    def apply(p, x):
        x = jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.25)
        x = jnp.flip(x, 1)[:, 1:, ::2]
        x = jnp.swapaxes(x, 1, 2)
        x = 3.0 - x / 2.0 + jnp.roll(x, 1, axis=1)
        x = jnp.take(x, jnp.array([2, 0, 1]), axis=2)
        x = jnp.cumsum(x, axis=1)
        x = x.at[:, 0].set(0.5)
        x = nnx.avg_pool(x, (2, 2), strides=(1, 1), padding="SAME", count_include_pad=False)
        x = jnp.einsum("nhwc,hw->nc", x, jnp.arange(1.0, 1 + x.shape[1] * x.shape[2]).reshape(x.shape[1:3]))
        return x @ p["w"] + p["b"][None]

    _, chain = check((apply, params), (5, 5, 4), ["identity"])
    assert set(chain.segments[0].paths) == {"b", "w"}


def test_global_mean_and_a_final_activation(rng):
    params = params_of(rng, k=(3, 3, 1, 4), w=(4, 2))
    apply = lambda p, x: jnp.tanh(jnp.mean(jax.nn.softplus(conv(x, p["k"])), (1, 2)) @ p["w"])  # noqa: E731
    check((apply, params), (5, 6, 1), ["softplus", "tanh"])


def test_layers_inside_jit_remat_and_named_calls(rng):
    params = params_of(rng, a=(3, 3, 2, 3), b=(3, 2))

    @jax.jit
    def inner(k, x):
        return jnp.tanh(conv(x, k))

    @jax.checkpoint
    def middle(k, x):
        return inner(k, x) * 2.0

    @jax.jit
    def outer(p, x):
        return jnp.mean(middle(p["a"], x), (1, 2)) @ p["b"]

    check((outer, params), (5, 4, 2), ["tanh", "identity"])


def test_an_affine_residual_block(rng):
    params = params_of(rng, k=(3, 3, 2, 2), w=(2, 3))

    def apply(p, x):
        x = jnp.tanh(x + conv(x, p["k"], padding="SAME"))
        return jnp.mean(x, (1, 2)) @ p["w"]

    _, chain = check((apply, params), (4, 5, 2), ["tanh", "identity"])
    assert len(chain.segments) == 2


def test_eval_mode_batch_norm_is_affine_with_its_statistics(rng):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.bn = nnx.BatchNorm(3, rngs=rngs)
            self.conv = nnx.Conv(3, 2, (2, 2), padding="VALID", rngs=rngs)

        def __call__(self, x):
            return jnp.mean(jnp.tanh(self.conv(self.bn(x))), (1, 2))

    net = Net(nnx.Rngs(0))
    net.bn.mean[...] = jnp.asarray(rng.normal(size=3), jnp.float32)
    net.bn.var[...] = jnp.asarray(rng.uniform(0.5, 3.0, size=3), jnp.float32)
    net.eval()
    model, _ = check(net, (4, 4, 3), ["tanh", "identity"])
    expected = np.asarray(net.bn.mean[...], float)
    assert np.array_equal(np.asarray(model.buffers["bn/mean"]), expected)


def test_a_parameter_that_enters_nonlinearly_is_still_affine_in_x(rng):
    """Weight standardization: however theta enters, z is affine in x."""
    params = params_of(rng, k=(3, 3, 2, 4), w=(4, 2))

    def apply(p, x):
        k = (p["k"] - jnp.mean(p["k"])) / jnp.std(p["k"])
        return jnp.mean(jnp.tanh(conv(x, k)), (1, 2)) @ p["w"]

    check((apply, params), (5, 5, 2), ["tanh", "identity"])


def test_scopes_without_data_are_harmless(rng):
    """Random numbers that never meet the data, and operations on parameters alone, change nothing."""
    params = params_of(rng, w=(4, 2))

    def apply(p, x):
        del_me = jax.random.normal(jax.random.key(0), (3,))
        del del_me
        return jnp.tanh(x.reshape(x.shape[0], -1) @ jnp.exp(p["w"]))

    check((apply, params), (2, 2, 1), ["tanh"])


# --- nonlinear maps ---------------------------------------------------------------------------------------------------


def named(chain, k, primitive, marker):
    """Segment k is nonlinear for this primitive, at the marked line."""
    where = chain.segments[k].nonlinearity
    assert re.match(rf"`({primitive})` at ", where), where
    assert f"{HERE}:{line_of(marker)}" in where, where


def test_residual_blocks_are_segments_of_their_own(rng):
    """Parameters, name, line; the activation after the sum is the block's; what follows is affine again."""

    def apply(p, x):
        x = jnp.tanh(conv(x, p["stem"]["k"], padding="SAME"))
        y = jax.nn.relu(conv(x, p["block"]["a"], padding="SAME"))  # here: residual
        x = jnp.tanh(x + conv(y, p["block"]["b"], padding="SAME"))
        return jnp.mean(x, (1, 2)) @ p["head"]["w"]

    params = {
        "stem": params_of(rng, k=(3, 3, 2, 3)),
        "block": params_of(rng, a=(3, 3, 3, 4), b=(3, 3, 4, 3)),
        "head": params_of(rng, w=(3, 2)),
    }
    _, chain = check((apply, params), (4, 5, 2), ["tanh", "tanh", "identity"], nonlinear=[1])
    assert [s.name for s in chain.segments] == ["stem", "block", "head"]
    assert set(chain.segments[1].paths) == {"block/a", "block/b"}
    named(chain, 1, "custom_jvp_call|max", "here: residual")


def test_blocks_in_a_row_stay_apart(rng):
    def apply(p, x):
        x = conv(x, p["stem"], padding="SAME")
        x = x + conv(jnp.tanh(x), p["a"], padding="SAME")
        x = x + conv(jnp.tanh(x), p["b"], padding="SAME")
        return jnp.mean(x, (1, 2)) @ p["w"]

    params = params_of(rng, stem=(1, 1, 2, 3), a=(3, 3, 3, 3), b=(3, 3, 3, 3), w=(3, 2))
    _, chain = check((apply, params), (4, 4, 2), ["identity"] * 4, nonlinear=[1, 2])
    assert [s.paths for s in chain.segments] == [("stem",), ("a",), ("b",), ("w",)]


def test_max_pooling_is_a_nonlinear_segment_without_parameters(rng):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)

        def __call__(self, x):
            x = jnp.tanh(self.conv(x))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))  # here: max pool
            return jnp.mean(x, (1, 2))

    _, chain = check(Net(nnx.Rngs(0)), (4, 4, 2), ["tanh", "identity", "identity"], nonlinear=[1])
    assert [s.paths for s in chain.segments] == [("conv/kernel", "conv/bias"), (), ()]
    assert chain.segments[1].output.shape == (1, 2, 2, 3)
    named(chain, 1, "reduce_window_max", "here: max pool")


def test_train_mode_batch_norm_is_nonlinear_and_eval_mode_affine(rng):
    """One example a gradient: its statistics are a function of the example like any other."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            x = self.conv(x)
            x = self.bn(x)  # here: batch norm
            return jnp.mean(jnp.tanh(x), (1, 2))

    net = Net(nnx.Rngs(0))
    net.train()
    _, chain = check(net, (4, 4, 2), ["identity", "tanh", "identity"], nonlinear=[1])
    assert chain.segments[1].paths == ("bn/scale", "bn/bias")
    assert chain.segments[1].normalizes
    named(chain, 1, r"\w+", "here: batch norm")
    net.eval()
    check(net, (4, 4, 2), ["tanh", "identity"])


def test_layer_norm_and_attention_are_nonlinear(rng):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (2, 2), strides=(2, 2), rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, deterministic=True, rngs=rngs)

        def __call__(self, x):
            x = self.norm(self.conv(x)).reshape(1, -1, 4)
            x = x + self.attention(x)  # here: attention
            return jnp.mean(x, 1)

    _, chain = check(Net(nnx.Rngs(0)), (4, 4, 2), ["identity"] * 5, nonlinear=[1, 3])
    assert [s.name for s in chain.segments][:2] == ["conv", "norm"]
    assert chain.segments[1].paths == ("norm/scale", "norm/bias")
    assert chain.segments[1].normalizes
    assert {p.split("/")[0] for p in chain.segments[3].paths} == {"attention"}


def test_bypasses_that_never_reach_the_logits_cut_nothing(rng):
    """Dead code, such as the running statistics of batch norm, is no part of the model."""

    def apply(p, x):
        x = conv(x, p["k"])
        del_me = jnp.mean(x**2)
        x = jnp.tanh(x)
        del del_me
        return jnp.mean(x, (1, 2)) @ p["w"]

    check((apply, params_of(rng, k=(3, 3, 2, 3), w=(3, 2))), (5, 5, 2), ["tanh", "identity"])


# --- what is refused -------------------------------------------------------------------------------------------------


def line_of(marker):
    """The line of this file that ends with the comment `marker`."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [k for k, text in enumerate(lines, 1) if text.endswith(f"# {marker}")]
    return found


def refused(model, input_shape, primitive, marker, *words):
    """The error names the primitive and the marked line, and holds the words."""
    with pytest.raises(UnreadableModelError) as caught:
        read(model, input_shape)
    message = str(caught.value)
    assert re.search(rf"`({primitive})`", message), message
    assert f"{HERE}:{line_of(marker)}" in message, message
    for word in words:
        assert word in message, message


def test_dropout_in_train_mode_is_refused():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            x = jnp.tanh(self.conv(x))
            x = self.dropout(x)  # here: dropout
            return jnp.mean(x, (1, 2))

    net = Net(nnx.Rngs(0))
    net.train()
    refused(net, (4, 4, 2), r"\w+", "here: dropout", "random", "eval()")
    net.eval()
    read(net, (4, 4, 2))


def test_softmax_behind_a_stopped_gradient_is_refused(rng):
    """Its derivative would be right only together with the exponential that follows."""

    def apply(p, x):
        z = x.reshape(x.shape[0], -1) @ p["w"]
        z = z - jax.lax.stop_gradient(jnp.max(z))  # here: stopped
        return z @ p["v"]

    refused((apply, params_of(rng, w=(8, 3), v=(3, 2))), (2, 2, 2), "reduce_max", "here: stopped", "derivative")


def test_a_straight_through_estimator_is_refused(rng):
    def apply(p, x):
        z = x.reshape(x.shape[0], -1) @ p["w"]
        z = z + jax.lax.stop_gradient(jnp.flip(jnp.tanh(z), 1) - z)  # here: straight through
        return z @ p["v"]

    params = params_of(rng, w=(8, 3), v=(3, 2))
    refused((apply, params), (2, 2, 2), "tanh|rev|stop_gradient", "here: straight through", "derivative")


def test_an_index_of_the_greatest_is_refused(rng):
    def apply(p, x):
        z = x.reshape(x.shape[0], -1) @ p["w"]
        return p["v"][jnp.argmax(z[0])][None]  # here: argmax

    refused((apply, params_of(rng, w=(8, 3), v=(3, 2))), (2, 2, 2), "argmax", "here: argmax", "no derivative")


def test_random_numbers_inside_a_custom_derivative_are_refused(rng):
    @jax.custom_jvp
    def noisy(x):
        return jnp.flip(x, -1) * jax.random.normal(jax.random.key(0), x.shape)

    @noisy.defjvp
    def _(primals, tangents):
        return noisy(primals[0]), noisy(tangents[0])

    def apply(p, x):
        return noisy(x.reshape(1, -1) @ p["w"])  # here: noisy

    refused((apply, params_of(rng, w=(4, 2))), (2, 2, 1), "custom_jvp_call", "here: noisy", "random")


def test_a_loop_too_long_to_be_unrolled_is_refused(rng):
    def apply(p, x):
        return jax.lax.scan(lambda a, _: (jnp.tanh(a @ p["w"]), None), x.reshape(1, -1), length=20_001)[0]  # here: scan

    refused((apply, params_of(rng, w=(4, 4))), (2, 2, 1), "scan", "here: scan")


def test_iterations_that_share_their_weights_are_refused(rng):
    def apply(p, x):
        return jax.lax.scan(lambda a, _: (jnp.tanh(a @ p["w"]), None), x.reshape(1, -1), length=3)[0]

    with pytest.raises(UnreadableModelError, match="'w' is shared by w and w"):
        read((apply, params_of(rng, w=(4, 4))), (2, 2, 1))


def test_a_branch_on_the_data_is_refused(rng):
    def apply(p, x):
        z = x.reshape(1, -1) @ p["w"]
        return jax.lax.cond(jnp.sum(z) > 0, lambda z: z, lambda z: 2 * z, z)  # here: cond

    with pytest.raises(UnreadableModelError, match=r"cond|reduce_sum|gt"):
        read((apply, params_of(rng, w=(4, 2))), (2, 2, 1))


def test_a_custom_derivative_that_mixes_entries_is_refused(rng):
    @jax.custom_jvp
    def doubled(x):
        return jnp.flip(2.0 * x, -1)

    @doubled.defjvp
    def _(primals, tangents):
        return doubled(primals[0]), tangents[0]

    def apply(p, x):
        z = x.reshape(1, -1) @ p["w"]
        return doubled(z)  # here: custom

    refused((apply, params_of(rng, w=(4, 2))), (2, 2, 1), "custom_jvp_call", "here: custom")


def test_a_shared_parameter_is_refused(rng):
    def apply(p, x):
        x = jnp.tanh(conv(x, p["shared"], padding="SAME"))
        x = jnp.tanh(conv(x, p["shared"], padding="SAME"))
        return jnp.mean(x, (1, 2)) @ p["w"]

    with pytest.raises(UnreadableModelError, match="'shared' is shared"):
        read((apply, params_of(rng, shared=(3, 3, 2, 2), w=(2, 2))), (4, 4, 2))


@pytest.mark.parametrize("function", [jnp.floor, jnp.round, jnp.ceil, jnp.sign, jax.lax.stop_gradient])
def test_a_vanishing_derivative_is_not_affine(function, rng):
    """floor, round and their like have a constant derivative of 0: that is no affine map."""
    params = params_of(rng, a=(4, 4), b=(4, 2))

    def apply(p, x):
        return function(3.0 * (x.reshape(1, -1) @ p["a"])) @ p["b"]

    try:
        model, chain = read((apply, params), (2, 2, 1))
    except UnreadableModelError:
        return
    assert len(chain.segments) == 2  # its own activation, never part of an affine map
    first = chain.segments[0]
    x = jnp.asarray(rng.normal(size=(1, 2, 2, 1)))
    assert close(first.function(model.variables, x), 3.0 * (x.reshape(1, -1) @ params["a"]))
    z = jnp.asarray(rng.normal(size=(1, 4)))
    assert close(first.activation.function(model.variables, z), function(z))
    assert not np.any(first.activation.slope(model.variables, z))


def test_floor_across_shapes_is_refused(rng):
    """A rounding that joins two branches is neither affine nor elementwise."""
    params = params_of(rng, a=(4, 4))

    def apply(p, x):
        z = x.reshape(1, -1) @ p["a"]
        return jnp.floor(z)[:, :2] + z[:, 2:]  # here: floor

    refused((apply, params), (2, 2, 1), "floor", "here: floor")
