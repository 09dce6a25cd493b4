"""Which directions of an image its gradient does not determine: a basis, on request."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from leakjax.arguments import MOST, instance, whole
from leakjax.attacks.certificates.multiples import MULTIPLES
from leakjax.client.defenses import CUSTOM, build_defense
from leakjax.client.observation import Observation
from leakjax.errors import InputError
from leakjax.reconstruction import Reconstruction
from leakjax.runtime.arrays import to_device
from leakjax.runtime.memory import fits_in_memory
from leakjax.runtime.precision import compute_in
from leakjax.segments.tracing.network import Gradient, Network, client_update, example_gradients, read_network
from leakjax.solvers.jacobian import RowSpace, in_one_shape, jacobian_product, row_space

LARGEST = 6000


def _space(gradient: Gradient, point: tuple[Any, ...], size: int, unknowns: int) -> RowSpace:
    product = jacobian_product(gradient)
    return row_space(lambda v: in_one_shape(lambda v, count: product(*point, to_device(v), count), v), size, unknowns)


def undetermined_directions(
    observation: Observation, reconstruction: Reconstruction, index: int = 0
) -> Float[np.ndarray, "k B H W C"]:
    """Orthonormal directions d with (dg/dx) d = 0 at one gradient's reconstruction, in the model's input range.

    Arguments: `index`, which gradient; with B examples each, all B images move together. Along every direction, and
    their combinations, the image can change without a trace in the gradient. Their number is `unknowns -
    leaked_dimensions` of the certificate: all directions where the images that match form a curved set, of which no
    entry is known far from the answer.

    Raises `InputError` for an unknown index, or for more unknowns than a dense Jacobian can hold.
    """
    instance("observation", observation, Observation, "from observe or read_capture")
    instance("reconstruction", reconstruction, Reconstruction, "from invert")
    if not 0 <= whole("index", index, -MOST) < observation.victims:
        raise InputError(f"index must be in 0..{observation.victims - 1}, got {index}")
    expected = (observation.victims * observation.examples, *observation.input_shape)
    if reconstruction.images.shape != expected:
        raise InputError(f"reconstruction has images {reconstruction.images.shape}, the observation is of {expected}")
    rows = slice(index * observation.examples, (index + 1) * observation.examples)
    x, labels = reconstruction.images[rows], reconstruction.labels[rows]
    certificate, target = reconstruction.certificates[rows.start], reconstruction.targets[rows.start]
    if certificate.status == "ambiguous" and certificate.leaked_dimensions == 0:
        return np.eye(x.size).reshape(-1, *x.shape)
    labels = labels if target is None else target[None]
    if labels.min() < 0:
        raise InputError(f"gradient {index} has no reconstruction: there is no point at which to ask for directions")
    if x.size > LARGEST or not fits_in_memory(32 * x.size**2):
        raise InputError(f"a basis of {x.size} unknowns is too large; at most {LARGEST} fit")
    with compute_in("float64"):
        model = observation.model.astype("float64")
        network = read_network(model, observation.input_shape, observation.examples, jnp.float64)
        steps = observation.local_steps, observation.learning_rate
        gradient = client_update(network.logits, observation.loss, tuple(observation.gradients), *steps)
        point = dict(model.variables), to_device(x, float), to_device(labels)
        size = sum(int(np.prod(p.shape)) for p in model.params.values())
        space = _space(gradient, point, size, x.size)
        sent = _told_of(observation, network, gradient)
        if sent is not None and certificate.leaked_dimensions not in (None, space.rank):  # an attack that was told
            space = _space(sent, point, size, x.size)
    basis = space.vectors[:, : x.size - space.rank].T
    if certificate.symmetry == MULTIPLES and space.rank == x.size:
        basis = x.reshape(1, -1) / np.linalg.norm(x)
    return basis.reshape(-1, *x.shape)


def _told_of(observation: Observation, network: Network, gradient: Gradient) -> Gradient | None:
    """What is sent of the gradient by a defense that makes another map of it, without noise; None elsewhere."""
    if observation.defense in (None, CUSTOM):
        return None
    setting = build_defense(str(observation.defense))
    if setting.server.predict is None or setting.server.lossy:
        return None
    each = example_gradients(network.logits, observation.loss, tuple(observation.gradients))
    return setting.server.predict(gradient, each, setting.values)
