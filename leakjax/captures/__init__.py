"""Gradients and weights in files: what a server that runs another program has."""

from leakjax.captures.capture import read_capture, write_capture

__all__ = ["read_capture", "write_capture"]
