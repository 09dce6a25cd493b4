"""What a command works on: the model, the data and the gradients that its options name."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leakjax.arguments import LARGEST
from leakjax.captures.capture import read_capture
from leakjax.captures.weights import read_weights
from leakjax.cli.calling import calling
from leakjax.cli.options import ClientOptions, DataOptions, ModelOptions, NormalizedModelOptions, integers
from leakjax.client.observation import Observation, observe
from leakjax.datasets import Images, load_dataset, load_npz, luminance_maps, to_range, train_and_test
from leakjax.errors import InputError, unknown_name
from leakjax.interop.torch import from_module, read_torch_capture
from leakjax.models import MODELS, build_model, load_factory
from leakjax.models.losses import LOSSES, UNKNOWN, LossSpec, labels_of, read_loss
from leakjax.models.normalization import Limits, Numbers, channel_limits, check_normalization, hull, spread
from leakjax.models.reader import Model, output_count, output_shape, read_model
from leakjax.models.zoo import load_function
from leakjax.runtime.memory import fits_on_host

_OPTIONS = ("--input-mean", "--input-std")


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A model with the input shape (None where only a capture can say), input range and loss that go with it.

    `own_loss`: the model's, which a client takes where the server does not know its `loss`. `train`: whether the model
    was set to training mode; `maps`: whether it is one of the zoo that gives every pixel a class.
    """

    model: Model
    activation: str | None
    input_shape: tuple[int, int, int] | None
    input_range: tuple[float, float]
    loss: LossSpec
    input_mean: Numbers | None = None
    input_std: Numbers | None = None
    own_loss: str = "softmax_cross_entropy"
    train: bool = False
    maps: bool = False

    @classmethod
    def load(cls, options: ModelOptions) -> "Setup":
        """Build the model of the zoo or the user's `package.module:factory`, of options as typed.

        Weights of a file, as `captures.weights.write_weights` writes them, replace those of the initialization.
        """
        typed = (options.input_mean, options.input_std) if isinstance(options, NormalizedModelOptions) else (None, None)
        mean, std = _normalization(*typed)
        if mean is not None and options.input_range is not None:
            raise InputError("--input-mean and --input-std say what a pixel can be; leave out --input-range")
        setup = cls._initialized(options)
        if mean is not None:
            if setup.input_shape is not None:
                channels = setup.input_shape[-1]
                mean, std = spread(mean, channels, _OPTIONS), spread(std, channels, _OPTIONS)
            setup = dataclasses.replace(setup, input_range=hull(mean, std), input_mean=mean, input_std=std)
        if options.weights is None:
            return setup
        return dataclasses.replace(setup, model=read_weights(options.weights, setup.model))

    @classmethod
    def _initialized(cls, options: ModelOptions) -> "Setup":
        name, loss, seed, activation = options.name, options.loss, options.seed, options.activation
        loss = None if loss is None else _loss(loss)
        if not 0 <= seed < 2**32:
            raise InputError(f"--seed: expected 0..{2**32 - 1}, got {seed}")
        shape = None if options.input_shape is None else _shape(options.input_shape)
        limits = None if options.input_range is None else _limits(options.input_range)
        if ":" in name or options.torch is not None:
            if options.init is not None:
                raise InputError("--init goes with the models of the zoo; your factory initializes its own")
            read = _own_model(options)
            return cls(
                model=read,
                activation=activation,
                input_shape=shape,
                input_range=limits or (0.0, 1.0),
                loss=loss or "softmax_cross_entropy",
                train=bool(options.train),
            )
        if name not in MODELS:
            raise unknown_name("model", name, MODELS)
        for option in ("call", "rngs", "output"):
            if getattr(options, option) is not None:
                raise InputError(f"--{option} goes with a model of your own; those of the zoo need none")
        if options.train is not None:
            raise InputError("--train, --eval: these go with a model of your own; those of the zoo have no modes")
        if options.layout != "NHWC":
            raise InputError("--layout goes with a model of your own; those of the zoo take NHWC")
        spec = MODELS[name]
        if shape not in (None, spec.input_shape) and not spec.maps:
            raise InputError(f"--input-shape: model {name!r} takes {','.join(map(str, spec.input_shape))}")
        module = build_model(name, seed=seed, activation=activation, init=options.init)
        return cls(
            model=read_model(module),
            activation=activation or spec.activation,
            input_shape=shape or spec.input_shape,
            input_range=limits or spec.input_range,
            loss=loss or spec.loss,
            own_loss=spec.loss,
            maps=spec.maps,
        )

    @property
    def limits(self) -> Limits:
        """(low, high) of a pixel: two numbers, or (C,) each where channels differ."""
        if self.input_mean is None or self.input_std is None:
            return self.input_range
        return channel_limits(self.input_mean, self.input_std)

    def observe(
        self, data: DataOptions, client: ClientOptions, dtype: str, seed: int = 0
    ) -> tuple[Observation, np.ndarray]:
        """The gradients that clients would send, and the images on a [0, 1] scale for the report alone."""
        pictures = self._pictures(data.dataset, integers("--index", data.index), data.images)
        inputs = to_range(pictures.images, self.limits)
        observation = observe(
            self.model,
            (inputs, self._targets(data.target, pictures, inputs)),
            loss=self.own_loss if self.loss == UNKNOWN else self.loss,
            input_range=self.input_range if self.input_mean is None else (0.0, 1.0),
            input_mean=self.input_mean,
            input_std=self.input_std,
            batch_size=data.batch_size,
            dtype=dtype,
            defense=client.defense,
            seed=seed,
            local_steps=client.local_steps,
            learning_rate=client.learning_rate,
            weight_decay=client.weight_decay or 0.0,
            buffers=self._sends_buffers(client),
        )
        told = dataclasses.replace(observation, loss=UNKNOWN) if self.loss == UNKNOWN else observation
        return told, pictures.images / 255.0

    def _sends_buffers(self, client: ClientOptions) -> bool | None:
        """Whether clients send their new running statistics; None where they have none to send."""
        if client.no_buffers and not self.train:
            raise InputError("--no-buffers goes with --train: without it no running statistics are sent")
        one_step = self.model.step is not None and client.local_steps == 1
        return not client.no_buffers if self.train and one_step else None

    def batch(
        self, dataset: str | None, index: Sequence[int], images: Path | None, target: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, H, W, C) in the model's input range and their targets, of a file or a data set."""
        data = self._pictures(dataset or "samples", index, images)
        inputs = to_range(data.images, self.limits)
        return inputs, self._targets(target, data, inputs)

    def maps_of(self, data: DataOptions) -> np.ndarray:
        """The label maps of the images, for an attack that is given them."""
        if not (data.target == "map" or self.maps):
            raise InputError("--labels map goes with --target map")
        pictures = self._pictures(data.dataset, integers("--index", data.index), data.images)
        return self._targets("map", pictures, np.empty(0))

    def _targets(self, kind: str, pictures: Images, inputs: np.ndarray) -> np.ndarray:
        """What the loss compares outputs with: labels, the inputs themselves, or maps of the pictures' luminance."""
        if kind == "input":
            return inputs
        if kind != "map" and not self.maps:
            return pictures.labels
        assert self.input_shape is not None
        outputs = output_shape(self.model, self.input_shape)
        if len(outputs) != 3 or outputs[:2] != self.input_shape[:2]:
            raise InputError(
                f"--target map: the model must return logits at every pixel, {self.input_shape[:2]} and the classes, "
                f"got outputs of shape {outputs}"
            )
        return luminance_maps(pictures.images, labels_of(outputs[-1]))

    def train_and_test(self, dataset: str, limit: int | None) -> tuple[Images, Images]:
        """Pictures to train on and to test by, at most `limit` of each."""
        if self.input_shape is None:
            raise InputError("--input-shape H,W,C is needed with a model of your own")
        if self.maps:
            raise InputError("--model: this one is compared with label maps, and data sets have one label an image")
        data, test = train_and_test(dataset, self.input_shape, limit)
        return self._relabeled(data), self._relabeled(test)

    def _pictures(self, dataset: str, index: Sequence[int], images: Path | None) -> Images:
        """Pictures that the model takes, with labels that it has logits for."""
        if self.input_shape is None:
            raise InputError("--input-shape H,W,C is needed with a model of your own")
        if images is not None:
            data = load_npz(images, shape=(None, *self.input_shape))
            strange = [i for i in index if not 0 <= i < len(data.images)]
            if strange:
                raise InputError(f"--index: {images} holds {len(data.images)} images, got {strange[0]}")
            data = type(data)(data.images[list(index)], data.labels[list(index)])
        else:
            data = load_dataset(dataset, index, self.input_shape)
        if tuple(data.images.shape[1:]) != self.input_shape:
            raise InputError(
                f"images have shape {tuple(data.images.shape[1:])}, the model takes {self.input_shape}; resize them"
            )
        return self._relabeled(data)

    def _relabeled(self, data: Images) -> Images:
        """A one-logit model's label is the class label modulo 2."""
        assert self.input_shape is not None
        one = output_count(self.model, self.input_shape) == 1
        return Images(data.images, data.labels % 2) if one else data

    def from_capture(
        self, capture: Path | None, torch_capture: Path | None, truth: Path | None
    ) -> tuple[Observation, np.ndarray | None]:
        """The observation in a capture, and the truth beside it where a file is given."""
        given = self.loss if self.loss == UNKNOWN or callable(self.loss) else None
        if capture is not None:
            observation = read_capture(capture, self.model, loss=given)
        else:
            assert torch_capture is not None
            observation = read_torch_capture(torch_capture, self.model, loss=given)
        if len(observation.input_shape) != 3:
            raise InputError(f"the capture's input_shape must be [H, W, C], got {list(observation.input_shape)}")
        if truth is None:
            return observation, None
        expected = (observation.victims * observation.examples, *observation.input_shape)
        return observation, load_npz(truth, "--truth", expected).images / 255.0


def _own_model(options: ModelOptions) -> Model:
    """What the user's factory makes: a model as published, or a PyTorch module."""
    if options.torch is None:
        found = load_factory(options.model, seed=options.seed, activation=options.activation)
        return read_model(found, **calling(options))
    how = {name: value for name, value in calling(options).items() if name in ("call", "output", "train")}
    return from_module(load_factory(options.torch, "--torch", seed=options.seed, activation=None), **how)


def _loss(typed: str) -> LossSpec:
    """A name of the table with its parameters, "unknown", or the user's `package.module:function`."""
    name, colon, _ = typed.partition(":")
    if colon and name not in (*LOSSES, UNKNOWN):
        if "=" in typed or not name:  # parameters of a name that is none, or no module
            raise unknown_name("--loss", name, (*LOSSES, UNKNOWN))
        return load_function(typed, "--loss")[0]
    read_loss(typed)
    return typed


def _shape(text: str) -> tuple[int, int, int]:
    try:
        height, width, channels = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--input-shape: expected H,W,C, got {text!r}") from None
    if min(height, width, channels) < 1:
        raise InputError(f"--input-shape: sizes must be positive, got {text!r}")
    if not fits_on_host(64 * height * width * channels):
        raise InputError(f"--input-shape: an image of {text} does not fit into memory")
    return height, width, channels


def _normalization(mean: str | None, std: str | None) -> tuple[Any, Any]:
    """(mean, std) as typed, "0.485,0.456,0.406", checked."""
    parts = [None if text is None else _numbers(name, text) for name, text in zip(_OPTIONS, (mean, std), strict=True)]
    return check_normalization(parts[0], parts[1], _OPTIONS)


def _numbers(option: str, text: str) -> Numbers:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers separated by commas, got {text!r}") from None


def _limits(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--input-range: expected LOW,HIGH, got {text!r}") from None
    if not (-LARGEST <= low < high <= LARGEST):
        raise InputError(f"--input-range: LOW must be below HIGH, both finite, got {text!r}")
    return low, high
