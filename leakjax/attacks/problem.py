"""What every attack starts from: a chain of segments, weights, gradients, the loss. Never an image."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from leakjax.attacks.tolerances import Tolerances
from leakjax.client.defenses import Setting
from leakjax.constraints.layer import BLOCKS
from leakjax.models.losses import UNKNOWN, LossSpec, labels_of
from leakjax.models.normalization import Limits
from leakjax.models.reader import Arrays
from leakjax.models.targets import TargetKind
from leakjax.reconstruction import Candidate, LayerInfo, Proof
from leakjax.segments.chain import Chain, Segment
from leakjax.segments.tracing.network import Gradient, Network, client_update
from leakjax.solvers.descent import DEFAULT_OPTIMIZER, OPTIMIZERS

PULL_BACKS = ("auto", "levenberg_marquardt", "optax")
"""What solves pulled-back constraints: an active set behind piecewise-linear activations and Levenberg-Marquardt
elsewhere ("auto"), the latter alone, or first-order descent by the `optimizer` ("optax")."""

Labels = Int[np.ndarray, "B ..."] | Float[np.ndarray, "B ..."]
"""Of the examples of a gradient: classes, or what the logits are compared with."""

DeviceLabels = Int[Array, "B ..."] | Float[Array, "B ..."]
"""The same as compiled programs take them."""


class Computed(NamedTuple):
    """A client's own code: its `dtype`, `apply(variables, x)` -> logits, and `network()`, which measures statistics.

    `decay`: what was added to every gradient before it was sent, and subtracted here; by path, {} for nothing.
    """

    dtype: str
    apply: Callable[..., Float[Array, "B K"]]
    network: Callable[[], Network]
    decay: Mapping[str, Float[np.ndarray, "..."]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An observation made ready to solve in `dtype`; gradients have a leading victim axis.

    - `chain`: the model as segments, None where the attack needs none; `network`: itself for a whole batch;
    - `labels`: the given ones or None; `examples`: B of every gradient; `starts`: tried at once where an attack begins
      from noise; `prior`: a name of `PRIORS`, that chooses where information is missing.

    `noise` is the relative rounding of the client's own precision; `chunk` bounds
    how many victims are solved at once; `solver` is "auto", "lsmr" or "dense"; `pull_back` a name of `PULL_BACKS`;
    `optimizer` the Optax transformation of whatever goes by first-order descent. `steps` bounds that descent, None for
    an attack's own; `seed` is that of random starts. `blocks` says which constraints of a segment its system uses.
    `devices`: over which the victims of a layer's solve are spread, `chunk` on each; none is JAX's default device.

    What the attack was told of the clients: their `defense`, None where it takes the gradients as they are, and the
    `local_steps` with `learning_rate` that each update sums. `targets`: by victim, where one was read; () for none.
    `channel_limits`: (low, high), (C,) each, where channels have ranges of their own within `input_range`. `factors`:
    by victim the factor that its gradient is known to be multiplied by, None where it is not; () for none. `outputs`:
    how many logits the model has. `target_kind`, `target_shape`: of what the loss compares an example's outputs with
    (`models.targets`), unless the labels are given. `shared`: what is computed once for all victims, by name and
    segment. `single()`: the model for one example. `statistics`: sums over the data, by name
    (`segments.tracing.statistics`), that the clients' new buffers showed; `statistics_rounding`: relative, of each.
    `computed`: how the clients computed, where that was less precise than the attack.
    """

    chain: Chain | None
    network: Network
    variables: Arrays
    gradients: Mapping[str, Float[np.ndarray, "V ..."]]
    loss: LossSpec
    input_shape: tuple[int, ...]
    input_range: tuple[float, float]
    labels: Shaped[np.ndarray, "V B ..."] | None
    dtype: Any
    noise: float
    chunk: int = 1
    solver: str = "auto"
    pull_back: str = "auto"
    optimizer: optax.GradientTransformation = OPTIMIZERS[DEFAULT_OPTIMIZER]
    examples: int = 1
    starts: int = 1
    prior: str = "none"
    steps: int | None = None
    seed: int = 0
    blocks: Callable[[Segment], tuple[str, ...]] = lambda segment: BLOCKS
    devices: tuple[Any, ...] = ()
    defense: Setting | None = None
    local_steps: int = 1
    learning_rate: float | None = None
    targets: tuple[Float[np.ndarray, "..."] | None, ...] = ()
    channel_limits: Limits | None = None
    factors: tuple[float | None, ...] = ()
    outputs: int = 1
    target_kind: TargetKind = "class"
    target_shape: tuple[int, ...] = ()
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Float[np.ndarray, "V ..."]] = dataclasses.field(default_factory=dict)
    statistics_rounding: Mapping[str, float] = dataclasses.field(default_factory=dict)
    single: Callable[[], Network] | None = None
    computed: Computed | None = None

    @property
    def classes(self) -> Sequence[int]:
        """The classes that an example may have, where its target is one."""
        return range(labels_of(self.outputs)) if self.target_kind == "class" and self.loss != UNKNOWN else ()

    @property
    def free(self) -> bool:
        """Whether any numbers may be the target: then dL/dz says nothing but itself."""
        return self.labels is None and (
            self.loss == UNKNOWN or self.target_kind in ("values", "probabilities", "input", "classes")
        )

    @property
    def maps_unknown(self) -> bool:
        """Whether the target is a class at every position, and not given."""
        return self.labels is None and self.target_kind == "classes" and self.loss != UNKNOWN

    @property
    def several(self) -> bool:
        """Whether the target is 0 or 1 for every output, and not given."""
        return self.labels is None and self.target_kind == "several" and self.loss != UNKNOWN

    def target(self, victim: int) -> Float[np.ndarray, "..."] | None:
        """What the loss of a gradient of one example compares the logits with, where that is no integer label."""
        return self.targets[victim] if self.targets else None

    def factor(self, victim: int) -> float | None:
        """What the gradient of a victim is known to be multiplied by."""
        return self.factors[victim] if self.factors else None

    def told(self, segments: Iterable[Segment], victim: int) -> dict[str, Float[np.ndarray, "..."]]:
        """The statistics of segments, by name, that a victim's new buffers showed."""
        names = (name for s in segments if s.statistics is not None for name in s.statistics.names)
        return {name: self.statistics[name][victim] for name in names if name in self.statistics}

    def alone(self, victim: int, **changes: Any) -> "Problem":
        """The problem of one victim, with `changes` of other fields."""
        return dataclasses.replace(
            self,
            gradients={p: g[victim : victim + 1] for p, g in self.gradients.items()},
            statistics={name: t[victim : victim + 1] for name, t in self.statistics.items()},
            labels=None if self.labels is None else self.labels[victim : victim + 1],
            targets=self.targets[victim : victim + 1],
            factors=self.factors[victim : victim + 1],
            **changes,
        )

    @property
    def client(self) -> Gradient:
        """(variables, x, labels, smoothing=None) -> what an undefended client would send."""
        return client_update(
            self.network.logits, self.loss, tuple(self.gradients), self.local_steps, self.learning_rate
        )

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The chain's segments, first to last."""
        assert self.chain is not None, "this attack needs a chain"
        return self.chain.segments

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """(B, H, W, C): the images behind one gradient."""
        return (self.examples, *self.input_shape)

    def in_range(self, x: Float[np.ndarray, "..."]) -> bool:
        """Whether every entry of `x` could be in the input range, a little of it beyond for rounding."""
        low, high = self.limits
        slack = self.tolerances.slack * (high - low)
        return bool(np.all(x >= low - slack) and np.all(x <= high + slack))

    @property
    def gap(self) -> float:
        """How far apart two images may lie that count as one."""
        return self.tolerances.alike * (self.input_range[1] - self.input_range[0])

    @property
    def limits(self) -> Limits:
        """(low, high) of a pixel: two numbers, or (C,) each where channels differ."""
        return self.input_range if self.channel_limits is None else self.channel_limits

    @property
    def victims(self) -> int:
        """How many gradients there are."""
        return len(next(iter(self.gradients.values())))

    @functools.cached_property
    def tolerances(self) -> Tolerances:
        """What counts as rounding in this problem."""
        return Tolerances.of(self.dtype, self.noise)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """An attack's answer for one example: candidates, best first, and the layers of the best one (first to last).

    - `seen`: share of each input entry that the first layer determines, None where a later layer was deficient or
      failed;
    - `proof`: "global" where no image but the candidates, and what the first layer's null space adds to them, has this
      gradient; None where only the Jacobian at the answer speaks;
    - `symmetry`: moves of the image that leave the gradient as it is, by name, with the `count` of images they give and
      the entries `moved` by them;
    - `multiples`: whether other images, its multiples or others, have the same gradient times a factor that is not
      known; `refuted`: whether the answer stands for nothing, for the `reason` given;
    - `curved`: whether the open directions hold near the answer only;
    - `open_map`: None, or why another label map with another image may have the same gradient;
    - `scale`, `target`: as `Reconstruction` has them; `reason`: why there is no answer, where the attack knows;
    - `psnr_estimate`: in dB, where noise or rounding remains and the answer is as good as they allow, with the standard
      deviation `psnr_spread` of what chance does to one image.
    """

    candidates: tuple[Candidate, ...]
    layers: tuple[LayerInfo, ...]
    seen: Float[np.ndarray, "..."] | None
    proof: Proof | None = None
    symmetry: str | None = None
    count: int = 1
    moved: Bool[np.ndarray, "..."] | None = None
    multiples: bool = False
    refuted: bool = False
    curved: bool = False
    open_map: str | None = None
    scale: float = 1.0
    target: Float[np.ndarray, "..."] | None = None
    reason: str | None = None
    psnr_estimate: float | None = None
    psnr_spread: float = 0.0


@dataclasses.dataclass
class Monitor:
    """Where the time goes, a listener for what is being done, and by victim the `reasons` why it cannot be.

    `several`: victims whose head's gradient is of more examples than was told, and not of full rank, as noise is.
    """

    trace: float = 0.0
    compile: float = 0.0
    solve: float = 0.0
    tell: Callable[[str], None] = lambda stage: None
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)
    several: set[int] = dataclasses.field(default_factory=set)
