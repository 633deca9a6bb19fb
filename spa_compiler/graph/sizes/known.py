"""What one pass knows of a tensor, the node that asks, and how a node refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, TypeProto, helper, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from spa_compiler.graph import weights

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Dims: TypeAlias = tuple[int | None, ...]

SMALL = 65536
"""Elements up to which a tensor's value is kept."""

NUMERIC = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.BOOL}
    | {TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64}
    | {TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64}
)
"""Element types with a dtype to compute in."""

_INFERENCE_READS = 1024  # elements up to which onnx's inference gets to see a value


class Misfit(Exception):
    """A node cannot take what it is given."""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of one tensor: element type (0: nothing), shape, value; or the type of what is no tensor."""

    elem: int = 0
    shape: Dims | None = None
    value: Array | None = None
    other: TypeProto | None = None

    @cached_property
    def type(self) -> TypeProto:
        """For onnx's inference."""
        if self.other is not None:
            return self.other
        proto = TypeProto()
        proto.tensor_type.elem_type = self.elem
        if self.shape is not None:
            proto.tensor_type.shape.SetInParent()
            for size in self.shape:
                dim = proto.tensor_type.shape.dim.add()
                if size is not None:
                    dim.dim_value = size
        return proto

    @cached_property
    def data(self) -> TensorProto | None:
        """The value for onnx's inference, which looks at small ones only."""
        if self.value is None or self.value.size > _INFERENCE_READS:
            return None
        return numpy_helper.from_array(self.value)

    @property
    def complete(self) -> bool:
        """Whether every size is known."""
        return self.shape is not None and None not in self.shape

    def same(self, other: Known) -> bool:
        """Whether both say the same."""
        if self.elem != other.elem or self.shape != other.shape or (self.value is None) != (other.value is None):
            return False
        if self.value is None or other.value is None:
            return self.other == other.other
        return self.value.dtype == other.value.dtype and np.array_equal(self.value, other.value)


NOTHING = Known()


class Op:
    """A node, with what passes ask of it again and again."""

    def __init__(self, node: gs.Node, opsets: Mapping[str, int]) -> None:
        self.node = node
        self.opsets = opsets
        self.name: str = node.op
        self.domain: str = "" if node.domain in (None, "ai.onnx") else node.domain
        self.attrs: Mapping[str, Any] = node.attrs
        self.inputs: list[str] = [tensor.name for tensor in node.inputs]
        self.outputs: list[str] = [tensor.name for tensor in node.outputs]
        self.has_branches = any(isinstance(value, gs.Graph) for value in node.attrs.values())

    @property
    def opset(self) -> int:
        """The version of the default domain."""
        return self.opsets[""]

    @cached_property
    def proto(self) -> onnx.NodeProto:
        """The node as onnx has it."""
        proto: onnx.NodeProto = OnnxExporter.export_node(self.node)
        return proto

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return self.attrs.get(name, default)

    def optional(self, given: list[Known], place: int) -> Known | None:
        """The input at this place, None if it is left out."""
        return given[place] if place < len(self.inputs) and self.inputs[place] else None


@cache
def elem_of(dtype: np.dtype[Any]) -> int:
    """onnx's number for a dtype."""
    return int(helper.np_dtype_to_tensor_dtype(dtype))


def computed(array: Array) -> Known:
    """A computed value, kept where it is small."""
    return Known(elem_of(array.dtype), array.shape, array if array.size <= SMALL else None)


def constant(tensor: gs.Constant) -> Known:
    """A constant of the graph; large ones are not read."""
    elem, shape = weights.onnx_type(tensor), tuple(int(size) for size in tensor.shape)
    held = tensor._values
    sparse = isinstance(held, LazyValues) and isinstance(held.tensor, onnx.SparseTensorProto)
    if sparse or elem not in NUMERIC or math.prod(shape) > SMALL:
        return Known(elem, shape)
    return Known(elem, shape, np.asarray(weights.array_of(tensor)))


def constant_node(op: Op) -> Known:
    """What a Constant node makes, stated in any of its attributes."""
    for name in ("value", "sparse_value"):
        if isinstance(op.attr(name), gs.Constant):
            return constant(op.attr(name))
    for name, dtype in (("value_int", np.int64), ("value_float", np.float32)):
        for attribute in (name, name + "s"):
            if attribute in op.attrs:
                return computed(np.asarray(op.attrs[attribute], dtype))
    if "value_strings" in op.attrs:
        return Known(TensorProto.STRING, (len(op.attrs["value_strings"]),))
    return Known(TensorProto.STRING, ()) if "value_string" in op.attrs else NOTHING
