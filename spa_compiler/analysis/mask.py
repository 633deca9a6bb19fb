"""The masked model: what a cut must compute. Every reader of a tensor sees zeros where units were removed.

Weights stay as they are, and so do sizes: `Shape` and `Size` still tell the original ones. A recurrent layer reads its
own state, so the state that it carries from step to step is masked too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from spa_compiler.analysis.terms import Indices
from spa_compiler.errors import UsageError
from spa_compiler.graph import settle
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.model import Model, scopes

Keep: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
"""True where an element stays; of the tensor's rank, with size 1 on axes from which nothing goes."""

Removed: TypeAlias = Mapping[tuple[str, int], "Indices | Sequence[int]"]
"""(tensor, axis) -> the indices that go."""

_SIZE_READERS = frozenset({"Shape", "Size"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_STATE_WEIGHTS = 2  # the input of a recurrent layer that multiplies its own state: [directions, gates x hidden, hidden]
_WHERE_SINCE = 9
_WHERE_DTYPES = frozenset({"float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint32"})
"""What ONNX Runtime's Where takes; the rest is multiplied."""


def mask(
    model: Model, activations: Removed, shapes: Mapping[str, Sequence[int | str | None] | None] | None = None
) -> Model:
    """A copy of the model in which the given indices of tensors are zero for every reader, graph outputs among them.

    Args:
        activations: axes count from 0; several axes of one tensor add up, an element goes if any of its indices does.
        shapes: of the tensors that inference on the file alone does not know.

    Raises:
        UsageError: there is no such tensor, axis or index, or the tensor's shape is not known.
    """
    twin = model.copy()
    graph = twin.graph
    graph_shapes.infer(twin)
    tensors = graph.tensors()
    _type_all(model, tensors)
    keeps = {name: _keep(name, tensors, per_axis, shapes or {}) for name, per_axis in _by_tensor(activations).items()}
    names = _Names(tensors)
    made = {name: _Mask(name, keep, tensors[name], graph.opset, names) for name, keep in keeps.items()}
    _mask_states(graph, keeps, names)
    _redirect(graph, made)
    return twin


def _type_all(model: Model, tensors: Mapping[str, Any]) -> None:
    """Types that onnx's inference does not know, as behind operators of ONNX Runtime's own."""
    if all(tensor.dtype is not None for tensor in tensors.values()):
        return
    typed = model.copy()
    settle.apply(typed, settle.settle(typed))
    for name, tensor in typed.graph.tensors().items():
        if name in tensors and tensors[name].dtype is None:
            tensors[name].dtype = tensor.dtype


def _by_tensor(activations: Removed) -> dict[str, dict[int, Indices]]:
    out: dict[str, dict[int, Indices]] = {}
    for (name, axis), indices in activations.items():
        positions = np.asarray(indices, np.int64).reshape(-1)
        if positions.size:
            out.setdefault(name, {})[axis] = positions
    return out


def _keep(name: str, tensors: Mapping[str, Any], per_axis: Mapping[int, Indices], shapes: Mapping[str, Any]) -> Keep:
    if name not in tensors:
        raise UsageError("there is no such tensor", where=name)
    shape = shapes.get(name)
    if shape is None:
        shape = tensors[name].shape
    if shape is None or max(per_axis) >= len(shape):
        raise UsageError(f"axis {max(per_axis)} is asked for, but the shape is {shape}", where=name)
    keep = np.ones([1] * len(shape), np.bool_)
    for axis, positions in per_axis.items():
        size = shape[axis]
        if not isinstance(size, int | np.integer) or positions.min() < 0 or positions.max() >= size:
            raise UsageError(f"axis {axis} has size {size} and lacks some of the indices to mask", where=name)
        stays = np.ones(int(size), np.bool_)
        stays[positions] = False
        keep = keep & stays.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return keep


def _dtype(tensor: Any) -> np.dtype[Any]:
    """The tensor's type; behind operators that inference does not know, that of the nearest float that went in."""
    queue, seen = [tensor], {tensor.name}
    for current in queue:
        dtype: Any = current.dtype
        if isinstance(dtype, int):  # ONNX's number of a type that graphsurgeon does not know
            dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
        known: np.dtype[Any] | None = None if dtype is None else np.dtype(dtype)
        if known is not None and (current is tensor or known.kind == "f"):
            return known
        sources = [source for node in current.inputs for source in node.inputs if source.name not in seen]
        seen.update(source.name for source in sources)
        queue += sources
    return np.dtype(np.float32)


class _Names:
    """Free tensor names."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = set(taken)

    def free(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


class _Mask:
    """The node that masks one tensor. It goes right behind the tensor's maker."""

    def __init__(self, name: str, keep: Keep, tensor: Any, opset: int, names: _Names) -> None:
        dtype = _dtype(tensor)
        self.source = tensor
        self.result = gs.Variable(names.free(f"{name}.masked"), dtype=dtype, shape=tensor.shape)
        known = gs.Constant(names.free(f"{name}.keep"), keep)
        inputs: list[Any]
        if dtype.kind == "b":  # ONNX Runtime has no Where on them
            op, inputs = "And", [known, tensor]
        elif opset >= _WHERE_SINCE and dtype.name in _WHERE_DTYPES:
            op, inputs = "Where", [known, tensor, gs.Constant(names.free(f"{name}.zero"), np.zeros((), dtype))]
        else:
            known.values = keep.astype(dtype)
            op, inputs = "Mul", [tensor, known]
        self.node = gs.Node(op, name=self.result.name, inputs=inputs, outputs=[self.result])


def _redirect(graph: gs.Graph, made: Mapping[str, _Mask]) -> None:
    """Puts the masks into the graph and has every reader, in branches too, read them."""
    ours = {id(one.node) for one in made.values()}
    for scope in scopes(graph):
        for node in scope.nodes:
            if id(node) in ours or (not node.domain and node.op in _SIZE_READERS):
                continue
            for place, tensor in enumerate(node.inputs):
                if tensor.name in made:
                    node.inputs[place] = made[tensor.name].result
        if scope is not graph:
            scope.outputs = [made[t.name].result if t.name in made else t for t in scope.outputs]
    outputs = {tensor.name for tensor in graph.outputs}
    behind: dict[int, list[gs.Node]] = {}
    first: list[gs.Node] = []
    for name, one in made.items():
        maker = one.source.inputs[0] if one.source.inputs else None
        (first if maker is None else behind.setdefault(id(maker), [])).append(one.node)
        if name in outputs:
            _swap_names(graph, one)
    graph.nodes = [*first, *(out for node in list(graph.nodes) for out in (node, *behind.get(id(node), ())))]


def _swap_names(graph: gs.Graph, one: _Mask) -> None:
    """A graph output keeps its name, so its source takes the other one."""
    graph.outputs = [one.result if tensor is one.source else tensor for tensor in graph.outputs]
    one.source.name, one.result.name = one.result.name, one.source.name
    one.result.type = one.source.type


def _mask_states(graph: gs.Graph, keeps: Mapping[str, Keep], names: _Names) -> None:
    """Recurrent layers whose states are masked get recurrent weights that do not read what is gone."""
    for node in list(graph.nodes):
        if node.op not in _RECURRENT or node.domain:
            continue
        masked = [keeps[tensor.name] for tensor in node.outputs if tensor.name in keeps]
        stays = [keep.reshape(-1, keep.shape[-1]).all(axis=0) for keep in masked if keep.shape[-1] > 1]
        if not stays:
            continue
        weights = node.inputs[_STATE_WEIGHTS]
        keep = np.logical_and.reduce(stays)[None, None, :]
        one = _Mask(f"{weights.name}.state", keep, weights, graph.opset, names)
        graph.nodes.insert(graph.nodes.index(node), one.node)
        node.inputs[_STATE_WEIGHTS] = one.result
