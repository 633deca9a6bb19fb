"""Small models that hold like groups of sites and nothing else: what is timed to choose a form.

The weights are real ones, several side by side, so that a run meets them as a whole model would: not all in cache.
A group is one site, or a few that share an input: the products of a low-rank layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph.weights import array_of
from spa_compiler.kernels.form import Form
from spa_compiler.kernels.window import Window
from spa_compiler.placement.nodes import DOMAIN, DOMAIN_VERSION, Assembled, Packer, assemble
from spa_compiler.placement.regions import Group, inputs_of
from spa_compiler.placement.sites import Site

MOST_GROUPS = 6
MOST_BYTES = 96 << 20  # of dense weights in one trial
_OPSET, _IR = 17, 8


def pick(groups: Sequence[Group]) -> list[Group]:
    """The groups of a class that its trial holds."""
    each = sum(site.op.n * site.op.k * 4 for site in groups[0].products)
    return list(groups[: max(1, min(MOST_GROUPS, MOST_BYTES // max(each, 1)))])


def region_of(group: Group, forms: Mapping[str, Form], packer: Packer) -> Assembled:
    """The region of a group by itself; `forms` has that of every site by name."""
    return assemble(group, _results(group), forms, packer)


def sparse_model(groups: Sequence[Group], shape: Sequence[int], forms: Mapping[str, Form], packer: Packer) -> bytes:
    """Every group as a node of its own, all reading one input of `shape`."""
    nodes, constants, outputs = [], [], []
    for i, group in enumerate(groups):
        made = region_of(group, forms, packer)
        names = [f"{i}.{j}" for j in range(len(made.arrays))]
        constants += [numpy_helper.from_array(array_of(a), n) for a, n in zip(made.arrays, names, strict=True)]
        results = [f"y{i}.{j}" for j in range(len(made.outputs))]
        nodes.append(helper.make_node(made.spec.op_type, ["x", *names], results, domain=DOMAIN, site=f"trial {i}"))
        outputs += results
    return _model(nodes, constants, outputs, shape)


def dense_model(groups: Sequence[Group], shape: Sequence[int]) -> bytes:
    """The same groups in standard ops, spelled so that ONNX Runtime's own fusions find them."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    outputs = []
    for i, group in enumerate(groups):
        made: dict[int, str] = {}
        results = {id(t) for t in _results(group)}
        for j, site in enumerate(e for e in group.elements if isinstance(e, Site)):
            key = f"{i}.{j}"
            nodes += _linear(site, key, [made.get(id(p.source), "x") for p in site.products], len(shape), constants)
            nodes += _activation(site, key, nodes[-1].output[0], constants)
            made[id(site.output)] = nodes[-1].output[0]
            if id(site.output) in results:
                outputs.append(nodes[-1].output[0])
    return _model(nodes, constants, outputs, shape)


def _results(group: Group) -> list[gs.Variable]:
    """What no other site of the group reads: all that a trial gives out."""
    inside = {id(t) for e in group.elements for t in inputs_of(e)}
    return [e.output for e in group.elements if id(e.output) not in inside]


def _linear(
    site: Site, key: str, sources: Sequence[str], rank: int, constants: list[onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """The products, their sum and the bias."""
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    biases = [] if site.bias is None else [constant(f"b{key}", site.bias)]
    for j, (part, source) in enumerate(zip(site.products, sources, strict=True)):
        name = f"{key}.{j}"
        if site.layout == "planes":
            if part.op.kind == "ConvTranspose":
                nodes.append(_transposed(part, source, name, constant))
                continue
            w = constant(f"w{name}", _kernel(part, rank))
            inputs = [source, w, *(biases if j == 0 else [])]
            attributes = _attributes(part.window) | ({} if part.op.group == 1 else {"group": part.op.group})
            nodes.append(helper.make_node("Conv", inputs, [f"m{name}"], **attributes))
        else:
            w = constant(f"w{name}", part.weight.T)
            nodes.append(helper.make_node("MatMul", [source, w], [f"m{name}"]))
    last = nodes[-1].output[0]
    if site.term is not None:
        nodes.append(helper.make_node("Add", [nodes[0].output[0], last], [f"t{key}"]))
        last = f"t{key}"
    if biases and site.layout == "rows":
        nodes.append(helper.make_node("Add", [last, *biases], [f"p{key}"]))
    return nodes


def _transposed(
    site: Site, source: str, name: str, constant: Callable[[str, NDArray[np.float32]], str]
) -> onnx.NodeProto:
    """A transposed convolution as it is in the file; its sums come alone."""
    inputs = [source, constant(f"w{name}", array_of(site.op.node.inputs[1]))]
    if site.bias is not None:
        inputs.append(constant(f"c{name}", array_of(site.op.node.inputs[2])))
    keys = ("kernel_shape", "strides", "dilations", "pads")
    attributes = {key: site.op.node.attrs[key] for key in keys if key in site.op.node.attrs}
    return helper.make_node("ConvTranspose", inputs, [f"m{name}"], **attributes)


def _kernel(site: Site, rank: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The weight of a convolution over `rank` - 2 axes."""
    size = [1] * (rank - 2) if site.window is None else site.window.size[2 - rank :]
    return site.own.reshape(site.n, -1, *size)


def _attributes(window: Window | None) -> dict[str, Any]:
    if window is None:
        return {}
    axes = window.axes
    pads = [*window.pads[2 - axes : 2], *window.pads[4 - axes :]]
    return {"strides": list(window.stride[-axes:]), "dilations": list(window.dilation[-axes:]), "pads": pads}


def _activation(site: Site, key: str, p: str, constants: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    def scalar(name: str, value: float) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, np.float32), f"{name}{key}"))
        return f"{name}{key}"

    y = f"a{key}"
    if site.act == "relu":
        return [helper.make_node("Relu", [p], [y])]
    if site.act == "clip":
        return [helper.make_node("Clip", [p, scalar("low", site.low), scalar("high", site.high)], [y])]
    if site.act in ("sigmoid", "hard_swish"):
        return [helper.make_node({"sigmoid": "Sigmoid", "hard_swish": "HardSwish"}[site.act], [p], [y])]
    if site.act == "hard_sigmoid":
        return [helper.make_node("HardSigmoid", [p], [y], alpha=site.low, beta=site.high)]
    if site.act == "leaky_relu":
        return [helper.make_node("LeakyRelu", [p], [y], alpha=site.low)]
    if site.act == "silu":
        return [helper.make_node("Sigmoid", [p], [f"s{key}"]), helper.make_node("Mul", [p, f"s{key}"], [y])]
    if site.act == "gelu_erf":
        return [
            helper.make_node("Div", [p, scalar("root", 2**0.5)], [f"d{key}"]),
            helper.make_node("Erf", [f"d{key}"], [f"e{key}"]),
            helper.make_node("Add", [f"e{key}", scalar("one", 1.0)], [f"f{key}"]),
            helper.make_node("Mul", [p, f"f{key}"], [f"g{key}"]),
            helper.make_node("Mul", [f"g{key}", scalar("half", 0.5)], [y]),
        ]
    if site.act == "gelu_tanh":
        return [helper.make_node("FastGelu", [p], [y], domain="com.microsoft")]
    return []


def _model(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], outputs: list[str], shape: Sequence[int]
) -> bytes:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)) for name in outputs]
    graph = helper.make_graph(nodes, "trial", values, results, constants)
    opsets = [
        helper.make_opsetid("", _OPSET),
        helper.make_opsetid(DOMAIN, DOMAIN_VERSION),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=_IR).SerializeToString())
