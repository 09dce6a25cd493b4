"""Values that no argument takes, by what the argument wants; and what the wrong ones are variations of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import leakjax
from leakjax.client.observation import Observation
from leakjax.reconstruction import Certificate, Reconstruction


class Hostile:
    """Answers no question."""

    def __repr__(self):
        raise RuntimeError("no repr")

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")

    def __eq__(self, other):
        raise RuntimeError("no equality")

    __hash__ = None


def apply(p, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"]) @ p["v"]


DRAW = np.random.default_rng(0)
PARAMS = {"w": np.float32(DRAW.normal(size=(16, 8))), "v": np.float32(DRAW.normal(size=(8, 3)))}
MODEL = leakjax.read_model(apply, PARAMS)
IMAGES, LABELS = DRAW.uniform(size=(2, 4, 4, 1)), np.array([0, 2])
GRADIENTS = {path: DRAW.normal(size=(2, *a.shape)) for path, a in PARAMS.items()}
OBSERVATION = Observation(
    model=MODEL, gradients=GRADIENTS, loss="softmax_cross_entropy", input_shape=(4, 4, 1), input_range=(0.0, 1.0)
)
NOTHING = Certificate("failed", None, 16, None)
RECONSTRUCTION = Reconstruction(
    attack="rgap",
    dtype="float64",
    images=IMAGES,
    labels=LABELS,
    label_source="given",
    determined=IMAGES,
    gradient_residual=np.zeros(2),
    certificates=(NOTHING,) * 2,
    layers=((), ()),
    candidates=((), ()),
    seconds={},
    gradient_scale=np.ones(2),
    targets=(None, None),
)

JUNK = (object(), Hostile(), lambda: 0, {"a": 1}, b"bytes", 1j)
NOT_NAMES = (None, 3, True, [], ("a",), np.array(["a"]), "", "no such name", "[/]", *JUNK)
NOT_COUNTS = ("2", "", 0, -1, 1.0, 1.5, True, np.nan, np.inf, 10**30, [], [1], np.array([1, 2]), *JUNK)
NOT_SIZES = ("1", 0, -1, True, np.nan, np.inf, 10**400, 1e300, [], [1.0], np.ones(2), *JUNK)
NOT_NUMBERS = (
    *(3, "0.5", "abc", [], (), (None,), ("0.5",) * 3, (np.nan,), (np.inf,), (0.5, 0.5), (0.5,) * 4, (1j,), [[0.5]]),
    *(True, {0: 0.5}, (10**400,), *JUNK),
)
NOT_SEEDS = ("2", -1, 1.5, True, np.nan, [], 10**30, *JUNK)
NOT_RANGES = (
    None,
    0,
    "01",
    (),
    (0,),
    (1, 0),
    (0, 0),
    (np.nan, 1),
    (0, np.inf),
    (0, 1, 2),
    ("0", "1"),
    (0, 10**400),
    *JUNK,
)
NOT_IMAGES = (
    *(
        None,
        [],
        "images",
        3,
        object(),
        IMAGES + 1j,
        IMAGES.astype(object),
        IMAGES.astype(str),
        IMAGES[:0],
        IMAGES[0, 0, 0],
    ),
    *(
        IMAGES * np.nan,
        IMAGES * np.inf,
        IMAGES + 2,
        IMAGES - 2,
        [[1.0], [1.0, 2.0]],
        IMAGES[..., :0],
        IMAGES[:, :3],
        Hostile(),
    ),
)
NOT_LABELS = (
    *(
        None,
        [],
        "labels",
        3,
        [0],
        [0, 1, 2],
        [0.0, 1.0],
        ["0", "1"],
        [0, 3],
        [-1, 0],
        [[0, 1]],
        [None, 1],
        [True, False],
    ),
    *([0, 1j], np.array([0, 1], object), np.array([0, 2**63], np.uint64), Hostile()),
)
NOT_MODELS = (
    *(None, 3, "cnn6", [], (), (apply,), (apply, PARAMS, 3), (apply, {}), (apply, {"w": "text"}), (apply, {"w": None})),
    *(
        (apply, {"w": PARAMS["w"].astype(int)}),
        (apply, {"w": PARAMS["w"] + 1j}),
        (apply, [object()]),
        (None, PARAMS),
        Hostile(),
    ),
    *((apply, {1: PARAMS["w"], "1": PARAMS["w"]}), np.ones(3), jax.nn.relu, dict, b"x"),
)
NOT_SHAPES = (
    None,
    3,
    "4,4,1",
    (),
    (4, 4, 0),
    (4, -4, 1),
    (4.0, 4, 1),
    (4, True, 1),
    ("4", "4", "1"),
    {4: 4},
    (10**30, 1, 1),
    1j,
)
NOT_PATHS = (None, 3, [], b"\0", "a\0b", "missing.npz", ".", "/dev/null", object())
NOT_DEFENSES = (
    3,
    True,
    [],
    {},
    object(),
    "x",
    "gaussian:x",
    "gaussian:nan",
    "top_k:2",
    b"clip",
    "clip:1,2",
    optax.adam,
    1j,
)
NOT_GRADIENTS = (
    *(None, [], "text", 3, {}, {"w": GRADIENTS["w"]}, {**GRADIENTS, "x": GRADIENTS["w"]}, list(GRADIENTS.values())),
    *({**GRADIENTS, "w": GRADIENTS["w"].tolist()}, {**GRADIENTS, "w": None}, {**GRADIENTS, "w": "text"}),
    *({**GRADIENTS, "w": GRADIENTS["w"] + 1j}, {**GRADIENTS, "w": GRADIENTS["w"].astype(object)}),
    *({**GRADIENTS, "w": GRADIENTS["w"].astype(int)}, {**GRADIENTS, "w": GRADIENTS["w"] * np.nan}),
    *({**GRADIENTS, "w": GRADIENTS["w"][:1]}, {**GRADIENTS, "w": GRADIENTS["w"][0]}, {**GRADIENTS, "w": np.float64(1)}),
    *(
        {**GRADIENTS, "w": GRADIENTS["w"][:, :3]},
        {p: 0 * g for p, g in GRADIENTS.items()},
        {p: g[:0] for p, g in GRADIENTS.items()},
    ),
)
