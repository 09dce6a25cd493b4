"""The former name of `leakjax.constraints.layer`, which notebooks import."""

from leakjax.constraints.layer import LayerSystem, layer_system, segment_rows

__all__ = ["LayerSystem", "layer_system", "segment_rows"]
