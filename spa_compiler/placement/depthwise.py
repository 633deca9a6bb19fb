"""Depthwise convolutions: dense, but where they stand between sparse layers, images stay inside of one region."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp, weighted_ops
from spa_compiler.kernels.window import Window
from spa_compiler.placement.sites import held, take_epilogue, unfit_window, window_of
from spa_compiler.runtime.image_spec import DepthwiseSpec, fits_buffer

F32 = NDArray[np.float32]


@dataclass(eq=False)
class DepthwiseSite:
    """act(w * x + b) of every channel by itself, computed by `nodes`; `taps` is [channels, height x width]."""

    name: str
    window: Window
    source: gs.Variable
    output: gs.Variable
    nodes: list[gs.Node]
    taps: F32
    bias: F32 | None
    act: str = "none"
    low: float = 0.0
    high: float = 0.0
    layout: str = "planes"

    @property
    def n(self) -> int:
        return len(self.taps)

    @property
    def spec(self) -> DepthwiseSpec:
        return DepthwiseSpec(self.window, self.act, self.low, self.high)

    @property
    def bias_or_zeros(self) -> F32:
        return np.zeros(self.n, np.float32) if self.bias is None else self.bias


def find_depthwise(model: Model) -> list[DepthwiseSite]:
    """Every float32 Conv of one filter a channel that a kernel fits, in topological order, with what follows it."""
    found, outputs = [], held(model.graph)
    for op in weighted_ops(model.graph):
        if _fits(op):
            bias = None if op.bias is None else np.asarray(op.bias, np.float32)
            taps = np.ascontiguousarray(op.rows(), np.float32)
            node = op.node
            site = DepthwiseSite(op.name, window_of(op), node.inputs[0], node.outputs[0], [node], taps, bias)
            take_epilogue(site, outputs)
            found.append(site)
    return found


def _fits(op: WeightedOp) -> bool:
    if op.kind != "Conv" or op.group == 1 or op.group != op.n or op.weight.shape[1] != 1:
        return False
    if op.weight.dtype != np.float32 or not isinstance(op.node.inputs[0], gs.Variable):
        return False
    if len(op.node.inputs) > 2 and op.bias is None:
        return False
    return not unfit_window(op) and fits_buffer(window_of(op))
