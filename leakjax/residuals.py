"""The former name of `leakjax.constraints.pull_back`, which notebooks import."""

from leakjax.constraints.pull_back import Residual, pull_gradients, pulled_back, push_forward

__all__ = ["Residual", "pull_gradients", "pulled_back", "push_forward"]
