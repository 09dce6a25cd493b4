"""`audit`: how much a model leaks of the images it is trained on, why, and what would help."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from leakjax.arguments import instance, listener, shown
from leakjax.errors import InputError, UnreadableModelError
from leakjax.leakage.assemble import Examined, Structure, assemble
from leakjax.leakage.inputs import batch_of, check_options, check_runs, check_seed, check_shape, check_size
from leakjax.leakage.measure import in_precision, measure, measure_without
from leakjax.leakage.privacy import DPSGD
from leakjax.leakage.request import Asked, Measured, Tell
from leakjax.leakage.sent_buffers import (
    NOT_COUNTED,
    SentBuffers,
    needed_buffers,
    read_buffers,
    solved_buffers,
    with_told,
)
from leakjax.leakage.structural.index import smallest_withheld
from leakjax.models.calls import Path
from leakjax.models.losses import LossSpec, on_outputs
from leakjax.models.reader import Model, output_shape, read_model
from leakjax.report.audit.audit import Audit
from leakjax.report.audit.record import Withheld
from leakjax.runtime.precision import compute_in
from leakjax.segments.chain import Segment, read_chain
from leakjax.segments.geometry import Geometry
from leakjax.segments.normalizations import with_normalizations
from leakjax.segments.stacked import unstacked
from leakjax.segments.tail import behind, without_tail
from leakjax.segments.training_mode import listed, training_remarks

SIGMAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def audit(
    model: Any,
    input_shape: Sequence[int],
    *,
    images: Float[np.ndarray, "B ..."] | None = None,
    labels: Shaped[np.ndarray, "B ..."] | str | None = None,
    loss: LossSpec = "softmax_cross_entropy",
    input_range: tuple[float, float] = (0.0, 1.0),
    noise: Sequence[float] = SIGMAS,
    dp_sgd: DPSGD | None = None,
    shapes_only: bool = False,
    seed: int = 0,
    name: str = "model",
    progress: Tell | None = None,
    call: Mapping[str, Any] | None = None,
    rngs: Mapping[str, int] | int | None = None,
    output: Path | None = None,
    layout: str = "NHWC",
    train: bool | None = None,
    buffers: bool = False,
) -> Audit:
    """Audit a model, its layers and its gradient at a batch of images.

    Arguments:
    - `model`: anything that `read_model` takes; `input_shape` (H, W, C), of one example;
    - `call`, `rngs`, `output`, `layout`, `train`: how the model is called and which output counts; see `read_model`;
      of a model in training mode the gradient is audited;
    - `buffers`: whether the new running statistics that such a model leaves are sent beside the gradient, and audited
      with it, as rows of the Jacobian and as statistics that are known (`observe` sends them by default); under `noise`
      they have as much of it as every entry of the gradient;
    - `images` (B, H, W, C) in `input_range` with `labels` (B, ...), classes or whatever the `loss` compares outputs
      with (see `observe`): the B examples of one gradient; without them a random smooth image drawn with
      `seed`; "input" for labels says that an autoencoder's images are compared with themselves;
    - `noise`: standard deviations of Gaussian noise in every gradient entry, for the bounds;
    - `dp_sgd`: a DP-SGD whose clipping and noise are to be bounded too, with its epsilon (needs `leakjax[dp]`);
    - `shapes_only`: count on shapes alone, without weights or images;
    - `name`: what the report calls the model; `progress` hears of every stage.

    A model that cannot be read layer by layer is audited as one map. Raises `InputError` for bad arguments.
    """
    listener("progress", progress)
    if dp_sgd is not None:
        instance("dp_sgd", dp_sgd, DPSGD, "a DPSGD of clip and noise_multipliers")
    read = read_model(model, call=call, rngs=rngs, output=output, layout=layout, train=train)
    shape = check_shape(input_shape)
    limits, sigmas = check_options(loss, input_range, noise)
    if shapes_only and dp_sgd is not None:
        raise InputError("dp_sgd needs a gradient to clip; leave out shapes_only")
    if not isinstance(buffers, bool):
        raise InputError(f"buffers must be True or False, got {shown(buffers)}")
    if buffers and dp_sgd is not None:
        raise InputError("dp_sgd bounds gradients, and clips no running statistics; leave out buffers (--buffers)")
    asked = Asked(
        loss=loss,
        limits=limits,
        noise=sigmas,
        dp_sgd=dp_sgd,
        epsilons=_epsilons(dp_sgd),
        seed=check_seed(seed),
        tell=progress or (lambda stage: None),
        asked=noise is not SIGMAS,
    )
    dtype = jnp.dtype("float32" if shapes_only else "float64")
    with compute_in(dtype.name):
        asked.tell("reading the model")
        check_runs(read, shape)
        exact, remarks = in_precision(read, shape, dtype)
        batch = None if shapes_only else batch_of(exact, shape, images, labels, limits, asked.seed, loss)
        front, tail = without_tail(exact, shape, dtype, 1 if batch is None else len(batch[0]))
        front, _ = unstacked(front, shape, dtype)
        sent = read_buffers(exact, shape, dtype)
        counted = needed_buffers(sent) if buffers else None
        if buffers and front.params.keys() != exact.params.keys():
            raise InputError("buffers: this model's layers are rows of stacked weights; leave buffers out (--buffers)")
        if counted is not None and batch is not None:
            counted = solved_buffers(counted, exact, np.asarray(batch[0]), limits)
        structure = _structure(front, shape, dtype, remarks, counted, shapes_only=shapes_only)
        if sent is not None and counted is None:
            structure.remarks.append(NOT_COUNTED.format(names=listed(sent.paths)))
        asked = asked._replace(buffers=counted)
        taken = loss if tail is None else behind(on_outputs(loss, output_shape(exact, shape)), tail)
        examined = _examine(structure, batch, asked._replace(loss=taken))
        bounded = not shapes_only and (dp_sgd is not None or (asked.asked and bool(sigmas)))
        data = _data(images, examined.examples, asked.seed, shapes_only)
        return assemble(structure, examined, asked, name, data, bounded=bounded)


def _epsilons(dp_sgd: DPSGD | None) -> Sequence[float]:
    """The epsilon of every noise multiplier; settings that cannot be are refused."""
    if dp_sgd is None:
        return []
    epsilons = dp_sgd.epsilons()
    for multiplier in dp_sgd.noise_multipliers:
        check_size("clip times noise_multiplier", dp_sgd.sigma(multiplier, 1))
    return epsilons


def _structure(
    read: Model,
    shape: tuple[int, ...],
    dtype: Any,
    remarks: list[str],
    counted: SentBuffers | None,
    *,
    shapes_only: bool,
) -> Structure:
    segments, unreadable = _segments(read, shape, dtype, checked=not shapes_only)
    segments, others = with_normalizations(read, shape, dtype, segments), 0
    remarks += unreadable
    remarks += () if shapes_only else training_remarks(read, shape, dtype, normalizes=counted is not None)
    if counted is not None:
        segments, others = with_told(segments, counted)
    names = [s.name for s in segments] or ["network"]
    geometries = [s.geometry for s in segments] or [_whole(read, shape)]
    return Structure(
        model=read,
        shape=shape,
        segments=segments,
        names=names,
        geometries=geometries,
        remarks=remarks,
        told=0 if counted is None else counted.numbers,
        others=others,
    )


def _examine(structure: Structure, batch: tuple[Any, Any] | None, asked: Asked) -> Examined:
    """Measure a gradient of `batch`; without one, count on shapes alone."""
    chosen = smallest_withheld(structure.geometries, structure.others)
    withheld = [] if chosen is None else [Withheld(tuple(structure.names[i] for i in chosen[0]), chosen[1])]
    if batch is None:
        return Examined(Measured(), 1, tuple(withheld))
    segments, (x, y) = structure.segments, batch
    found = measure(structure.model, segments, x, y, asked)
    if chosen is not None and segments and found.jacobian is not None:
        paths = {path for i in chosen[0] for path in segments[i].paths}
        rank, remaining = measure_without(found.jacobian, asked, paths)
        withheld = [dataclasses.replace(withheld[0], measured_dimensions=rank, leakage_map=remaining)]
    pixels = (np.asarray(x, float) - asked.limits[0]) / asked.scale
    return Examined(found, len(x), tuple(withheld), pixels)


def _data(images: Any, examples: int, seed: int, shapes_only: bool) -> str:
    """What the audit looked at, in words."""
    if shapes_only:
        return "none: shapes only"
    if images is None:
        return f"a random image drawn with seed {seed}"
    return f"{examples} image{'' if examples == 1 else 's'} given by the caller"


def _segments(
    model: Model, shape: tuple[int, ...], dtype: Any, *, checked: bool
) -> tuple[tuple[Segment, ...], list[str]]:
    """The model's layers at one example; none, and the reason, where it cannot be read."""
    try:
        return read_chain(model, shape, dtype, checked=checked).segments, []
    except UnreadableModelError as error:
        return (), [f"not readable layer by layer, audited as one map: {error}"]
    except InputError:
        raise
    except (TypeError, ValueError, NotImplementedError, KeyError) as error:  # integers between layers, for one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (), [f"not readable layer by layer, audited as one map: {reason}"]


def _whole(model: Model, shape: tuple[int, ...]) -> Geometry:
    outputs = math.prod(output_shape(model, shape))
    return Geometry(math.prod(shape), outputs, sum(int(p.size) for p in model.params.values()), simple=False)
