"""The peers' way: each layer's system as a dense matrix, padding rows included, solved by `numpy.linalg.lstsq`.

Written from the equations (R-GAP, arXiv 2010.07733): with the padded border as unknowns, rows W (circulant weights),
K (gradient constraints) and P (padding entries are 0). The matrices are assembled by index arithmetic, far faster than
the peers' nested loops: only the solve is compared.
"""

import time
from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
    """One convolution: NHWC input (1, H, W, C), HWIO kernel, stride, symmetric padding, and what is known of it."""

    kernel: np.ndarray
    stride: int
    padding: int
    input_shape: tuple[int, int, int]
    z: np.ndarray
    dz: np.ndarray
    gradient: np.ndarray


def dense_system(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """(matrix, right-hand side) on the padded input, rows W, K, P."""
    height, width, channels = layer.input_shape
    k, p, stride = layer.kernel.shape[0], layer.padding, layer.stride
    padded = (height + 2 * p, width + 2 * p, channels)
    rows, columns, filters = layer.z.shape
    index = np.arange(np.prod(padded)).reshape(padded)
    r, c = np.meshgrid(np.arange(rows) * stride, np.arange(columns) * stride, indexing="ij")
    forward = np.zeros((rows * columns, filters, index.size))
    gradient = np.zeros((k, k, channels, filters, index.size))
    flat_dz = layer.dz.reshape(-1, filters)
    for i in range(k):
        for j in range(k):
            for channel in range(channels):
                read = index[r + i, c + j, channel].ravel()
                forward[np.arange(read.size), :, read] += layer.kernel[i, j, channel]
                gradient[i, j, channel][:, read] = flat_dz.T
    border = np.ones(padded, bool)
    border[p : p + height, p : p + width] = False
    padding = np.eye(index.size)[border.ravel()]
    matrix = np.concatenate([gradient.reshape(-1, index.size), forward.reshape(-1, index.size), padding])
    rhs = np.concatenate([layer.gradient.ravel(), layer.z.ravel(), np.zeros(len(padding))])
    return matrix, rhs


def solve(layer: Layer) -> tuple[np.ndarray, float]:
    """(input (H, W, C), CPU seconds of `numpy.linalg.lstsq` alone)."""
    matrix, rhs = dense_system(layer)
    start = time.process_time()
    x = np.linalg.lstsq(matrix, rhs, rcond=None)[0]
    seconds = time.process_time() - start
    height, width, channels = layer.input_shape
    p = layer.padding
    whole = x.reshape(height + 2 * p, width + 2 * p, channels)
    return whole[p : p + height, p : p + width], seconds
