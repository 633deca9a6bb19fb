"""A tensor between two linear layers, for rules about parts of its last axis."""

from __future__ import annotations

import onnx

from tests.analysis.builder import Net
from tests.analysis.exactness import check_each_unit, check_exact


def exact(model: onnx.ModelProto) -> int:
    """Random units and single ones; the number of groups."""
    assert check_each_unit(model)
    return check_exact(model, seeds=(0,))


class Chain:
    """[N, 5, 6] -> linear -> [N, 5, size] -> what is tested -> linear -> [N, 5, 3]."""

    def __init__(self, size: int, opset: int = 17) -> None:
        self.net = Net("pieces", opset)
        self.weight = self.net.weight(6, size)
        self.x = self.net.sigmoid(self.net.op("MatMul", self.net.input("x", "N", 5, 6), self.weight))

    def model(self, x: str, size: int) -> onnx.ModelProto:
        self.reader = self.net.weight(size, 3)
        return self.net.model(self.net.op("MatMul", self.net.op("Cos", x), self.reader))
