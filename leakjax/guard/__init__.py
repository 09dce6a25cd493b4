"""The score of a single update inside a training loop, before it is sent."""

from leakjax.guard.online import Guard, GuardState, guard, loss_of

__all__ = ["Guard", "GuardState", "guard", "loss_of"]
