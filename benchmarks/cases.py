"""A case: one image of one data set, the model and client that gave its gradient away, and the attack on it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

Value = str | int | float


@dataclasses.dataclass(frozen=True)
class Case:
    """What one record is about.

    - `model`: a name that `nets.net_spec` knows; `activation` throughout (None is the paper's); `seed` of its weights;
    - `dataset`, `index`: the image; `batch` consecutive indices, a multiple of `batch` first, share one gradient;
    - `dtype`: in which the client computes; attacks compute in float64;
    - `attack`, and what `leakjax.invert` is told besides (`options`, sorted by name);
    - `train`: the client's batch norms normalize by the batch; "sent": its new running statistics are in the update,
      "kept": they stay with it; None is the mode in which the model is built;
    - `defense` of the client as `leakjax.observe` reads it; `local_steps` at `learning_rate` send an update instead of
      a gradient.
    """

    model: str
    attack: str
    dataset: str
    index: int = 0
    activation: str | None = None
    seed: int = 0
    batch: int = 1
    dtype: str = "float64"
    train: str | None = None
    defense: str | None = None
    local_steps: int = 1
    learning_rate: float | None = None
    options: tuple[tuple[str, Value], ...] = ()

    @property
    def group(self) -> "Case":
        """The case that stands for all those that differ in the image alone."""
        return dataclasses.replace(self, index=0)

    @property
    def fields(self) -> dict[str, Any]:
        """The entries of a record that name its case; what is as usual is left out."""
        usual = {"train": None, "defense": None, "local_steps": 1, "learning_rate": None}
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "options"}
        return {k: v for k, v in named.items() if k not in usual or v != usual[k]} | dict(self.options)

    @property
    def key(self) -> str:
        """One string a case, the same in every version: records are joined to cases by it."""
        words = [self.model, self.activation or "-", f"seed={self.seed}", f"{self.dataset}:{self.index}"]
        words += [self.attack, f"batch={self.batch}", self.dtype]
        words += [] if self.train is None else [f"train={self.train}"]
        words += [] if self.defense is None else [f"defense={self.defense}"]
        words += [] if self.local_steps == 1 else [f"local_steps={self.local_steps}"]
        words += [] if self.learning_rate is None else [f"learning_rate={self.learning_rate:g}"]
        return " ".join([*words, *(f"{name}={value}" for name, value in self.options)])


OPTIONS = ("solver", "starts", "steps", "prior", "pull_back", "optimizer", "labels")
"""What `leakjax.invert` can be told in a case."""

MAP = "map"
"""The value of the option `labels` that gives the attack the label maps of the images."""


def options(**given: Value) -> tuple[tuple[str, Value], ...]:
    """The options of a case in their one order."""
    return tuple(sorted(given.items()))


def case_of(record: Mapping[str, Any]) -> Case:
    """The case that a record names in its entries; older records do so too."""
    names = {f.name for f in dataclasses.fields(Case)} - {"options"}
    given = {name: record[name] for name in OPTIONS if name in record}
    return Case(**{k: v for k, v in record.items() if k in names}, options=options(**given))


def on_images(case: Case, indices: Iterable[int]) -> list[Case]:
    """The case on each of the images; those that do not fill a batch at the end are left out."""
    chosen = list(indices)
    whole = len(chosen) - len(chosen) % case.batch
    return [dataclasses.replace(case, index=i) for i in chosen[:whole]]
