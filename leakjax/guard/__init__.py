"""The score of a single update inside a training loop, before it is sent."""

from leakjax.guard.clients import loss_of, update_of
from leakjax.guard.online import Guard, GuardState, guard

__all__ = ["Guard", "GuardState", "guard", "loss_of", "update_of"]
