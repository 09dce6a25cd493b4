"""What an audit found: a frozen record that knows how to write itself."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class PaddedCount(NamedTuple):
    """A layer's system as R-GAP writes it, zeros of the padding among the unknowns, with an equation each.

    `rows` (forward, gradient and padding equations), `columns` (unknowns with padding), `rank`: the structural one, or
    the measured one where there is one. As many rows as columns do not make a layer solvable; full rank does.
    """

    rows: int
    columns: int
    rank: int

    @property
    def missing(self) -> int:
        """Columns that the rows leave open."""
        return self.columns - self.rank


@dataclasses.dataclass(frozen=True)
class LayerAudit:
    """One layer, first to last.

    - `unknowns`: entries of its input; `rank` and `rank_deficiency` (<= 0) of its forward and gradient constraints at
      the audited image, `condition` of these; None where nothing numeric was asked for;
    - `structural_rank`: the rank that its shapes allow; `structural_exact`: whether that is the generic rank, or a
      bound;
    - `dead_pixels`: input positions that none of its outputs sees; `known_share`: share of its outputs that its
      activation gives back (ReLU hides the others);
    - `weight` of its deficiency in c(M), 0 for the dense head; `pull_back_depth`: layers before it whose constraints an
      attacker needs to determine its input, None where even all of them leave it open (or nothing numeric was asked);
    - `parameters`: how many; `padded`: rows, columns and rank as R-GAP counts; `sentence`: what it costs an attacker.
    """

    name: str
    unknowns: int
    rank: int | None
    rank_deficiency: int | None
    structural_rank: int
    structural_exact: bool
    condition: float | None
    dead_pixels: int
    weight: float
    known_share: float | None
    pull_back_depth: int | None
    parameters: int
    padded: PaddedCount
    sentence: str


@dataclasses.dataclass(frozen=True)
class NoisePoint:
    """What noise of standard deviation `sigma` in every gradient entry leaves an attacker.

    - `psnr_bound`: no unbiased attack has a higher 10 log10(1 / mean squared error), pixels in [0, 1] (Cramer-Rao);
      None where the image is not determined;
    - `psnr_estimate_prior`: the same with the prior that natural images are smooth, a local estimate;
    - `psnr_at_image`: of the same estimate at the audited image itself (the one of a batch that comes back best), which
      may be smoother than the prior's images and come back better;
    - `effective_dimensions`: directions that stand out of the noise, and `effective_dimensions_error`, their standard
      error where they are estimated;
    - `noise_multiplier`, `clip`, `epsilon`, `delta`: of the DP-SGD step that adds this noise, None elsewhere;
    - `asked`: whether the caller asked for this level, so that the verdict speaks of it.
    """

    sigma: float
    psnr_bound: float | None
    psnr_estimate_prior: float | None
    effective_dimensions: float
    effective_dimensions_error: float | None = None
    noise_multiplier: float | None = None
    clip: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    asked: bool = False
    psnr_at_image: float | None = None

    @property
    def attainable_psnr(self) -> float | None:
        """The better of two attackers, in dB: one without bias, one with the prior, over its images and at this one.

        None where nothing is known of either.
        """
        known = self.psnr_bound, self.psnr_estimate_prior, self.psnr_at_image
        return max((v for v in known if v is not None and not math.isnan(v)), default=None)


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of one layer, and the leaked dimensions that its shapes allow after it."""

    layer: str
    change: str
    leaked_dimensions: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Withheld:
    """What leaks when these layers' gradients are not sent.

    `leaked_dimensions`: what the shapes then allow, of one example; `measured_dimensions` and `leakage_map` (B, H, W,
    C): the rank that is left at the audited images and each entry's share in it, None where nothing numeric was asked.
    """

    layers: tuple[str, ...]
    leaked_dimensions: int
    measured_dimensions: int | None = None
    leakage_map: Float[np.ndarray, "B H W C"] | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """What an attacker gets back of the audited images, (B, H, W, C) in [0, 1], at noise `sigma`, None for none.

    An estimate near the image, by an attacker who knows how smooth natural images are; see `leakage.pictures`. `psnr`:
    of the image that comes back best, in dB, as expected over the noise or as drawn here, the higher of the two.
    """

    sigma: float | None
    image: Float[np.ndarray, "B H W C"]
    psnr: float


UNSEEN = 1e-6
"""Row-space share below which the gradient says nothing of a pixel; shares are computed to some 1e-12."""

_MAPS = ("leakage_map", "uncertainty", "images", "pictures")


@dataclasses.dataclass(frozen=True)
class AuditRecord:
    """How much a model leaks of its images, and why.

    - `c_m`, `c_m_rounded`: Chen & Campbell's index, 0 where every layer is determined, more negative where less leaks;
    - `structural_leaked_dimensions`: the leaked dimensions that the shapes allow; `leaked_dimensions`: the rank of the
      gradient's Jacobian at the audited images;
    - `spectrum`: the Jacobian's singular values, descending; `leakage_map` (B, H, W, C): each entry's share in the row
      space, 1 where the gradient determines it; `unseen_pixels`: positions below 1e-6 in every channel;
    - `uncertainty`: (B, H, W, C) standard deviations, pixels in [0, 1], that the first noise level leaves an unbiased
      attacker (infinite where open);
    - `verdict`: "exact", "partial", "limited" (few numbers leak; the sentence says what picture they make) or "unknown"
      (nothing sound can be said: it passes no gate), and the `sentence` that says why, of the noise that was asked for;
    - `images`: the audited ones, pixels in [0, 1], and `pictures`, what an attacker gets back of them, without noise
      first, then at each level of noise that was asked for; neither is written to audit.json;
    - `remarks`: what could not be given; `blind`: operations through which no derivative sees;
    - `leakjax`, `seed`, `loss`, `data`, `weights`, `device`, `date`: what ties the audit to a model, images and a run.
    """

    model: str
    input_shape: tuple[int, ...]
    examples: int
    c_m: float
    c_m_rounded: int
    layers: tuple[LayerAudit, ...]
    unknowns: int
    structural_leaked_dimensions: int
    leaked_dimensions: int | None
    leaked_fraction: float | None
    unseen_pixels: int | None
    spectrum: tuple[float, ...] | None
    noise: tuple[NoisePoint, ...] | None
    verdict: str
    sentence: str
    changes: tuple[Change, ...] = ()
    withheld: tuple[Withheld, ...] = ()
    remarks: tuple[str, ...] = ()
    leakage_map: Float[np.ndarray, "B H W C"] | None = None
    uncertainty: Float[np.ndarray, "B H W C"] | None = None
    images: Float[np.ndarray, "B H W C"] | None = None
    pictures: tuple[Picture, ...] = ()
    blind: tuple[str, ...] = ()
    leakjax: str | None = None
    seed: int | None = None
    loss: str | None = None
    data: str | None = None
    weights: str | None = None
    device: str | None = None
    date: str | None = None

    @property
    def attainable_psnr(self) -> float | None:
        """The most, in dB, that an attacker reaches at the worst of the levels of noise that were asked for.

        The better of an unbiased attack and one with a prior, by `psnr_bound` and `psnr_estimate_prior`; None where no
        level was asked for, or where at one of them neither is known or the verdict is "unknown": then nothing bounds
        it.
        """
        asked = [point for point in self.noise or () if point.asked]
        levels = [point.attainable_psnr for point in asked]
        if not asked or self.verdict == "unknown" or None in levels:
            return None
        return max(level for level in levels if level is not None)

    def to_json(self) -> dict[str, Any]:
        """The object of audit.json: every field but the maps; numbers that are not finite are None."""
        return _plain(self)

    def maps(self) -> dict[str, Float[np.ndarray, "B H W C"]]:
        """The maps that there are: `leakage_map`, `uncertainty`, and `withheld`, what then remains of the first."""
        remaining = self.withheld[0].leakage_map if self.withheld else None
        found = {"leakage_map": self.leakage_map, "uncertainty": self.uncertainty, "withheld": remaining}
        return {name: array for name, array in found.items() if array is not None}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(v) for name, v in fields.items() if name not in _MAPS}
    if isinstance(value, PaddedCount):
        return value._asdict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
