"""The published binary formats of CIFAR, MNIST and SVHN, read to arrays. No format here can carry code."""

import io
import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from leakjax.errors import InputError


class Records(NamedTuple):
    """The examples of a split: `images` (N, H, W, C) in 0..255, and for each kind of label an array (N,)."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: dict[str, Int64[np.ndarray, " N"]]


def cifar(files: dict[str, bytes], label_names: tuple[str, ...]) -> Records:
    """CIFAR's binary version: a byte for each label, then 32x32 red, green and blue bytes.

    Raises `InputError` where a file is no whole number of such records.
    """
    width = len(label_names) + 3072
    for name, content in files.items():
        if not content or len(content) % width:
            raise InputError(
                f"--from: {name} has {len(content)} bytes, no whole number of {width}-byte records; download it again"
            )
    rows = np.frombuffer(b"".join(files.values()), np.uint8).reshape(-1, width)
    images = rows[:, len(label_names) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Records(images, {name: rows[:, k].astype(np.int64) for k, name in enumerate(label_names)})


def idx(files: dict[str, bytes], label_names: tuple[str, ...]) -> Records:
    """MNIST's two idx files: images (N, H, W) and labels (N,), unsigned bytes behind a big-endian header.

    Raises `InputError` where a header is not that of such a file, or counts other bytes than follow.
    """
    (images_name, images), (labels_name, labels) = files.items()
    pictures, answers = _idx(images_name, images, 3), _idx(labels_name, labels, 1)
    if len(pictures) != len(answers):
        raise InputError(f"--from: {images_name} holds {len(pictures)} images, {labels_name} {len(answers)} labels")
    return Records(pictures[..., None], {label_names[0]: answers.astype(np.int64)})


def mat(files: dict[str, bytes], label_names: tuple[str, ...]) -> Records:
    """SVHN's MATLAB file: X (32, 32, 3, N) and y (N, 1), in which 10 stands for the digit 0.

    Raises `InputError` where it is no such file.
    """
    from scipy.io import loadmat  # reads numbers and text; an object of MATLAB's stays raw bytes

    ((name, content),) = files.items()
    try:
        arrays = loadmat(io.BytesIO(content), variable_names=["X", "y"])
        x, y = arrays["X"], arrays["y"].reshape(-1)
    except Exception as error:  # scipy raises a dozen kinds on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--from: {name} is no MATLAB file with X and y, or damaged ({reason})") from error
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != len(y) or y.dtype.kind not in "ui":
        raise InputError(f"--from: {name} has X of {x.dtype} {x.shape} and y of {y.dtype} ({len(y)},), not SVHN's")
    if y.size and (y.min() < 1 or y.max() > 10):
        raise InputError(f"--from: {name} has labels {y.min()}..{y.max()}; SVHN's are 1..10")
    return Records(np.moveaxis(x, 3, 0), {label_names[0]: y.astype(np.int64) % 10})


def _idx(name: str, content: bytes, axes: int) -> np.ndarray:
    header = 4 + 4 * axes
    if len(content) < header or content[:4] != bytes([0, 0, 8, axes]):
        raise InputError(f"--from: {name} is no idx file of bytes with {axes} axes")
    shape = struct.unpack(f">{axes}I", content[4:header])
    expected = header + int(np.prod([int(n) for n in shape], dtype=object))
    if len(content) != expected:
        raise InputError(f"--from: {name} has {len(content)} bytes, its header says {expected}; download it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
