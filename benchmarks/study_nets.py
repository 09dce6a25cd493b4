"""Random small architectures for the study of certificates: ten activations in nine forms, weights and images by seed.

All take 6x6 images. Half of them are deficient, even, odd or symmetric somewhere: the study asks whether certificates
say so.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 6

ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "leaky_relu": lambda z: jnp.where(z > 0, z, 0.2 * z),
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "sin": jnp.sin,
    "square": jnp.square,
    "abs": jnp.abs,
}

FORMS = ("strided", "padded", "circular", "pooled", "patches", "normalized", "residual", "tied", "bare")


class Net(NamedTuple):
    """One architecture: its number, activation and form, `apply(params, x)`, the shapes of its parameters, what its
    images lie between, its loss and how many logits it has."""

    number: int
    activation: str
    form: str
    apply: Callable[[Any, Any], Any]
    shapes: dict[str, tuple[int, ...]]
    channels: int
    input_range: tuple[float, float]
    loss: str
    outputs: int

    @property
    def labels(self) -> int:
        """How many labels there are."""
        return max(self.outputs, 2)

    def params(self, seed: int) -> dict[str, np.ndarray]:
        """Weights of variance 1 / inputs, biases of deviation 0.2."""
        rng = np.random.default_rng((self.number, seed))

        def draw(shape: tuple[int, ...]) -> np.ndarray:
            inputs = int(np.prod(shape[:-1]))
            return rng.normal(0, inputs**-0.5 if len(shape) > 1 else 0.2, shape)

        return {path: draw(shape) for path, shape in self.shapes.items()}

    def images(self, seed: int, count: int) -> np.ndarray:
        """Uniform noise, and every second image a bright figure on the darkest value, away from the border."""
        rng, (low, high) = np.random.default_rng((self.number, seed, 1)), self.input_range
        x = rng.uniform(low, high, (count, SIDE, SIDE, self.channels))
        for k in range(1, count, 2):
            figure = x[k, 2:4, 2:5].copy()
            x[k] = low
            x[k, 2:4, 2:5] = figure
        return x

    def label_draws(self, seed: int, count: int) -> np.ndarray:
        """Labels (count,)."""
        return np.random.default_rng((self.number, seed, 2)).integers(0, self.labels, count)


def architecture(number: int) -> Net:
    """The architecture of this number: activation and form by their turn, sizes drawn."""
    names = list(ACTIVATIONS)
    activation, form = names[number % len(names)], FORMS[number // len(names) % len(FORMS)]
    rng = np.random.default_rng(number)
    channels = int(rng.integers(1, 3))
    symmetric = activation in ("sin", "square", "abs") and bool(rng.random() < 0.5)
    bare = form == "bare"
    outputs = int(rng.choice([1, 4])) if bare else int(rng.integers(3, 7))
    loss = "sigmoid_binary_cross_entropy" if outputs == 1 else "softmax_cross_entropy"
    apply, shapes = _BUILDERS[form](ACTIVATIONS[activation], rng, channels, outputs)
    return Net(
        number=number,
        activation=activation,
        form=form,
        apply=apply,
        shapes=shapes,
        channels=channels,
        input_range=(-1.0, 1.0) if symmetric else (0.0, 1.0),
        loss=loss,
        outputs=outputs,
    )


Built = tuple[Callable[[Any, Any], Any], dict[str, tuple[int, ...]]]


def convolve(x: Any, kernel: Any, stride: int = 1, padding: str = "VALID") -> Any:
    """An NHWC convolution; "CIRCULAR" wraps around."""
    if padding == "CIRCULAR":
        around = kernel.shape[0] // 2
        x = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)), mode="wrap")
        padding = "VALID"
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions)


def _bias(b: Any) -> Any:
    return b.reshape(1, 1, 1, -1)


def _head(p: Any, x: Any) -> Any:
    z = x.reshape(len(x), -1) @ p["w"]
    return z + p["c"][None] if "c" in p else z


def _convolutional(act: Any, plan: list[tuple[int, str]], pool: int) -> Callable[[Any, Any], Any]:
    def apply(p: Any, x: Any) -> Any:
        for k, (stride, padding) in enumerate(plan):
            z = convolve(x, p[f"k{k}"], stride, padding)
            x = act(z + _bias(p[f"b{k}"]) if f"b{k}" in p else z)
        if pool:
            side = x.shape[1] // pool
            x = x.reshape(len(x), side, pool, side, pool, x.shape[3]).mean((2, 4))
        return _head(p, x)

    return apply


def _stack(
    act: Any,
    rng: Any,
    channels: int,
    outputs: int,
    *,
    plans: list[list[tuple[int, str]]],
    sizes: tuple[int, int],
    pool: int = 0,
    biases: bool = True,
) -> Built:
    plan = plans[int(rng.integers(len(plans)))]
    shapes: dict[str, tuple[int, ...]] = {}
    side, filters = SIDE, channels
    for k, (stride, padding) in enumerate(plan):
        kernel, new = 3 if padding != "PATCH" else stride, int(rng.integers(*sizes))
        shapes[f"k{k}"] = (kernel, kernel, filters, new)
        if biases:
            shapes[f"b{k}"] = (new,)
        side, filters = -(-(side - kernel + 1 if padding in ("VALID", "PATCH") else side) // stride), new
    plan = [(stride, "VALID" if padding == "PATCH" else padding) for stride, padding in plan]
    inside = (side // pool) ** 2 * filters if pool else side**2 * filters
    shapes["w"] = (inside, outputs)
    if biases:
        shapes["c"] = (outputs,)
    return _convolutional(act, plan, pool), shapes


def _strided(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    plans = [[(2, "SAME")], [(1, "VALID"), (2, "VALID")], [(2, "VALID"), (1, "SAME")]]
    return _stack(act, rng, channels, outputs, plans=plans, sizes=(4, 14))


def _padded(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    plans = [[(1, "SAME")], [(1, "SAME"), (1, "SAME")], [(1, "SAME"), (1, "VALID")]]
    return _stack(act, rng, channels, outputs, plans=plans, sizes=(2, 8))


def _circular(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    pool = int(rng.choice([0, SIDE]))
    plans = [[(1, "CIRCULAR")], [(1, "CIRCULAR"), (1, "CIRCULAR")]]
    return _stack(act, rng, channels, outputs, plans=plans, sizes=(4, 10), pool=pool)


def _pooled(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    plans = [[(1, "SAME")], [(1, "SAME"), (1, "SAME")]]
    return _stack(act, rng, channels, outputs, plans=plans, sizes=(6, 14), pool=int(rng.choice([2, 3, SIDE])))


def _patches(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    size = int(rng.choice([2, 3]))
    pool = int(rng.choice([1, SIDE // size]))
    return _stack(act, rng, channels, outputs, plans=[[(size, "PATCH")]], sizes=(8, 16), pool=pool)


def _bare(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    plans = [[(1, "VALID")], [(1, "VALID"), (1, "SAME")]]
    return _stack(act, rng, channels, outputs, plans=plans, sizes=(6, 12), biases=False)


def _normalized(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    new = int(rng.integers(8, 14))

    def apply(p: Any, x: Any) -> Any:
        z = convolve(x, p["k0"]) + _bias(p["b0"])
        mean = z.mean((1, 2, 3), keepdims=True)
        spread = jnp.sqrt(((z - mean) ** 2).mean((1, 2, 3), keepdims=True) + 1e-5)
        return _head(p, act((z - mean) / spread * _bias(1.0 + p["gamma"]) + _bias(p["beta"])))

    shapes = {"k0": (3, 3, channels, new), "b0": (new,), "gamma": (new,), "beta": (new,)}
    return apply, shapes | {"w": ((SIDE - 2) ** 2 * new, outputs), "c": (outputs,)}


def _residual(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    new = int(rng.integers(4, 10))

    def apply(p: Any, x: Any) -> Any:
        x = act(convolve(x, p["k0"], 1, "SAME") + _bias(p["b0"]))
        x = act(x + convolve(act(convolve(x, p["k1"], 1, "SAME") + _bias(p["b1"])), p["k2"], 1, "SAME"))
        return _head(p, x)

    shapes = {"k0": (3, 3, channels, new), "b0": (new,), "k1": (3, 3, new, new), "b1": (new,), "k2": (3, 3, new, new)}
    return apply, shapes | {"w": (SIDE**2 * new, outputs), "c": (outputs,)}


def _tied(act: Any, rng: Any, channels: int, outputs: int) -> Built:
    """One kernel used twice: no layer has a gradient of its own."""

    def apply(p: Any, x: Any) -> Any:
        x = act(convolve(x, p["k0"], 1, "SAME") + _bias(p["b0"]))
        x = act(convolve(x, p["k1"], 1, "SAME") + _bias(p["b1"]))
        return _head(p, act(convolve(x, p["k1"], 1, "SAME") + _bias(p["b2"])))

    new = int(rng.integers(4, 8))
    shapes = {"k0": (3, 3, channels, new), "b0": (new,), "k1": (3, 3, new, new), "b1": (new,), "b2": (new,)}
    return apply, shapes | {"w": (SIDE**2 * new, outputs), "c": (outputs,)}


_BUILDERS: Mapping[str, Callable[..., Built]] = {
    "strided": _strided,
    "padded": _padded,
    "circular": _circular,
    "pooled": _pooled,
    "patches": _patches,
    "normalized": _normalized,
    "residual": _residual,
    "tied": _tied,
    "bare": _bare,
}
