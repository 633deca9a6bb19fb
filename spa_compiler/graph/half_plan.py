"""Which nodes of a float32 model stay float32 when it gets 16-bit floats.

- operators without a 16-bit kernel in ONNX Runtime's CUDA provider (`half_kernels`), loops and branches;
- sums, powers, exponentials, roots: their results, or what goes in, leave the range of float16;
- what leads to a sine or cosine of positions, since a position times a frequency needs more than 11 bits;
- nodes with a constant that float16 cannot hold: a weight beyond its range, an epsilon below its smallest normal;
- element-wise nodes and moves between such nodes, where a Cast would cost more than they do: so a norm that is spelled
  out stays in one piece, and ONNX Runtime still finds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from spa_compiler.graph import weights
from spa_compiler.graph.half_kernels import ELEMENT, Floats, Half, floats_of
from spa_compiler.graph.model import Model

LARGEST = 65504.0
"""Of float16."""

_FLOAT = int(TensorProto.FLOAT)
_FLOATS = frozenset({_FLOAT, *ELEMENT.values(), int(TensorProto.DOUBLE)})
_TINY = 2.0**-14  # the smallest normal of float16: below it precision goes, and at 6e-8 the number
_SUMS = frozenset(
    {"CumSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"}
    | {"ReduceSumSquare", "Pow", "Exp", "Log", "Sqrt", "Reciprocal", "Sin", "Cos"}
)
_POSITIONS = frozenset({"Sin", "Cos"})
_ELEMENTWISE = frozenset({"Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Sub", "Sum", "Where"})
MOVES = frozenset(
    {"ArgMax", "ArgMin", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape"}
    | {"Pad", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze", "Cast", "ReduceMax", "ReduceMin"}
    | {"ConstantOfShape"}
)
"""What computes nothing: rounded numbers stay as they are."""

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})
_LARGE = 1 << 16  # elements: a table of frequencies has fewer
_NONE = Floats(frozenset(), frozenset())


def element_of(tensor: gs.Tensor) -> int:
    """The ONNX element type of a tensor; 0 where it is not known."""
    if isinstance(tensor, gs.Constant):
        return weights.onnx_type(tensor)
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return int(tensor.dtype or 0)
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


class Plan:
    """Decides for every node of the outermost graph.

    `floats` has the inputs and outputs of a node that its type decides on, None for a node that has no floats or takes
    them as they come; `kept` says why a node stays float32, by identity; `clamped` is filled by what carries it out.
    """

    def __init__(self, model: Model, half: Half | None, border: Mapping[str, int], keep: Collection[str]) -> None:
        self.half, self.border = half, border
        self.nodes: list[gs.Node] = list(model.graph.nodes)
        self.floats: dict[int, Floats | None] = {}
        self.kept: dict[int, str] = {}
        self.clamped: list[str] = []
        _complete_types(self.nodes)
        for node in self.nodes:
            self._look_at(node, model.source.opset)
            if node.name in keep:
                self._hold(node, "its results are beyond the range of float16")
        self._hold_positions()
        while self._grow():
            pass

    def narrow(self) -> Iterator[gs.Node]:
        """The nodes that get 16 bits."""
        for node in self.nodes:
            if self.floats[id(node)] is not None and id(node) not in self.kept:
                yield node

    def results(self, node: gs.Node) -> list[gs.Variable]:
        """What a node makes that has its type."""
        floats = self.floats[id(node)] or _NONE
        return [t for i, t in enumerate(node.outputs) if i in floats.outputs and t.name and element_of(t) == _FLOAT]

    def _look_at(self, node: gs.Node, opset: int) -> None:
        takes = any(element_of(t) == _FLOAT for t in node.inputs)
        makes = any(element_of(t) == _FLOAT for t in node.outputs)
        if not (takes or makes) or (not makes and not node.domain and node.op in ("Cast", "Shape", "Size")):
            self.floats[id(node)] = None
            return
        found = None if self.half is None else _floats(node, self.half, opset)
        if found == _NONE:  # the operator's own definition has no such type, at this opset
            found = None
        self.floats[id(node)] = found or _NONE
        if self.half is None:
            self._hold(node, "as it came")
        elif found is None:
            self._hold(node, f"no {self.half} kernel in ONNX Runtime CUDA")
        elif why := self._unfit(node):
            self._hold(node, why)

    def _hold(self, node: gs.Node, why: str) -> None:
        if self.floats[id(node)] is not None:
            self.kept.setdefault(id(node), why)

    def _unfit(self, node: gs.Node) -> str:
        if node.op in _SUMS or (node.op.startswith("Scatter") and node.attrs.get("reduction", "none") != "none"):
            return "sums, powers and roots need more than 16 bits"
        if self.half == "bf16":
            return ""
        for tensor in node.inputs:
            if not isinstance(tensor, gs.Constant) or element_of(tensor) != _FLOAT:
                continue
            values = np.abs(weights.array_of(tensor))
            if values.size == 1 and 0 < values.item() < _TINY:
                return "a constant below the smallest normal float16"
            if node.op in _WEIGHTED and np.any(values[np.isfinite(values)] > LARGEST):
                return "a weight beyond the range of float16"
        return ""

    def _hold_positions(self) -> None:
        light: dict[int, bool] = {}
        for node in self.nodes:
            light[id(node)] = _is_light(node) and all(light[id(n)] for t in _variables(node) for n in t.inputs)
        queue = [node for node in self.nodes if node.op in _POSITIONS and light[id(node)]]
        while queue:
            for node in (n for t in _variables(queue.pop()) for n in t.inputs):
                if light[id(node)] and id(node) not in self.kept and self.floats[id(node)] is not None:
                    self._hold(node, "positions need more than 16 bits")
                    queue.append(node)

    def _grow(self) -> bool:
        """One turn over the nodes; whether it kept any more."""
        before = len(self.kept)
        for node in self.narrow():
            if node.op not in _ELEMENTWISE | MOVES:
                continue
            floats = self.floats[id(node)] or _NONE
            sources = [t for i in floats.inputs if isinstance(t := node.inputs[i], gs.Variable) and t.name]
            wide = [t for t in sources if self._is_wide(t)]
            # without sources it makes floats of integers: as its readers want them
            between = (wide or not sources) and any(id(n) in self.kept for t in node.outputs for n in t.outputs)
            if between or (sources and len(wide) == len(sources)):
                self._hold(node, "between nodes that stay float32")
        return len(self.kept) > before

    def _is_wide(self, tensor: gs.Variable) -> bool:
        """Whether a tensor is float32 as things stand."""
        if not tensor.inputs:
            return self.border.get(tensor.name, _FLOAT) == _FLOAT
        node = tensor.inputs[0]
        return id(node) in self.kept or all(t is not tensor for t in self.results(node))


def _floats(node: gs.Node, half: Half, opset: int) -> Floats | None:
    if node.op == "Cast" and not node.domain:
        takes = element_of(node.inputs[0]) == _FLOAT
        return Floats(frozenset({0} if takes else ()), frozenset({0}))
    return floats_of(node, half, opset)


def _variables(node: gs.Node) -> list[gs.Variable]:
    return [t for t in node.inputs if isinstance(t, gs.Variable) and element_of(t) == _FLOAT]


def _is_light(node: gs.Node) -> bool:
    """Whether a node may be a part of what makes positions or time steps of numbers: it looks nothing up in a table of
    weights, and multiplies with none."""
    tables = [t for t in node.inputs if isinstance(t, gs.Constant) and element_of(t) == _FLOAT]
    if node.op in ("Gather", "Conv", "Gemm") and tables:
        return False
    return all(np.prod(t.shape) <= _LARGE for t in tables)


def _complete_types(nodes: Sequence[gs.Node]) -> None:
    """Types behind operators that onnx's inference knows nothing of: an output has that of the first float input."""
    for node in nodes:
        first = next((k for t in node.inputs if (k := element_of(t)) in _FLOATS), 0)
        for place, tensor in enumerate(node.outputs):
            if tensor.name and not element_of(tensor) and (kind := _output_type(node, place, first)):
                tensor.dtype = np.dtype(np.float32) if kind == _FLOAT else kind


def _output_type(node: gs.Node, place: int, first: int) -> int:
    if node.op == "Cast":
        return int(node.attrs.get("to", 0))
    if node.op in ("Shape", "Size"):
        return int(TensorProto.INT64)
    floats = floats_of(node, "fp16", onnx.defs.onnx_opset_version())
    if floats is None or place in floats.outputs:
        return first
    return int(TensorProto.INT32) if node.domain == "com.microsoft" else 0
