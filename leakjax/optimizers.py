"""Optax transformations by name, for the paths that go by first-order descent."""

from collections.abc import Mapping

import optax

OPTIMIZERS: Mapping[str, optax.GradientTransformation] = {
    "lbfgs": optax.lbfgs(memory_size=20),
    "adam": optax.adam(1e-2),
}
"""Names that stand for a transformation; any other `optax.GradientTransformation` serves as well."""

DEFAULT_OPTIMIZER = "lbfgs"
