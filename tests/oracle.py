"""R-GAP's two matrices, built by loops over indices in plain numpy: nothing here knows of JAX or of leakjax.

For an input x of shape (H, W, C), flattened in C order:

    z = W x      the circulant weight matrix (without the bias)
    g = K x      the gradient matrix: dL/dkernel = K x for dz = dL/dz given

Kernels are (height, width, C / groups, filters), maps are (height, width, channels).
"""

import itertools

import numpy as np


def same_padding(length, window, stride, dilation=1):
    """(low, high) of SAME padding on one axis: the output has ceil(length / stride) entries, the odd zero goes high."""
    side = -(-length // stride)
    extent = (window - 1) * dilation + 1
    total = max((side - 1) * stride + extent - length, 0)
    return total // 2, total - total // 2


def output_side(length, window, stride, padding, dilation):
    """How many positions a window takes on one axis."""
    extent = (window - 1) * dilation + 1
    return (length + padding[0] + padding[1] - extent) // stride + 1


def conv_matrices(kernel, input_shape, dz, *, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """(W, K) of a convolution; `dz` has the shape of its output, (H', W', filters)."""
    height, width, channels = input_shape
    kh, kw, depth, filters = kernel.shape
    assert depth * groups == channels
    assert filters % groups == 0
    oh = output_side(height, kh, stride[0], padding[0], dilation[0])
    ow = output_side(width, kw, stride[1], padding[1], dilation[1])
    assert dz.shape == (oh, ow, filters)
    forward = np.zeros((oh, ow, filters, height, width, channels))
    gradient = np.zeros((kh, kw, depth, filters, height, width, channels))
    for i, j, a, b in itertools.product(range(oh), range(ow), range(kh), range(kw)):
        row = i * stride[0] + a * dilation[0] - padding[0][0]
        column = j * stride[1] + b * dilation[1] - padding[1][0]
        if not (0 <= row < height and 0 <= column < width):
            continue
        for o, c in itertools.product(range(filters), range(depth)):
            channel = (o // (filters // groups)) * depth + c
            forward[i, j, o, row, column, channel] += kernel[a, b, c, o]
            gradient[a, b, c, o, row, column, channel] += dz[i, j, o]
    unknowns = height * width * channels
    return forward.reshape(-1, unknowns), gradient.reshape(-1, unknowns)


def dense_matrices(kernel, dz):
    """(W, K) of a dense layer z_o = sum_i kernel[i, o] x_i."""
    inputs, outputs = kernel.shape
    forward = np.zeros((outputs, inputs))
    gradient = np.zeros((inputs, outputs, inputs))
    for i, o in itertools.product(range(inputs), range(outputs)):
        forward[o, i] = kernel[i, o]
        gradient[i, o, i] = dz[o]
    return forward, gradient.reshape(-1, inputs)


def stacked_rank(forward, gradient):
    """Rank of [W; K], each block scaled to norm 1 first."""
    return int(np.linalg.matrix_rank(np.concatenate([m / np.linalg.norm(m) for m in (forward, gradient)])))
