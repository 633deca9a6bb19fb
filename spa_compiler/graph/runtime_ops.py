"""Operators that ONNX Runtime has in the default domain and onnx does not: its optimizer and its exporters write them.

    SimplifiedLayerNormalization   RMSNormalization, as exports of language models have had it since before opset 23

ONNX Runtime registers others there too (Affine, Crop, ScaledTanh, ..), of early drafts of ONNX; nothing writes those.
"""

from __future__ import annotations

import onnx

NAMES = frozenset({"SimplifiedLayerNormalization"})

_DOMAIN = "com.microsoft"


def hide(proto: onnx.ModelProto) -> None:
    """Moves them, in place, to a domain of which onnx's checker knows nothing, so that what it says is of the rest."""
    found = False
    graphs = [proto.graph]
    for graph in graphs:
        for node in graph.node:
            if not node.domain and node.op_type in NAMES:
                node.domain, found = _DOMAIN, True
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    if found and all(entry.domain != _DOMAIN for entry in proto.opset_import):
        proto.opset_import.add(domain=_DOMAIN, version=1)
