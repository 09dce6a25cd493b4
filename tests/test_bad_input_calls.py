"""Bad input from Python: `InputError`, one line that names the argument, before anything is computed."""

import dataclasses
import functools

import numpy as np
import optax
import pytest
from bad_values import (
    GRADIENTS,
    IMAGES,
    JUNK,
    LABELS,
    MODEL,
    NOT_COUNTS,
    NOT_DEFENSES,
    NOT_GRADIENTS,
    NOT_IMAGES,
    NOT_LABELS,
    NOT_MODELS,
    NOT_NAMES,
    NOT_NUMBERS,
    NOT_PATHS,
    NOT_RANGES,
    NOT_SEEDS,
    NOT_SHAPES,
    NOT_SIZES,
    OBSERVATION,
    PARAMS,
    RECONSTRUCTION,
    Hostile,
    apply,
)

import leakjax
from leakjax.captures.capture import read_capture, write_capture
from leakjax.captures.weights import read_weights, write_weights
from leakjax.client.defenses import build_defense
from leakjax.client.training.loop import train
from leakjax.datasets import load_dataset, load_npz, load_split
from leakjax.errors import InputError
from leakjax.interop.torch import read_torch_capture
from leakjax.models import build_model
from leakjax.models.activations import parse_activation


def observe(**changed):
    given = {"model": MODEL, "images": IMAGES, "labels": LABELS, **changed}
    model, images, labels = (given.pop(name) for name in ("model", "images", "labels"))
    return leakjax.observe(model, given.pop("batch", (images, labels)), **given)


def observation(**changed):
    return dataclasses.replace(OBSERVATION, **changed)


def inverted(observation=OBSERVATION, **changed):
    return leakjax.invert(observation, **changed)


def audited(**changed):
    given = {"model": MODEL, "input_shape": (4, 4, 1), **changed}
    return leakjax.audit(given.pop("model"), given.pop("input_shape"), **given)


def trained(**changed):
    given = {"model": MODEL, "data": (IMAGES, LABELS), "epochs": 1, "batch_size": 1, **changed}
    return train(given.pop("model"), given.pop("data"), **given)


def directions(**changed):
    given = {"observation": OBSERVATION, "reconstruction": RECONSTRUCTION, "index": 0, **changed}
    return leakjax.undetermined_directions(given["observation"], given["reconstruction"], given["index"])


def loaded(name="digits", indices=(0,), input_shape=(8, 8, 1)):
    return load_dataset(name, indices, input_shape)


def split(name="digits", split="test", input_shape=(8, 8, 1), limit=1):
    return load_split(name, split, input_shape, limit)


ROWS = [
    (call, argument, value)
    for call, arguments in (
        (
            observe,
            {
                "model": NOT_MODELS,
                "images": NOT_IMAGES,
                "labels": NOT_LABELS,
                "batch": (None, 3, (), (IMAGES,), (IMAGES, LABELS, 3), "ab", {"images": IMAGES}, Hostile()),
                "loss": NOT_NAMES,
                "input_range": NOT_RANGES,
                "batch_size": NOT_COUNTS,
                "dtype": (*NOT_NAMES, "float16", np.float32),
                "defense": NOT_DEFENSES,
                "seed": NOT_SEEDS,
                "local_steps": (*NOT_COUNTS, 10**6),
                "weight_decay": (*NOT_SIZES[:1], *NOT_SIZES[2:]),
                "learning_rate": ("0.1", 0, -1, np.nan, np.inf, 10**400, 1e300, True, [], 1j, Hostile()),
            },
        ),
        (functools.partial(observe, input_std=(0.5,)), {"input_mean": (*NOT_NUMBERS, (0.9,), (1e30,))}),
        (functools.partial(observe, input_mean=(0.0,)), {"input_std": (*NOT_NUMBERS, (0,), (-1,), (2.0,), (1e-300,))}),
        (observe, {"input_mean": ((0.0,),), "input_std": ((1.0,),)}),
        (functools.partial(observe, input_mean=(0.0,), input_std=(1.0,)), {"input_range": ((0, 2),)}),
        (
            observation,
            {
                "input_mean": ((0.0,), 3),
                "input_std": ((1.0,), "x"),
                "model": (None, 3, apply, (apply, PARAMS), Hostile()),
                "gradients": NOT_GRADIENTS,
                "loss": NOT_NAMES,
                "input_shape": NOT_SHAPES,
                "input_range": NOT_RANGES,
                "examples": NOT_COUNTS,
                "precision": (None, 3, "x", "int32", "", [], "complex64"),
                "defense": NOT_DEFENSES,
                "local_steps": NOT_COUNTS,
                "weight_decay": (*NOT_SIZES[:1], *NOT_SIZES[2:]),
            },
        ),
        (
            inverted,
            {
                "observation": (None, 3, "capture.npz", {}, GRADIENTS, (MODEL, GRADIENTS), Hostile()),
                "attack": NOT_NAMES,
                "prior": NOT_NAMES,
                "solver": NOT_NAMES,
                "pull_back": NOT_NAMES,
                "optimizer": NOT_NAMES,
                "dtype": (*NOT_NAMES, "float16"),
                "labels": NOT_LABELS[1:],
                "gradient_noise": NOT_SIZES,
                "starts": (*NOT_COUNTS, 10**8),
                "steps": NOT_COUNTS,
                "chunk": NOT_COUNTS,
                "seed": NOT_SEEDS,
                "devices": (3, "cpu", [3], object(), True),
                "progress": (3, "print", [], True),
            },
        ),
        (
            audited,
            {
                "model": NOT_MODELS,
                "input_shape": NOT_SHAPES,
                "images": NOT_IMAGES[1:],
                "loss": NOT_NAMES,
                "input_range": NOT_RANGES,
                "noise": (
                    *(None, 3, "0.1", "abc", [0], [-1], [np.nan], [np.inf], [1e200], [1e-200], [10**400], ["0.1"]),
                    *([None], [1j], [True], {0.1: 1}, [[0.1]], np.ones((2, 2)), *JUNK),
                ),
                "dp_sgd": (3, "1", {}, (1.0, (1.0,))),
                "seed": NOT_SEEDS,
                "progress": (3, "print"),
            },
        ),
        (functools.partial(audited, images=IMAGES), {"labels": NOT_LABELS[1:]}),
        (
            trained,
            {
                "model": NOT_MODELS,
                "data": (
                    None,
                    3,
                    "digits",
                    IMAGES,
                    (IMAGES,),
                    [],
                    {},
                    (IMAGES, LABELS[:1]),
                    (IMAGES + 1j, LABELS),
                    (IMAGES, None),
                ),
                "test": (3, "digits", IMAGES, [], (IMAGES * np.nan, LABELS), (IMAGES, LABELS + 9)),
                "epochs": NOT_COUNTS[3:],
                "batch_size": NOT_COUNTS,
                "clients": NOT_COUNTS,
                "optimizer": ("adam", 3, optax.adam, []),
                "loss": NOT_NAMES,
                "defense": NOT_DEFENSES,
                "keep": (3, "x", [-1], [9], [1.5], [None]),
                "input_range": NOT_RANGES,
                "seed": NOT_SEEDS,
                "dtype": (*NOT_NAMES, "float16"),
                "progress": (3, "print"),
            },
        ),
        (
            directions,
            {
                "observation": (None, 3, GRADIENTS),
                "reconstruction": (None, 3, IMAGES, dataclasses.replace(RECONSTRUCTION, images=IMAGES[:1])),
                "index": (-1, 2, "0", 1.5, None, True),
            },
        ),
        (
            loaded,
            {
                "name": NOT_NAMES,
                "indices": (None, 3, [], ["0"], [-1], [10**9], [1.5], [None]),
                "input_shape": NOT_SHAPES,
            },
        ),
        (split, {"split": ("nothing", "[/]"), "limit": NOT_COUNTS}),
        (build_model, {"name": NOT_NAMES}),
        (
            functools.partial(build_model, "cnn6"),
            {"seed": NOT_SEEDS, "init": NOT_NAMES[1:], "activation": NOT_NAMES[1:6]},
        ),
        (leakjax.read_model, {"model": NOT_MODELS}),
        (build_defense, {"spec": (None, *NOT_DEFENSES)}),
        (parse_activation, {"text": NOT_NAMES}),
        (functools.partial(read_capture, model=MODEL), {"path": NOT_PATHS}),
        (functools.partial(read_torch_capture, model=MODEL), {"path": NOT_PATHS}),
        (functools.partial(read_weights, model=MODEL), {"path": NOT_PATHS}),
        (load_npz, {"path": NOT_PATHS}),
        (functools.partial(read_capture, "x.npz"), {"model": (None, 3, apply)}),
        (functools.partial(write_capture, path="x.npz"), {"observation": (None, 3, MODEL, GRADIENTS)}),
        (functools.partial(write_weights, path="x.npz"), {"model": (None, 3, GRADIENTS)}),
    )
    for argument, values in arguments.items()
    for value in values
]

WORDS = {
    "images": "shape",
    "model": "param",
    "batch": "images",
    "data": "shape",
    "test": "images",
    "name": "",
    "path": "--",
    "spec": "defense",
    "text": "activation",
    "init": "initialization",
    "gradients": "gradient",
    "indices": "index",
    "keep": "epoch",
    "split": "split",
}
"""Another word that may name an argument."""


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    ROWS,
    ids=[f"{getattr(c, 'func', c).__name__}-{a}-{k}" for k, (c, a, _) in enumerate(ROWS)],
)
def test_bad_arguments_are_input_errors(tmp_path, monkeypatch, call, argument, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        call(**{argument: value})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 700
    assert argument in message or WORDS.get(argument, argument) in message or argument.rstrip("s") in message
    assert list(tmp_path.iterdir()) == []
