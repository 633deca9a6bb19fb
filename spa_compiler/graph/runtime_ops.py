"""Operators that ONNX Runtime has in the default domain and onnx does not: its optimizer and its exporters write them.

    SimplifiedLayerNormalization   RMSNormalization, as exports of language models have had it since before opset 23

ONNX Runtime registers others there too (Affine, Crop, ScaledTanh, ..), of early drafts of ONNX; nothing writes those.
"""

from __future__ import annotations

import onnx

from spa_compiler.graph.branches import with_branches

NAMES = frozenset({"SimplifiedLayerNormalization"})

_DOMAIN = "com.microsoft"


def hide(proto: onnx.ModelProto) -> None:
    """Moves them, in place, to a domain of which onnx's checker knows nothing, so that what it says is of the rest."""
    found = False
    for graph in with_branches(proto.graph):
        for node in graph.node:
            if not node.domain and node.op_type in NAMES:
                node.domain, found = _DOMAIN, True
    if found and all(entry.domain != _DOMAIN for entry in proto.opset_import):
        proto.opset_import.add(domain=_DOMAIN, version=1)
