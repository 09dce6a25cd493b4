"""The suites, as data: a suite is what it is for and its cases."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.cases import Case, on_images
from benchmarks.nets import batch_norm, net_spec, plain, strided

IMAGES = 20
PHOTOS, DIGITS = "foolbox/cifar10", "foolbox/mnist"


class Suite(NamedTuple):
    """A suite: one line on what it shows, and its cases."""

    summary: str
    cases: tuple[Case, ...]


def data_for(model: str) -> str:
    """The real images of a model's shape."""
    return DIGITS if net_spec(model).input_shape == (28, 28, 1) else PHOTOS


def _cross(
    models: str,
    attacks: str,
    *,
    activations: tuple[str | None, ...] = (None,),
    batches: tuple[int, ...] = (1,),
    dtypes: tuple[str, ...] = ("float64",),
    images: int = IMAGES,
    data: str | None = None,
    **common: Any,
) -> list[Case]:
    """Every combination of models, activations, batch sizes, dtypes and attacks, on the same images."""
    cases = []
    axes = models.split(), activations, batches, dtypes, attacks.split()
    for model, activation, batch, dtype, attack in itertools.product(*axes):
        given = {"activation": activation, "batch": batch, "dtype": dtype, **common}
        cases += on_images(Case(model, attack, data or data_for(model), **given), range(images))
    return cases


def _suite(summary: str, *parts: list[Case]) -> Suite:
    return Suite(summary, tuple(itertools.chain(*parts)))


RGAP = "cnn6 cnn6d fcn3"
HYBRID = "cnn2_c1 cnn2_c2 cnn2_c4 cnn2_c5 cnn2_c6 cnn3_c1 cnn3_c2 cnn3_c3 cnn3_c4 cnn3_c5 cnn4_c1 cnn4_c2 cnn4_c3 lenet"
RCONV = "rconv_lenet rconv_lenet12 rconv_lenet_o rconv_cnn6 rconv_4relu rconv_relu"
NOISES = ("1e-4", "1e-3", "1e-2", "1e-1")
DEFENSES = (
    *(f"gaussian:{sigma}" for sigma in NOISES),
    *(f"laplace:{scale}" for scale in NOISES),
    *(f"dp_sgd:1.0,{multiplier}" for multiplier in NOISES),
    *(f"top_k:{pruned}" for pruned in ("0.5", "0.9", "0.99", "0.999")),
    "sign",
    "qsgd:16",
    *(f"soteria:{pruned}" for pruned in ("0.01", "0.1", "0.4", "0.8")),
)


def _defenses(model: str) -> list[Case]:
    clients: list[dict[str, Any]] = [{}, *({"defense": spec} for spec in DEFENSES)]
    clients += [{"local_steps": steps, "learning_rate": 0.01} for steps in (2, 5)]
    kept: list[dict[str, Any]] = [{}, {"defense": "gaussian:1e-3"}, {"defense": "dp_sgd:1.0,1e-3"}]
    clients += [{**client, "batches": (2, 4, 8)} for client in kept]
    data = f"{PHOTOS}@32"
    return [case for client in clients for case in _cross(model, "match", data=data, **client)]


SIDES, WIDTHS, DEPTHS, BATCHES = (16, 24, 32, 48, 64), (12, 16, 24, 48), (1, 2, 3, 4, 6), (1, 2, 4, 8)
BASE = (32, 12, 2)


def _scaling() -> list[Case]:
    side, width, depth = BASE
    nets = [plain(n, width, depth) for n in SIDES] + [plain(side, n, depth) for n in WIDTHS]
    nets += [plain(side, width, n) for n in DEPTHS]
    cases = [Case(net, "rgap", "samples@64", k) for net in dict.fromkeys(nets) for k in range(4)]
    return cases + [
        c for b in BATCHES for c in on_images(Case(plain(*BASE), "match", "samples@64", batch=b), range(2 * b))
    ]


DEEP = tuple(batch_norm(plain(16, 12, depth)) for depth in (1, 2, 3, 4, 6, 8))


def _batch_norm() -> list[Case]:
    """Train-mode batch norms: seeds 0 to 2 on four photos, by batch, precision, and whether statistics are sent.

    Batches go to nets that they determine: of two images lenet's gradients hold 5,916 of 6,144 numbers at most, and the
    one logit of cnn6 has one row for all of a batch.
    """
    cases: list[Case] = []
    common: dict[str, Any] = {"activations": ("tanh", "leaky_relu:0.2"), "images": 4, "data": "samples"}
    single = " ".join(map(batch_norm, ("lenet", "cnn6")))
    for seed, train in itertools.product((0, 1, 2), ("sent", "kept")):
        told = common | {"seed": seed, "train": train}
        cases += _cross(single, "copa", dtypes=("float64", "float32"), **told)
        cases += _cross(batch_norm("wide"), "copa", batches=(1, 2, 4), dtypes=("float64", "float32"), **told)
        cases += _cross("resnet8", "copa", batches=(1, 2), **told)
        cases += _cross(" ".join(DEEP), "copa", batches=(1, 2), **told | {"activations": ("tanh",)})
    return cases


SUITES: Mapping[str, Suite] = {
    "smoke": _suite(
        "a minute of everything, for continuous integration",
        _cross("fcn3", "rgap copa", images=2),
        _cross("wide", "rgap", activations=("tanh",), images=2),
        on_images(Case(plain(12, 12, 1), "match", f"{PHOTOS}@32", batch=2), range(4)),
    ),
    "rgap-table": _suite(
        "R-GAP's nets (arXiv 2010.07733)",
        _cross(RGAP, "rgap copa", dtypes=("float64", "float32")),
        _cross(RGAP, "match hybrid rconv"),
    ),
    "hybrid-table": _suite("Chen & Campbell's nets (arXiv 2111.10178, 2210.13231)", _cross(HYBRID, "rgap hybrid copa")),
    "rconv-table": _suite(
        "R-CONV's nets (arXiv 2406.04227)",
        _cross(RCONV, "rconv copa"),
        _cross("rconv_lenet", "rconv copa", activations=("leaky_relu:0.2", "tanh", "sigmoid")),
    ),
    "matching": _suite(
        "gradient matching: the field's attacks beside ours, by batch size",
        _cross("lenet", "dlg idlg inverting_gradients match", activations=("sigmoid",)),
        _cross("lenet cnn6", "dlg idlg inverting_gradients match", activations=("tanh",)),
        _cross("wide", "dlg inverting_gradients match", activations=("tanh",), batches=(4, 8)),
    ),
    "defenses": _suite(
        "what each defense leaves of the images, by its strength, local steps and batch", _defenses(plain(16, 24, 1))
    ),
    "imagenet": Suite(
        "photos of 224x224 through a strided net with 1,000 classes, matrix-free (about 16 GiB)",
        tuple(on_images(Case(strided(224, 64), "rgap", "foolbox/imagenet@512"), range(3))),
    ),
    "batch-norm": Suite("nets whose batch norms are in training mode, by batch and what is sent", tuple(_batch_norm())),
    "scaling": Suite("cost against image side, width, depth and batch", tuple(_scaling())),
}
"""Suites by name."""
