"""Small networks on 6x6 images that several test files share."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {"tanh": jnp.tanh, "leaky_relu": lambda z: jnp.where(z > 0, z, 0.2 * z), "square": jnp.square}


def convolve(x, kernel, stride=1, padding="VALID"):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions)


def one_layer(rng, outputs, *, bias=True, activation="tanh"):
    """A 3x3 convolution with ten filters that determines its image, and a dense head."""
    act = ACTIVATIONS[activation]
    params = {"k": rng.normal(0, 0.4, (3, 3, 1, 10)), "w": rng.normal(0, 0.2, (160, outputs))}
    if bias:
        params |= {"b": rng.normal(0, 0.2, 10), "c": rng.normal(0, 0.1, outputs)}

    def apply(p, x):
        z = convolve(x, p["k"])
        z = act(z + p["b"].reshape(1, 1, 1, -1) if bias else z).reshape(len(x), -1) @ p["w"]
        return z + p["c"][None] if bias else z

    return apply, params


def patches(rng, outputs=5):
    """A 2x2 convolution of stride 2 whose outputs are averaged: patches have no positions."""
    params = {"k": rng.normal(0, 0.3, (2, 2, 1, 8)), "b": rng.normal(0, 0.2, 8), "w": rng.normal(0, 0.5, (8, outputs))}
    params["c"] = rng.normal(0, 0.1, outputs)

    def apply(p, x):
        z = jnp.tanh(convolve(x, p["k"], 2) + p["b"].reshape(1, 1, 1, -1))
        return z.mean((1, 2)) @ p["w"] + p["c"][None]

    return apply, params


def pooled(rng, outputs=5):
    """Two padded convolutions and global average pooling: an image that is black around may stand anywhere."""
    params = {"k": rng.normal(0, 0.4, (3, 3, 1, 6)), "b": rng.normal(0, 0.2, 6), "l": rng.normal(0, 0.2, (3, 3, 6, 6))}
    params |= {"w": rng.normal(0, 0.5, (6, outputs)), "c": rng.normal(0, 0.1, outputs)}

    def apply(p, x):
        x = jnp.tanh(convolve(x, p["k"], 1, "SAME") + p["b"].reshape(1, 1, 1, -1))
        return jnp.tanh(convolve(x, p["l"], 1, "SAME")).mean((1, 2)) @ p["w"] + p["c"][None]

    return apply, params
