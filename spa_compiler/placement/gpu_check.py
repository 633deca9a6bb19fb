"""A model with nodes for GPUs in standard operators again: what can be shown of it on a machine without a GPU.

Every node becomes the product with the weight that its arrays hold, unpacked by the form's own file, in float32,
rounded where the kernel would round. So inputs, residuals, bias, activation, sizes and packed bytes are checked; no
kernel runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from spa_compiler.errors import VerificationError
from spa_compiler.graph.half_kernels import ELEMENT
from spa_compiler.graph.model import Model
from spa_compiler.graph.weights import array_of
from spa_compiler.kernels.cuda.form import Dtype
from spa_compiler.kernels.cuda.lowrank import LowRank
from spa_compiler.placement.gpu_choose import GpuChoice
from spa_compiler.placement.gpu_nodes import node_name, operator_of
from spa_compiler.placement.nodes import DOMAIN
from spa_compiler.runtime.gpu import NodeLayout


def expanded(model: Model, choices: Sequence[GpuChoice]) -> Model:
    """A copy of an artifact's model.onnx without any node of ours.

    Raises:
        VerificationError: a node is not as its choice says.
    """
    twin = model.copy()
    mine = {node_name(c): c for c in choices if c.arrays is not None}
    nodes = [node for node in twin.graph.nodes if node.domain == DOMAIN]
    for node in nodes:
        choice = mine.pop(node.name, None)
        if choice is None or choice.form is None or node.op != operator_of(choice.form).op_type:
            raise VerificationError("a node of ours is not one that was chosen", where=str(node.name))
        _expand(twin.graph, node, choice)
    if mine:
        raise VerificationError("a site that was to be a node is none", where=next(iter(mine)))
    twin.graph.import_domains = [d for d in twin.graph.import_domains if d.domain != DOMAIN]
    twin.graph.cleanup().toposort()
    return twin


def _expand(graph: gs.Graph, node: gs.Node, choice: GpuChoice) -> None:
    form = choice.form
    assert form is not None
    (x, *rest), (result,) = list(node.inputs), list(node.outputs)
    residual = rest.pop(0) if form.epilogue.residual else None
    names = list(form.form.arrays)
    arrays = {name: np.asarray(array_of(c)) for name, c in zip(names, rest[:-1], strict=True)}
    n, k = int(node.attrs["n"]), int(node.attrs["k"])
    if isinstance(form.form, LowRank):
        up, down = form.form.factors(arrays, n, k, form.dtype)
        weights = [down, up]
    else:
        weights = [form.form.unpack(arrays, n, k, form.dtype)]
    bias = np.asarray(array_of(rest[-1]), np.float32)
    node.inputs.clear()
    node.outputs.clear()
    build = _Builder(graph, node.name)
    rank = len(x.shape) if x.shape is not None else 4
    wide = build.cast(x, TensorProto.FLOAT, form.dtype)
    for weight in weights[:-1]:
        wide = build.rounded(build.product(wide, weight, form.layout, rank), form.dtype)
    along = bias if form.layout == "rows" else bias.reshape(-1, *[1] * (rank - 2))
    y = build("Add", [build.product(wide, weights[-1], form.layout, rank), build.constant(along)])
    if residual is not None:
        y = build("Add", [y, build.cast(residual, TensorProto.FLOAT, form.dtype)])
    y = _activation(build, y, form.epilogue.act, _bounds(node.attrs))
    last = y.inputs[0]
    if form.dtype == "fp32":
        last.outputs[0] = result
    else:
        graph.nodes.append(gs.Node("Cast", f"{node.name}/last", {"to": ELEMENT[form.dtype]}, [y], [result]))


class _Builder:
    """Appends nodes to a graph."""

    def __init__(self, graph: gs.Graph, name: str) -> None:
        self._graph, self._name, self._count = graph, name, 0

    def __call__(self, op: str, inputs: Sequence[gs.Tensor], **attributes: object) -> gs.Variable:
        self._count += 1
        made = gs.Variable(f"{self._name}/{self._count}", np.float32)
        self._graph.nodes.append(gs.Node(op, made.name, attributes, list(inputs), [made]))
        return made

    def constant(self, values: np.ndarray) -> gs.Constant:
        self._count += 1
        return gs.Constant(f"{self._name}/{self._count}", np.asarray(values, np.float32, order="C"))

    def product(self, x: gs.Tensor, weight: np.ndarray, layout: NodeLayout, rank: int) -> gs.Variable:
        """`weight` [n, k] with x of `rank` axes."""
        if layout == "rows":
            return self("MatMul", [x, self.constant(weight.T)])
        return self("Conv", [x, self.constant(weight.reshape(*weight.shape, *[1] * (rank - 2)))])

    def rounded(self, tensor: gs.Variable, dtype: Dtype) -> gs.Variable:
        """As a tensor of `dtype` between two operators would be."""
        if dtype == "fp32":
            return tensor
        narrow = self("Cast", [tensor], to=ELEMENT[dtype])
        narrow.dtype = ELEMENT[dtype]
        return self("Cast", [narrow], to=int(TensorProto.FLOAT))

    def cast(self, tensor: gs.Tensor, to: int, dtype: Dtype) -> gs.Tensor:
        return tensor if dtype == "fp32" else self("Cast", [tensor], to=int(to))


def _bounds(attrs: Mapping[str, object]) -> tuple[float, float]:
    return float(attrs.get("low", 0.0)), float(attrs.get("high", 0.0))  # type: ignore[arg-type]


def _activation(build: _Builder, y: gs.Variable, act: str, bounds: tuple[float, float]) -> gs.Variable:
    """`kernels/activation.py` in operators that every opset has."""

    def scalar(value: float) -> gs.Constant:
        return build.constant(np.array(value))

    low, high = bounds
    if act == "none":
        return y
    if act in ("relu", "sigmoid"):
        return build(act.capitalize(), [y])
    if act == "clip":
        return build("Min", [build("Max", [y, scalar(low)]), scalar(high)])
    if act == "silu":
        return build("Mul", [y, build("Sigmoid", [y])])
    if act == "leaky_relu":
        return build("LeakyRelu", [y], alpha=low)
    if act == "hard_sigmoid":
        return build("HardSigmoid", [y], alpha=low, beta=high)
    if act == "hard_swish":
        return build("Mul", [y, build("HardSigmoid", [y], alpha=1 / 6, beta=0.5)])
    if act == "gelu_erf":
        inner = build("Erf", [build("Mul", [y, scalar(0.5**0.5)])])
    else:
        cube = build("Mul", [build("Mul", [y, y]), y])
        sum_ = build("Add", [y, build("Mul", [cube, scalar(0.044715)])])
        inner = build("Tanh", [build("Mul", [sum_, scalar((2 / np.pi) ** 0.5)])])
    return build("Mul", [build("Mul", [y, scalar(0.5)]), build("Add", [inner, scalar(1.0)])])
