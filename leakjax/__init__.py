"""leakjax: what a gradient gives away about the image that produced it."""

from leakjax.directions import undetermined_directions
from leakjax.errors import InputError, UnreadableModelError
from leakjax.inversion import invert
from leakjax.model import Model, read_model
from leakjax.observation import Observation, observe
from leakjax.reconstruction import Certificate, Reconstruction

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "InputError",
    "Model",
    "Observation",
    "Reconstruction",
    "UnreadableModelError",
    "invert",
    "observe",
    "read_model",
    "undetermined_directions",
]
