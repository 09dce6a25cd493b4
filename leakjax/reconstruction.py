"""What an attack returns: images, labels, what each layer gave, and how sure it is."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

Status = Literal["exact", "ambiguous", "approximate", "failed"]
Proof = Literal["global", "local"]
LayerSolver = Literal["direct", "lsmr", "dense", "pull_back", "match"]
LayerStatus = Literal["determined", "deficient", "pulled_back", "failed"]


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One layer's linear system: `unknowns`, `rank` (None where too large to know), `rank_deficiency` = rank -
    unknowns, `condition` = largest over smallest non-zero singular value (estimated, but for "dense"),
    `residual` = ||A x - b|| / ||b||, `pull_back_depth` and solver `steps`.

    `solver`: "direct" (by the small matrix of its gradient, or a factor of its weights), "lsmr", "dense" (by singular
    values), "pull_back" (with the layers before it) or "match" (the gradient as a whole)."""

    name: str
    unknowns: int
    rank: int | None
    rank_deficiency: int | None
    condition: float | None
    residual: float
    pull_back_depth: int
    steps: int
    status: LayerStatus
    solver: LayerSolver = "lsmr"


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one layer's solve costs for one client, before it is done.

    - `unknowns`, `equations`: of its linear system;
    - `solver`: as in `LayerInfo`; what is nonlinear waits for the layers before it ("pull_back"), and its cost, which
      depends on the image, is None;
    - `operations`: floating-point operations before iterations; `step`: of each step that LSMR reports, the random
      input that tests the solve included; `most_steps`: the bound on these steps, 0 where there are none;
    - `bytes`: memory of the layer's compiled program, arguments and results included.
    """

    name: str
    unknowns: int
    equations: int
    solver: LayerSolver
    operations: float | None
    step: float | None
    most_steps: int | None
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What inverting the gradients of `clients` costs, `together` of them in one program, layer by layer (`layers`,
    first to last). The head, which is read first, and what certificates ask, are not counted.

    `bytes`: memory of the largest program on each device, which holds several layers where several clients are solved
    together.
    """

    clients: int
    together: int
    layers: tuple[LayerPlan, ...]
    bytes: int

    @property
    def operations(self) -> float:
        """Of all clients, before iterations."""
        return self.clients * sum(layer.operations or 0.0 for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How far a reconstruction can be trusted, known without the truth.

    - `exact`: the gradient is matched, and no other image in range has it, by the `proof`;
    - `ambiguous`: the gradient is matched, but `unknowns - leaked_dimensions` directions, or the listed candidates,
      cannot be told apart; `symmetry` names the moves of an image that its gradient does not show, where there are any;
    - `approximate`: the gradient is matched as well as noise, rounding or a defense allows, and `psnr_estimate` (dB,
      pixels in [0, 1]) says how near the image is expected to be;
    - `failed`: the gradient is not matched; `layer` names where it went wrong.

    `proof` is "global" where every layer's own linear system, up to the listed answers of the head, leaves no other
    image anywhere; "local" where the Jacobian at the answer leaves none near it, and neither the model's own symmetries
    nor other starts gave another. `reason` says why a certificate is not `exact`, and what to try.
    """

    status: Status
    leaked_dimensions: int | None
    unknowns: int
    condition: float | None
    layer: str | None = None
    proof: Proof | None = None
    symmetry: str | None = None
    psnr_estimate: float | None = None
    reason: str | None = None

    @classmethod
    def failure(cls, unknowns: int, condition: float | None, layer: str, reason: str | None) -> "Certificate":
        """A certificate of a gradient that is not matched, where and why."""
        return cls("failed", None, unknowns, condition, layer, reason=reason)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenReconstruction:
    """The ids of tokens behind a gradient of B sequences of T tokens each.

    - `ids` (B, T): -1 where the gradient does not tell;
    - `labels` (B,): of sequences that have one, None elsewhere, and where they do not come back;
    - `status`: "exact" where the gradient is matched, and no other sequences have it, by the `proof`; "ambiguous" where
      some of it is open; "failed" where the gradient shows no tokens; `reason` says why it is not exact;
    - `proof`: "global" where every id but those found leaves the spans of the gradient, wherever it stands; "local"
      where every sequence that differs in one token does;
    - `candidates`: by position, the ids whose tokens lie in the first span; `touched`: the ids whose rows of the table
      have a gradient, None where all have (a table that is also the output layer);
    - `rank`: of the tokens, read off the gradient; `gap`: between the distances of what is and is not a candidate;
    - `gradient_residual`: ||g(ids, labels) - g|| / ||g||, None where it was not computed.
    """

    ids: Int[np.ndarray, "B T"]
    labels: Int[np.ndarray, " B"] | None
    status: Status
    proof: Proof | None
    reason: str | None
    candidates: tuple[Int[np.ndarray, " ids"], ...]
    touched: Int[np.ndarray, " ids"] | None
    rank: int | None
    gap: float | None
    gradient_residual: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """One image that explains a gradient, with its label and ||g(x) - g|| / ||g||.

    `label` is -1 where the loss compares with a `target` that is no integer label.
    """

    image: Float[np.ndarray, "H W C"]
    label: int
    gradient_residual: float
    target: Shaped[np.ndarray, "..."] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """Images of N examples (V victims, or V gradients of B examples, N = V B) in the model's input range.

    - `images` (N, H, W, C), `labels` (N,), `label_source` ("recovered" or "given");
    - `determined` (N, H, W, C): share of each entry that the gradient determines, 1 = all, 0 = unseen;
    - `gradient_residual` (N,): ||g(x) - g|| / ||g||;
    - `certificates`, `layers` (first layer to last), `candidates` (best first): one entry an example;
    - `seconds`: trace, compile, solve, total;
    - `gradient_scale` (N,): the factor c of each example's gradient in what was sent, c dL/dtheta: 1 unless it was told
      or read otherwise from the last layer; NaN where other factors explain what was sent as well;
    - `targets`: by example, what its loss compares the logits with, where that is no integer label (then `labels` has
      -1) and the gradient shows it; dL/d(logits) where the loss is not known; None elsewhere;
    - `remarks`: what else the server should know, in words: of the model, or of how a capture was read.
    """

    attack: str
    dtype: str
    images: Float[np.ndarray, "V H W C"]
    labels: Int[np.ndarray, " V"]
    label_source: str
    determined: Float[np.ndarray, "V H W C"]
    gradient_residual: Float[np.ndarray, " V"]
    certificates: tuple[Certificate, ...]
    layers: tuple[tuple[LayerInfo, ...], ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    seconds: dict[str, float]
    gradient_scale: Float[np.ndarray, " N"]
    targets: tuple[Shaped[np.ndarray, "..."] | None, ...]
    remarks: tuple[str, ...] = ()

    @property
    def label_sources(self) -> tuple[str, ...]:
        """Where each label is from: "given", "recovered", "target" (the loss compares with `targets` instead), "open"
        (any numbers may be the target, and the gradient does not show them), or "guessed": the certificate is `failed`,
        or its candidates have several labels."""
        return tuple(self._label_source(k) for k in range(len(self.labels)))

    def _label_source(self, k: int) -> str:
        if self.targets[k] is not None:
            return "given" if self.label_source == "given" else "target"
        if self.labels[k] < 0:
            return "guessed" if self.certificates[k].status == "failed" else "open"
        if self.label_source == "given":
            return "given"
        one = len({candidate.label for candidate in self.candidates[k]}) == 1
        return "recovered" if one and self.certificates[k].status != "failed" else "guessed"

    @property
    def unseen_pixels(self) -> Int[np.ndarray, " V"]:
        """How many positions are determined below 1e-6 in every channel, by victim."""
        return np.sum(np.all(self.determined < 1e-6, axis=-1), axis=tuple(range(1, self.determined.ndim - 1)))
