"""ONNX text with fused operators: newer opsets, and the domain of ONNX Runtime."""

from __future__ import annotations

import onnx

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.graph.load import load
from tests.analysis.cutting import with_weights


def net(text: str, opset: int = 24) -> onnx.ModelProto:
    """ONNX text in which every graph input but those named x... becomes a weight with normal values."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    return with_weights(text, header=header)


def analysis_of(text: str, opset: int = 24) -> Analysis:
    return analyze(load(net(text, opset)))


def groups_of(text: str, opset: int = 24) -> dict[str, tuple[int, set[tuple[str, int]]]]:
    """Number of units and members, by granularity and, where that is not enough, the first member's tensor."""
    out: dict[str, tuple[int, set[tuple[str, int]]]] = {}
    for group in analysis_of(text, opset).groups:
        members = {(member.tensor, member.axis) for member in group.members}
        name = (
            group.granularity if group.granularity not in out else f"{group.granularity} of {group.members[0].tensor}"
        )
        out[name] = (group.size, members)
    return out


def reasons_of(text: str, opset: int = 24) -> set[tuple[str, int, str]]:
    """Tensor, axis and reason of the pins that operators make, without those of positions."""
    return {
        (pin.tensor, pin.axis, pin.reason)
        for pin in analysis_of(text, opset).pins
        if pin.op not in ("graph input", "graph output") and "positions" not in pin.reason
    }
