"""Random architectures, built in nnx and in linen from one drawn description with the same weights.

For any of them: (a) every layer's system holds at the truth; (b) where every layer is determined and well enough
conditioned, the image comes back; (c) the two libraries give the same numbers; (d) no certificate says `exact` of a
wrong image.
"""

import dataclasses
import gc
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import HealthCheck, Phase, event, given, settings

from leakjax import invert, observe
from leakjax.constraints.layer import layer_system
from leakjax.models.losses import LOSSES
from leakjax.runtime.precision import compute_in
from leakjax.runtime.programs import clear_caches
from leakjax.segments.chain import read_segments

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "leaky_relu:0.2": lambda z: jnp.maximum(z, 0.2 * z),
    "leaky_relu:0.5": lambda z: jax.nn.leaky_relu(z, 0.5),
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "soft_sign": jax.nn.soft_sign,
    "arcsinh": jnp.arcsinh,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    filters: int
    kernel: tuple
    strides: tuple
    padding: object
    dilation: tuple
    groups: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """[batch norm] (convolution or dense layer of so many features) [batch norm] activation [average pooling]."""

    before: bool
    layer: object
    after: bool
    activation: str
    pool: tuple | None


@dataclasses.dataclass(frozen=True)
class NetSpec:
    input_shape: tuple
    blocks: tuple
    outputs: int
    head_bias: bool
    loss: str
    label: int
    seed: int


def side_after(length, window, stride, dilation, padding):
    if padding == "SAME":
        return -(-length // stride)
    low, high = (0, 0) if padding == "VALID" else padding
    return (length + low + high - (window - 1) * dilation - 1) // stride + 1


@st.composite
def convolutions(draw, shape):
    height, width, channels = shape
    groups = draw(st.sampled_from([g for g in (1, 1, 1, 2, 3) if channels % g == 0]))
    filters = groups * draw(st.integers(1, 12 // groups))
    pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
    padding = draw(st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(pads, pads)))
    spec = [], [], []
    for axis, length in enumerate((height, width)):
        reach = length + (sum(padding[axis]) if not isinstance(padding, str) else 0)
        window = draw(st.integers(1, min(4, reach)))
        dilation = draw(st.integers(1, min(2, (reach - 1) // max(window - 1, 1)) or 1))
        for values, value in zip(spec, (window, draw(st.sampled_from([1, 1, 2])), dilation), strict=True):
            values.append(value)
    kernel, strides, dilations = map(tuple, spec)
    sides = tuple(
        side_after(shape[a], kernel[a], strides[a], dilations[a], padding if isinstance(padding, str) else padding[a])
        for a in (0, 1)
    )
    return ConvSpec(
        filters=filters,
        kernel=kernel,
        strides=strides,
        padding=padding,
        dilation=dilations,
        groups=groups,
        bias=draw(st.booleans()),
    ), (*sides, filters)


@st.composite
def nets(draw, deepest):
    shape = input_shape = (draw(st.integers(6, 8)), draw(st.integers(6, 10)), draw(st.integers(1, 3)))
    blocks = []
    for _ in range(draw(st.integers(1, deepest - 1))):
        before = draw(st.sampled_from([False, False, False, True]))
        if len(shape) == 3 and draw(st.sampled_from([True, True, True, False])):
            layer, shape = draw(convolutions(shape))
        else:
            layer = draw(st.integers(3, 160))
            shape = (layer,)
        pool = None
        if len(shape) == 3 and draw(st.sampled_from([False, False, False, False, True])):
            pool = tuple(draw(st.integers(1, min(2, s))) for s in shape[:2])
        after = draw(st.sampled_from([False, False, False, True]))
        blocks.append(
            BlockSpec(
                before=before,
                layer=layer,
                after=after,
                activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
                pool=pool,
            )
        )
        if pool:
            shape = (shape[0] - pool[0] + 1, shape[1] - pool[1] + 1, shape[2])
    outputs = draw(st.integers(2, 5))
    loss = draw(st.sampled_from(sorted(LOSSES)))
    label, seed = draw(st.integers(0, outputs - 1)), draw(st.integers(0, 2**16))
    return NetSpec(
        input_shape=input_shape,
        blocks=tuple(blocks),
        outputs=outputs,
        head_bias=draw(st.booleans()),
        loss=loss,
        label=label,
        seed=seed,
    )


class NnxNet(nnx.Module):
    def __init__(self, spec, shapes):
        self.spec = spec
        rngs = nnx.Rngs(0)
        for k, (block, (shape_in, shape_out)) in enumerate(zip(spec.blocks, shapes[:-1], strict=True)):
            c = block.layer
            if block.before:
                setattr(self, f"before{k}", nnx.BatchNorm(shape_in[-1], use_running_average=True, rngs=rngs))
            if isinstance(c, ConvSpec):
                layer = nnx.Conv(
                    shape_in[-1],
                    c.filters,
                    c.kernel,
                    strides=c.strides,
                    padding=c.padding,
                    kernel_dilation=c.dilation,
                    feature_group_count=c.groups,
                    use_bias=c.bias,
                    rngs=rngs,
                )
            else:
                layer = nnx.Linear(math.prod(shape_in), c, rngs=rngs)
            setattr(self, f"layer{k}", layer)
            if block.after:
                setattr(self, f"after{k}", nnx.BatchNorm(shape_out[-1], use_running_average=True, rngs=rngs))
        self.head = nnx.Linear(math.prod(shapes[-1][0]), spec.outputs, use_bias=spec.head_bias, rngs=rngs)

    def __call__(self, x):
        for k, block in enumerate(self.spec.blocks):
            if block.before:
                x = getattr(self, f"before{k}")(x)
            if not isinstance(block.layer, ConvSpec):
                x = x.reshape(x.shape[0], -1)
            x = getattr(self, f"layer{k}")(x)
            if block.after:
                x = getattr(self, f"after{k}")(x)
            x = ACTIVATIONS[block.activation](x)
            if block.pool:
                x = nnx.avg_pool(x, block.pool)
        return self.head(x.reshape(x.shape[0], -1))


class LinenNet(linen.Module):
    spec: NetSpec

    @linen.compact
    def __call__(self, x):
        for k, block in enumerate(self.spec.blocks):
            if block.before:
                x = linen.BatchNorm(use_running_average=True, name=f"before{k}")(x)
            c = block.layer
            if isinstance(c, ConvSpec):
                x = linen.Conv(
                    c.filters,
                    c.kernel,
                    strides=c.strides,
                    padding=c.padding,
                    kernel_dilation=c.dilation,
                    feature_group_count=c.groups,
                    use_bias=c.bias,
                    name=f"layer{k}",
                )(x)
            else:
                x = linen.Dense(c, name=f"layer{k}")(x.reshape(x.shape[0], -1))
            if block.after:
                x = linen.BatchNorm(use_running_average=True, name=f"after{k}")(x)
            x = ACTIVATIONS[block.activation](x)
            if block.pool:
                x = linen.avg_pool(x, block.pool)
        return linen.Dense(self.spec.outputs, use_bias=self.spec.head_bias, name="head")(x.reshape(x.shape[0], -1))


def shapes_of(spec):
    """(shape into, shape out of) each block's layer, and (shape into the head, outputs)."""
    shape, found = spec.input_shape, []
    for block in spec.blocks:
        c = block.layer
        if isinstance(c, ConvSpec):
            pads = (c.padding,) * 2 if isinstance(c.padding, str) else c.padding
            sides = (side_after(shape[a], c.kernel[a], c.strides[a], c.dilation[a], pads[a]) for a in (0, 1))
            out = (*sides, c.filters)
        else:
            out = (c,)
        found.append((shape, out))
        shape = (out[0] - block.pool[0] + 1, out[1] - block.pool[1] + 1, out[2]) if block.pool else out
    return [*found, (shape, (spec.outputs,))]


def weights_of(spec, shapes, rng):
    """(params, statistics): {module: {name: array}}."""
    params, statistics = {}, {}

    def norm(name, features):
        sign = rng.choice([-1.0, 1.0], size=features)
        params[name] = {"scale": sign * rng.uniform(0.5, 1.5, features), "bias": rng.normal(0, 0.3, features)}
        statistics[name] = {"mean": rng.normal(0, 0.3, features), "var": rng.uniform(0.5, 2.0, features)}

    def affine(name, shape, bias):
        params[name] = {"kernel": rng.normal(0, math.prod(shape[:-1]) ** -0.5, shape)}
        if bias:
            params[name]["bias"] = rng.normal(0, 0.3, shape[-1])

    for k, (block, (shape_in, shape_out)) in enumerate(zip(spec.blocks, shapes[:-1], strict=True)):
        c = block.layer
        if block.before:
            norm(f"before{k}", shape_in[-1])
        if isinstance(c, ConvSpec):
            affine(f"layer{k}", (*c.kernel, shape_in[-1] // c.groups, c.filters), c.bias)
        else:
            affine(f"layer{k}", (math.prod(shape_in), c), True)
        if block.after:
            norm(f"after{k}", shape_out[-1])
    affine("head", (math.prod(shapes[-1][0]), spec.outputs), spec.head_bias)
    return params, statistics


def build(spec):
    """The same network twice: an nnx module and a pair (linen module, variables)."""
    shapes = shapes_of(spec)
    params, statistics = weights_of(spec, shapes, np.random.default_rng(spec.seed))
    module = NnxNet(spec, shapes)
    for group in (params, statistics):
        for name, arrays in group.items():
            for key, value in arrays.items():
                variable = getattr(getattr(module, name), key)
                assert variable[...].shape == value.shape
                variable.set_value(jnp.asarray(value))
    variables = {"params": params, "batch_stats": statistics} if statistics else {"params": params}
    return module, (LinenNet(spec), jax.tree.map(jnp.asarray, variables))


def truths(spec, observation, x):
    """At the true image: logits, each segment's ||A x - b|| and ||b||, and the largest 1/act'(z) of each segment."""
    chain = read_segments(observation.model, spec.input_shape, jnp.float64)
    segments = chain.segments

    def states(variables, shifts, x):
        inputs, zs = [], []
        for segment, shift in zip(segments, shifts, strict=True):
            inputs.append(x)
            zs.append(segment.function(variables, x))
            x = segment.activation.function(variables, zs[-1]) + shift
        return x, (inputs, zs)

    @jax.jit
    def everything(variables, gradients, x):
        def loss(shifts):
            logits, seen = states(variables, shifts, x)
            return LOSSES[spec.loss](jnp.ravel(logits), jnp.asarray(spec.label)), (logits, seen)

        shifts = [jnp.zeros(s.output.shape, x.dtype) for s in segments]
        dxs, (logits, (inputs, zs)) = jax.grad(loss, has_aux=True)(shifts)
        off, size, inverse_slopes = [], [], []
        for segment, value, z, dx in zip(segments, inputs, zs, dxs, strict=True):
            following = segment.activation.function(variables, z)
            preimage = segment.activation.preimage(variables, following, 0.0)
            gradient = {p: gradients[p] for p in segment.paths}
            system = layer_system(segment, variables, preimage, preimage.slope * dx, gradient)
            error = jax.tree.map(lambda a, b: a - b, system.operator.mv(value), system.vector)
            norms = [jnp.sqrt(sum(jnp.sum(a**2) for a in jax.tree.leaves(t))) for t in (error, system.vector)]
            off.append(norms[0])
            size.append(norms[1])
            inverse_slopes.append(jnp.max(1.0 / jnp.abs(segment.activation.slope(variables, z))))
        return logits, off, size, inverse_slopes

    gradients = {p: jnp.asarray(g[0]) for p, g in observation.gradients.items()}
    logits, *rest = everything(observation.model.variables, gradients, x)
    return logits, *(np.asarray(r) for r in rest)


def psnr(found, image):
    return -10 * np.log10(max(float(np.mean((found - image) ** 2)), 1e-35))


def check_net(spec, inverting=True):
    """Checks (a) and (c), and (b) and (d) where `inverting`; returns whether (b) applied."""
    image = np.random.default_rng(spec.seed + 1).uniform(size=(1, *spec.input_shape))
    labels = np.array([spec.label])
    by_nnx, by_linen = build(spec)
    options = {"loss": spec.loss, "input_range": (0.0, 1.0)}
    observation, other = observe(by_nnx, (image, labels), **options), observe(by_linen, (image, labels), **options)

    # (c) the same gradients, and the same logits by the modules and by the chain of segments
    assert observation.gradients.keys() == other.gradients.keys()
    for path, g in observation.gradients.items():
        np.testing.assert_allclose(g, other.gradients[path], rtol=1e-10, atol=1e-12 * (1 + np.abs(g).max()))
    logits, off, size, inverse_slopes = truths(spec, observation, jnp.asarray(image))
    by_module = jax.jit(other.model.apply)(other.model.variables, jnp.asarray(image))
    np.testing.assert_allclose(logits, by_module, rtol=1e-11, atol=1e-12)
    chains = [read_segments(o.model, spec.input_shape, jnp.float64).segments for o in (observation, other)]
    assert [set(s.paths) for s in chains[0]] == [set(s.paths) for s in chains[1]]
    assert [s.activation.name for s in chains[0]] == [s.activation.name for s in chains[1]]

    # (a) the systems hold at the truth
    assert np.all(off <= 1e-9 * size), (off, size)

    # (b), (d) inversion
    if not inverting:
        return False
    answer = invert(observation, attack="rgap")
    layers, certificate = answer.layers[0], answer.certificates[0]
    quality = psnr(answer.images[0], image[0])
    if certificate.status == "exact":
        assert quality >= 60, (quality, certificate)
    growth = float(np.prod([max(i.condition or math.inf, 1.0) for i in layers] or [math.inf]))
    growth *= float(np.prod(np.maximum(inverse_slopes[:-1], 1.0)))
    determined = len(layers) == len(spec.blocks) + 1 and all(info.status == "determined" for info in layers)
    if not (determined and len(answer.candidates[0]) == 1 and growth < 1e9):
        return False
    assert quality >= 100, (quality, growth, layers)
    assert answer.labels[0] == spec.label
    return True


def study(examples, deepest, invert_every=1, part=0):
    applied = []

    @hypothesis.seed(part)
    @settings(max_examples=examples, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
    @given(nets(deepest))
    def check(spec):
        with compute_in("float64"):
            try:
                applied.append(check_net(spec, inverting=len(applied) % invert_every == 0))
            except ValueError as error:  # a saturated network: nothing was sent
                if "zero everywhere" not in str(error):
                    raise
                applied.append(False)
        event("inverted" if applied[-1] else "not determined, or badly conditioned")
        if len(applied) % 10 == 0:  # compiled programs fill the memory
            clear_caches()
            jax.clear_caches()
            gc.collect()

    check()
    assert len(applied) >= examples
    return sum(applied)


def test_random_networks():
    """Every other one is inverted: compiling the solvers is most of the time."""
    assert study(12, deepest=3, invert_every=2) >= 2  # enough are determined for (b) to mean something


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 12))
def test_many_random_networks(part):
    assert study(20, deepest=5, part=part) >= 3
