"""Networks of the papers as Flax nnx modules, and the user's own."""

from leakjax.models.zoo import MODELS, ModelSpec, build_model, load_factory

__all__ = ["MODELS", "ModelSpec", "build_model", "load_factory"]
