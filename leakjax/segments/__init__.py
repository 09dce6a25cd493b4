"""A model read as a chain of maps, each with its parameters and its activation."""

from leakjax.segments.chain import Chain, Segment, read_segments

__all__ = ["Chain", "Segment", "read_segments"]
