"""The images of a case: those of `leakjax.datasets`, and the same made smaller or larger."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from leakjax.datasets import Images, load_dataset


def load_pictures(dataset: str, indices: Sequence[int], shape: tuple[int, int, int]) -> Images:
    """The images at `indices`, of `shape`; `NAME@SIDE` is read at SIDE x SIDE and resized."""
    name, _, side = dataset.partition("@")
    if not side:
        return load_dataset(name, indices, shape)
    data = load_dataset(name, indices, (int(side), int(side), shape[2]))
    size = shape[1], shape[0]
    resized = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in data.images]
    return Images(np.stack(resized), data.labels)
