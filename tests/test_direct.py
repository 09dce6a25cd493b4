"""Direct solves of layers: their structure is read from what they compute, and their answers are those of lstsq."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import leakjax
from leakjax import invert, observe
from leakjax.attacks.layerwise import factors, layer_step
from leakjax.attacks.layerwise import routes as routing
from leakjax.attacks.layerwise.system import dense_system
from leakjax.constraints.channel_reading import read_channels
from leakjax.segments.chain import read_chain
from leakjax.solvers.banded import factor_gram, solve_banded
from leakjax.solvers.kronecker import solve_blocks, solve_full, spectrum


def conv(x, w, stride=1, padding="VALID", groups=1, layout=("NHWC", "HWIO", "NHWC")):
    numbers = {"dimension_numbers": layout, "feature_group_count": groups}
    return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, **numbers)


def chain_of(apply, params, shape):
    return read_chain(leakjax.read_model((apply, params)), shape, jnp.float64)


def readings(apply, params, shape):
    model = leakjax.read_model((apply, params))
    segments = [s for s in read_chain(model, shape, jnp.float64).segments if s.linear and s.paths]
    return read_channels(segments, model.variables, 512)


def test_channels_are_found_whatever_the_layout(rng):
    params = {"w": rng.normal(size=(8, 3, 3, 3)), "v": rng.normal(size=(5, 8 * 16))}

    def apply(p, x):  # NCHW inside, a flattening in another order, a weight with its outputs first
        z = jnp.tanh(conv(x.transpose(0, 3, 1, 2), p["w"], layout=("NCHW", "OIHW", "NCHW")))
        return z.reshape(len(x), -1) @ p["v"].T

    first, head = readings(apply, params, (6, 6, 3))
    assert (first.channels.axis, first.channels.rows) == (3, (("w", 1),))
    assert first.full  # 72 rows, 36 positions
    assert (head.channels.axis, head.channels.rows) == (None, (("v", 1),))


def test_groups_and_shared_weights_are_no_channels(rng):
    params = {"w": rng.normal(size=(3, 3, 2, 8)), "v": rng.normal(size=(8 * 16, 5))}

    def grouped(p, x):
        return jnp.tanh(conv(x, p["w"], groups=2)).reshape(len(x), -1) @ p["v"]

    assert readings(grouped, params, (6, 6, 4))[0] is None
    tied = {"w": rng.normal(size=(6, 6)), "v": rng.normal(size=(36, 5))}

    def twice(p, x):  # the weight meets its input from both sides
        z = jnp.einsum("ij,bjk->bik", p["w"], x[..., 0]) + jnp.einsum("bij,jk->bik", x[..., 0], p["w"])
        return jnp.tanh(z).reshape(len(x), -1) @ p["v"]

    assert readings(twice, tied, (6, 6, 1))[0] is None


@pytest.mark.parametrize(("shape", "out", "kernel", "stride"), [((9, 7, 2), 9, 3, 1), ((8, 8, 3), 14, 4, 2)])
def test_banded_factors_solve_what_the_dense_matrix_does(rng, shape, out, kernel, stride):
    w = jnp.asarray(rng.normal(size=(kernel, kernel, shape[-1], out)))
    pad = kernel // 2

    def forward(v):
        return conv(v.reshape(-1, *shape), w, stride, [(pad, pad)] * 2).reshape(len(v), -1)

    matrix = np.asarray(forward(jnp.eye(int(np.prod(shape))))).T
    gram = matrix.T @ matrix
    factor = factor_gram(lambda v: v @ gram, shape, 2**30)
    x = rng.normal(size=(len(gram), 3))
    assert np.allclose(solve_banded(factor, jnp.asarray(gram @ x)), x, rtol=0, atol=1e-10)
    with pytest.raises(MemoryError):
        factor_gram(lambda v: v @ gram, shape, 1000)
    assert factor_gram(lambda v: v @ (gram - 2 * gram[0, 0] * np.eye(len(gram))), shape, 2**30) is None
    dense = gram + 0.01 * np.outer(x[:, 0], x[:, 0])
    far = factor_gram(lambda v: v @ dense, shape, 2**30)  # everything meets everything: one slab
    assert np.allclose(solve_banded(far, jnp.asarray(dense @ x)), x, rtol=0, atol=1e-8)


def test_blocks_are_solved_together(rng):
    k = (
        rng.normal(size=(40, 20))
        @ np.diag(np.r_[np.ones(14), np.zeros(6)])
        @ np.linalg.qr(rng.normal(size=(20, 20)))[0]
    )
    f = rng.normal(size=(50, 60))  # of 20 positions, 3 channels: neither block is of full rank
    f[:, 50:] = f[:, :10]
    x = rng.normal(size=(20, 3))
    seen = spectrum(jnp.asarray(k))
    assert int(np.sum(seen.strong)) == 14
    found = solve_blocks(
        lambda p: jnp.asarray(f) @ jnp.ravel(p),
        jnp.asarray(k),
        seen,
        jnp.asarray(f @ x.ravel()),
        jnp.asarray(k @ x),
        jnp.full(2, 1e-8),
        most_weak=8,
    )
    assert np.allclose(found.x, x, rtol=0, atol=1e-12)
    full = rng.normal(size=(40, 20))
    full[:, 0] *= 1e-6
    there, least = solve_full(jnp.asarray(full), jnp.asarray(full @ x), jnp.asarray(rng.normal(size=(20, 1))))
    assert np.allclose(there, x, rtol=0, atol=1e-9)
    assert float(least) == pytest.approx(np.linalg.svd(full)[1][-1], rel=0.05)


PADDED = [(1, 1), (1, 1)]


def three_routes(rng, activation=jnp.tanh):
    """One layer for every route: by its weights (24x24 positions), by both blocks, by its gradient alone, a head."""
    params = {
        "a": rng.normal(0, 0.3, (4, 4, 2, 12)),
        "b": rng.normal(0, 0.15, (3, 3, 12, 36)),
        "c": rng.normal(0, 0.1, (3, 3, 36, 16)),
        "d": rng.normal(0, 0.05, (7 * 7 * 16, 4)),
        "e": rng.normal(0, 0.1, 4),
    }

    def apply(p, x):
        z = activation(conv(x, p["a"], 2, [(2, 2), (2, 2)]))
        z = activation(conv(z, p["b"], 2, PADDED))
        z = activation(conv(z, p["c"], 1, PADDED))
        return z.reshape(len(x), -1) @ p["d"] + p["e"][None]

    return apply, params


def test_every_route_gives_what_lsmr_gives(rng, monkeypatch):
    model = three_routes(rng)
    images = rng.uniform(size=(2, 24, 24, 2))
    observation = observe(model, (images, np.array([0, 3])))
    routes, taken = routing.routes, {}

    def spied(*given):
        found = routes(*given)
        taken.setdefault("routes", found)
        return found

    monkeypatch.setattr(layer_step, "routes", spied)
    answer, other = invert(observation), invert(observation, solver="lsmr")
    kinds = {s.name: None if r.kind is None else r.kind.full for s, r in taken["routes"].items()}
    assert kinds == {"a": None, "b": False, "c": True}
    assert [info.solver for info in answer.layers[0][:-1]] == ["direct"] * 3
    assert [info.solver for info in other.layers[0][:-1]] == ["lsmr"] * 3
    for a, b, image in zip(answer.images, other.images, images, strict=True):
        assert np.max(np.abs(a - image)) <= max(10 * np.max(np.abs(b - image)), 1e-10)
    for mine, theirs in zip(answer.layers[0], other.layers[0], strict=True):
        assert mine.rank == theirs.rank == mine.unknowns


@pytest.mark.parametrize("decades", [0, 2])
def test_a_condition_is_near_the_dense_one_or_above(rng, monkeypatch, decades):
    """Where dL/dz decays over the positions, K1 sees worse than the whole layer: its condition is at most that."""
    kept = []
    run = layer_step.run_steps

    def spy(problem, step, size, state, victims, **known):
        found = run(problem, step, size, state, victims, **known)
        kept.append((problem, step.segment, state, found[0].condition[0]))
        return found

    monkeypatch.setattr("leakjax.attacks.layerwise.sweep.run_steps", spy)
    apply, params = three_routes(rng)
    far = np.maximum(*np.meshgrid(np.arange(7), np.arange(7), indexing="ij")) / 6
    params["d"] = (params["d"].reshape(7, 7, -1) * 10.0 ** (-decades * far)[:, :, None]).reshape(-1, 4)
    invert(observe((apply, params), (rng.uniform(size=(1, 24, 24, 2)), np.array([1]))))
    assert len(kept) == 3
    for problem, segment, state, condition in kept:
        values = np.linalg.svd(dense_system(problem, segment, state, 0, 0)[1], compute_uv=False)
        true, most = values[0] / values[-1], 1.5 if decades == 0 else 100.0
        assert 0.1 * true <= condition <= most * true


def test_factors_belong_to_weights(rng):
    """Two models of one architecture share programs and no factor."""
    images, labels = rng.uniform(size=(1, 24, 24, 2)), np.array([1])
    apply, params = three_routes(rng)
    other = {name: rng.permutation(value.ravel()).reshape(value.shape) for name, value in params.items()}
    for weights in (params, other, params):
        answer = invert(observe((apply, weights), (images, labels)))
        assert answer.certificates[0].status == "exact"
        assert answer.layers[0][0].solver == "direct"
        assert np.max(np.abs(answer.images[0] - images[0])) < 1e-9


def open_layers(rng):
    """Three convolutions, of which the second, strided, has more equations than unknowns and leaves its input open."""
    params = {
        "a": rng.normal(0, 0.3, (3, 3, 2, 8)),
        "b": rng.normal(0, 0.15, (3, 3, 8, 8)),
        "c": rng.normal(0, 0.1, (3, 3, 8, 30)),
        "d": rng.normal(0, 0.2, (30, 4)),
        "e": rng.normal(0, 0.1, 4),
    }

    def apply(p, x):
        z = jax.nn.leaky_relu(conv(x, p["a"]))
        z = jax.nn.leaky_relu(conv(z, p["b"], 2))
        z = jax.nn.leaky_relu(conv(z, p["c"]))
        return z.reshape(len(x), -1) @ p["d"] + p["e"][None]

    return apply, params


def test_what_a_direct_solve_leaves_open_is_lsmr_s(rng):
    """A layer that its equations leave open, and the one before it, whose own then do not fit."""
    images = rng.uniform(size=(1, 10, 10, 2))
    answer = invert(observe(open_layers(rng), (images, np.array([1]))), attack="rgap")
    layers = answer.layers[0][:-1]
    assert [info.solver == "direct" for info in layers] == [False, False, True]
    assert [info.rank == info.unknowns for info in layers] == [True, False, True]


def test_weak_directions_are_closed_by_the_gradient(rng, monkeypatch):
    """Forward rows that hardly see some directions; the gradient's see them."""
    params = {"a": rng.normal(0, 0.3, (5, 5, 3, 12)), "d": rng.normal(0, 0.05, (12 * 12 * 12, 4))}

    def apply(p, x):
        return jnp.tanh(conv(x, p["a"], 2, [(2, 2), (2, 2)])).reshape(len(x), -1) @ p["d"]

    images = rng.uniform(size=(3, 24, 24, 3))
    made = []
    monkeypatch.setattr(routing, "factor_of", lambda *given: made.append(factors.factor_of(*given)) or made[-1])
    answer = invert(observe((apply, params), (images, np.array([0, 3, 1]))))
    assert made[0].weak.shape[1] > 0
    assert [layers[0].solver for layers in answer.layers] == ["direct"] * 3
    assert all(c.status == "exact" for c in answer.certificates)
    assert np.max(np.abs(answer.images - images)) < 1e-9


def test_a_gradient_that_hardly_sees_its_input_is_not_solved_alone(rng):
    """dL/dz decays over the positions: K1 has full rank and a bad condition, the forward rows see everything."""
    params = {"w": rng.normal(0, 0.3, (3, 3, 3, 16)), "c": rng.normal(0, 0.1, 4)}
    far = np.maximum(*np.meshgrid(np.arange(8), np.arange(8), indexing="ij"))
    rows = rng.normal(0, 0.1, (8, 8, 16, 4)) * 10.0 ** (-5 * far / 7)[:, :, None, None]
    params["v"] = rows.reshape(-1, 4)

    def apply(p, x):
        return jnp.tanh(conv(x, p["w"], 1, PADDED)).reshape(len(x), -1) @ p["v"] + p["c"][None]

    images = rng.uniform(size=(1, 8, 8, 3))
    observation = observe((apply, params), (images, np.array([1])))
    answer, other = invert(observation, attack="rgap"), invert(observation, attack="rgap", solver="lsmr")
    assert answer.layers[0][0].condition < 100
    assert np.max(np.abs(answer.images - images)) <= 10 * np.max(np.abs(other.images - images))


def test_models_with_random_keys_among_their_variables(rng):
    """Dropout keeps keys and counts beside the weights: they are no weights, and change no reading and no factor."""
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first = nnx.Conv(2, 12, (4, 4), strides=(2, 2), padding=[(2, 2)] * 2, rngs=rngs)
            self.second = nnx.Conv(12, 36, (3, 3), strides=(2, 2), padding=PADDED, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.head = nnx.Linear(7 * 7 * 36, 4, rngs=rngs)

        def __call__(self, x):
            z = jnp.tanh(self.second(jnp.tanh(self.first(x))))
            return self.head(self.dropout(z.reshape(len(x), -1)))

    images = rng.uniform(size=(1, 24, 24, 2))
    answer = invert(observe(Net(), (images, np.array([1]))))
    assert [info.solver for info in answer.layers[0][:-1]] == ["direct", "direct"]
    assert answer.certificates[0].status == "exact"
    assert np.max(np.abs(answer.images - images)) < 1e-6  # the weights of nnx are float32
