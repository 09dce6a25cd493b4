"""leakjax: what a gradient gives away about the image that produced it."""

import importlib
from typing import TYPE_CHECKING, Any

from leakjax.version import __version__

if TYPE_CHECKING:
    from leakjax.client.observation import Observation, observe
    from leakjax.errors import InputError, UnreadableModelError
    from leakjax.inversion import invert
    from leakjax.leakage.audit import audit
    from leakjax.leakage.directions import undetermined_directions
    from leakjax.models.reader import Model, read_model
    from leakjax.planning import plan
    from leakjax.reconstruction import Certificate, Plan, Reconstruction, TokenReconstruction
    from leakjax.report.audit.audit import Audit
    from leakjax.runtime.programs import clear_caches
    from leakjax.sequences import recover_tokens

__all__ = [
    "Audit",
    "Certificate",
    "InputError",
    "Model",
    "Observation",
    "Plan",
    "Reconstruction",
    "TokenReconstruction",
    "UnreadableModelError",
    "__version__",
    "audit",
    "clear_caches",
    "invert",
    "observe",
    "plan",
    "read_model",
    "recover_tokens",
    "undetermined_directions",
]

_HOMES = {
    "Audit": "report.audit.audit",
    "Certificate": "reconstruction",
    "InputError": "errors",
    "Model": "models.reader",
    "Observation": "client.observation",
    "Plan": "reconstruction",
    "Reconstruction": "reconstruction",
    "TokenReconstruction": "reconstruction",
    "UnreadableModelError": "errors",
    "audit": "leakage.audit",
    "clear_caches": "runtime.programs",
    "invert": "inversion",
    "observe": "client.observation",
    "plan": "planning",
    "read_model": "models.reader",
    "recover_tokens": "sequences",
    "undetermined_directions": "leakage.directions",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: `leakjax --help` need not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'leakjax' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"leakjax.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
