"""Random small nets with normalizations in training mode, for the study of certificates (`study --nets norms`).

One to three convolutions, most with a norm behind them (batch, layer, group or instance norm; before or behind the
activation; some inside a residual block), one or two examples a gradient, float64 or float32, running statistics sent
or kept, PyTorch's or Flax's momentum. Half of the nets are so small that directions stay open.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.records import Record
from benchmarks.study_judge import entries, judge
from leakjax import InputError, Observation, invert, observe
from leakjax.models.losses import LOSSES

ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "leaky_relu": lambda z: jax.nn.leaky_relu(z, 0.2),
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
}
NORMS = ("batch", "batch", "batch", "layer", "group", "instance", "none")  # a batch norm in every second place
LOSS = "softmax_cross_entropy"


class Layer(NamedTuple):
    """A convolution with what is behind it; `skip`: added to its own input, where the shapes agree."""

    filters: int
    kernel: int
    stride: int
    padding: str
    norm: str
    bias: bool
    late: bool
    skip: bool


class Plan(NamedTuple):
    """One net and its client."""

    number: int
    side: int
    channels: int
    layers: tuple[Layer, ...]
    activation: str
    examples: int
    dtype: str
    sent: bool
    torch: bool

    @property
    def form(self) -> str:
        """What its norms are."""
        kinds = {layer.norm for layer in self.layers} - {"none", "batch"}
        blocks = any(layer.skip and not layer.late for layer in self.layers)
        return ("batch norms and others" if kinds else "batch norms") + (" in blocks" if blocks else "")

    @property
    def client(self) -> str:
        """What the client does."""
        statistics = "sent" if self.sent else "kept"
        return f"batches of {self.examples}, {self.dtype}, statistics {statistics}"


def plan_of(number: int) -> Plan:
    """The net of this number: activation and batch size by their turn, sizes drawn."""
    rng = np.random.default_rng((2023, number))
    side, channels = int(rng.integers(5, 9)), int(rng.integers(1, 4))
    narrow = bool(rng.integers(2))
    layers = []
    size = side
    for _ in range(int(rng.integers(1, 4))):
        kernel, padding = int(rng.integers(2, 4)), str(rng.choice(["SAME", "VALID"]))
        stride = int(rng.choice([1, 1, 2])) if size >= 4 else 1
        if padding == "VALID" and size - kernel + 1 < 3:
            padding = "SAME"
        filters = int(rng.integers(2, 9)) if narrow else int(rng.integers(10, 17)) * stride
        norm, bias = str(rng.choice(NORMS)), bool(rng.integers(2))
        late, skip = int(rng.integers(5)) == 0, int(rng.integers(4)) == 0
        if skip:
            kernel, stride, padding = 3, 1, "SAME"
            filters = layers[-1].filters if layers else filters
        skip = skip and bool(layers)
        layers.append(Layer(filters, kernel, stride, padding, norm, bias, late, skip))
        size = -(-(size - (kernel - 1) * (padding == "VALID")) // stride)
    if all(layer.norm != "batch" for layer in layers):
        layers[-1] = layers[-1]._replace(norm="batch")
    return Plan(
        number=number,
        side=side,
        channels=channels,
        layers=tuple(layers),
        activation=list(ACTIVATIONS)[number % 4],
        examples=1 + number // 4 % 2,
        dtype="float32" if rng.random() < 0.3 else "float64",
        sent=bool(rng.integers(2)),
        torch=bool(rng.integers(2)),
    )


class Net(nnx.Module):
    """The net of a plan, in training mode."""

    def __init__(self, plan: Plan, *, rngs: nnx.Rngs):
        self.plan = plan
        channels, size = plan.channels, plan.side
        for k, layer in enumerate(plan.layers):
            window = (layer.kernel, layer.kernel)
            convolution = nnx.Conv(
                channels,
                layer.filters,
                window,
                strides=layer.stride,
                padding=layer.padding,
                use_bias=layer.bias,
                rngs=rngs,
            )
            setattr(self, f"conv{k}", convolution)
            channels = layer.filters
            if layer.norm != "none":
                setattr(self, f"norm{k}", _norm(layer.norm, channels, plan.torch, rngs))
            size = -(-(size - (layer.kernel - 1) * (layer.padding == "VALID")) // layer.stride)
        self.head = nnx.Linear(size * size * channels, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits (N, 5) of images (N, H, W, C)."""
        activation = ACTIVATIONS[self.plan.activation]
        for k, layer in enumerate(self.plan.layers):
            norm = getattr(self, f"norm{k}", lambda z: z)
            z = getattr(self, f"conv{k}")(x)
            z = norm(activation(z)) if layer.late else activation(norm(z) + x if layer.skip else norm(z))
            x = z
        return self.head(x.reshape(len(x), -1))


def _norm(kind: str, channels: int, torch: bool, rngs: nnx.Rngs) -> nnx.Module:
    if kind == "batch":
        return nnx.BatchNorm(
            channels, use_running_average=False, momentum=0.9 if torch else 0.99, epsilon=1e-5, rngs=rngs
        )
    if kind == "layer":
        return nnx.LayerNorm(channels, rngs=rngs)
    groups = channels if kind == "instance" else 2 if channels % 2 == 0 else 1
    return nnx.GroupNorm(channels, num_groups=groups, rngs=rngs)


def build(plan: Plan) -> Net:
    """The net with scales near 1, biases near 0 and running statistics that are not those of a new net."""
    net = Net(plan, rngs=nnx.Rngs(plan.number))
    rng = np.random.default_rng((plan.number, 7))
    for path, variable in nnx.to_flat_state(nnx.state(net)):
        kind, value = str(path[-1]), np.asarray(variable[...])
        if kind == "var":
            variable[...] = jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32)
        elif kind in ("scale", "bias", "mean"):
            variable[...] = jnp.asarray(value + 0.2 * rng.normal(size=value.shape), jnp.float32)
    return net


def run_net(number: int, done: set[tuple[int, str, str]]) -> Iterator[Record]:
    """A record an example of one net, unless it is `done`."""
    plan = plan_of(number)
    if (number, plan.client, "copa") in done:
        return
    rng = np.random.default_rng((number, 5))
    images = rng.uniform(0, 1, (plan.examples, plan.side, plan.side, plan.channels))
    labels = rng.integers(0, 5, plan.examples)
    base = {"net": number, "activation": plan.activation, "form": plan.form, "client": plan.client, "attack": "copa"}
    begun = time.process_time()
    try:
        observation = observe(
            build(plan),
            (images, labels),
            loss=LOSS,
            batch_size=plan.examples,
            train=True,
            buffers=plan.sent,
            dtype=plan.dtype,
        )
        answer = invert(observation)
    except InputError as error:
        yield base | {"status": "refused", "reason": str(error), "cpu_s": round(time.process_time() - begun, 2)}
        return
    spent = time.process_time() - begun
    able = solvable(observation, images, labels)
    for k, verdict in enumerate(judge(observation, answer, images, labels)):
        found = entries(verdict, answer.certificates[k], answer.label_sources[k])
        spent_on_one = round(spent / plan.examples, 2)
        yield base | found | {"reason": answer.certificates[k].reason, "solvable": able, "cpu_s": spent_on_one}


def solvable(observation: Observation, images: np.ndarray, labels: Sequence[int] | np.ndarray) -> bool:
    """Whether gradient, and statistics where they are sent, have a Jacobian of full rank and a condition below 1e8 at
    the truth, all images of the batch together, in float64."""
    with jax.enable_x64(True):
        model = observation.model.astype(np.float64)
        x, y = jnp.asarray(images, jnp.float64), jnp.asarray(labels)
        sent = tuple(observation.buffers)

        def told(x: Any) -> Any:
            def loss(params: Any) -> Any:
                logits = model.apply({**model.buffers, **params}, x)
                return jnp.mean(jax.vmap(LOSSES[LOSS])(logits, y))

            new = model.step({**model.buffers, **model.params}, x)[1] if sent else {}
            parts = [*jax.grad(loss)(dict(model.params)).values(), *(new[path] for path in sent)]
            sizes = [jnp.maximum(jnp.linalg.norm(jax.lax.stop_gradient(a)), 1e-6) for a in parts]
            return jnp.concatenate([jnp.ravel(a) / s for a, s in zip(parts, sizes, strict=True)])

        matrix = np.asarray(jax.jit(jax.jacfwd(told))(x)).reshape(-1, x.size)
    if len(matrix) < images.size or not np.all(np.isfinite(matrix)):
        return False
    s = np.linalg.svd(matrix, compute_uv=False)
    return bool(s[-1] > 1e-8 * s[0])
