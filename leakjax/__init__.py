"""leakjax: what a gradient gives away about the image that produced it."""

from leakjax.directions import undetermined_directions
from leakjax.errors import InputError, UnreadableModelError
from leakjax.inversion import invert
from leakjax.leakage.audit import audit
from leakjax.leakage.result import Audit
from leakjax.model import Model, read_model
from leakjax.observation import Observation, observe
from leakjax.reconstruction import Certificate, Reconstruction

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "Certificate",
    "InputError",
    "Model",
    "Observation",
    "Reconstruction",
    "UnreadableModelError",
    "audit",
    "invert",
    "observe",
    "read_model",
    "undetermined_directions",
]
