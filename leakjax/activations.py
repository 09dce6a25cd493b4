"""The former name of `leakjax.models.activations`, which notebooks import."""

from leakjax.models.activations import Activation, Preimage

__all__ = ["Activation", "Preimage"]
