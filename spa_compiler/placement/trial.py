"""Small models that hold the sites of one class and nothing else: what is timed to choose a form.

The weights are real ones, several side by side, so that a run meets them as a whole model would: not all in cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.placement.nodes import ARRAYS, DOMAIN, DOMAIN_VERSION, Packer, linear_spec
from spa_compiler.placement.sites import Site
from spa_compiler.runtime.region import RegionBuilder, RegionSpec

MOST_SITES = 6
MOST_BYTES = 96 << 20  # of dense weights in one trial
_OPSET, _IR = 17, 8


def pick(sites: Sequence[Site]) -> list[Site]:
    """The sites of a class that its trial holds."""
    each = sites[0].n * sites[0].k * 4
    return list(sites[: max(1, min(MOST_SITES, MOST_BYTES // max(each, 1)))])


def region_of(site: Site, packer: Packer, rows: int) -> RegionSpec:
    """The region of one site by itself."""
    builder = RegionBuilder(site.layout)
    builder.linear_out(builder.pack(site.k), linear_spec(site, packer(site, rows)))
    return builder.finish()


def sparse_model(sites: Sequence[Site], shape: Sequence[int], packer: Packer, rows: int) -> bytes:
    """Every site as a node of its own, all reading one input of `shape`."""
    nodes, constants, outputs = [], [], []
    for i, site in enumerate(sites):
        names = [f"{what}{i}" for what in ARRAYS]
        arrays = packer(site, rows).arrays
        constants += [numpy_helper.from_array(a, name) for a, name in zip(arrays, names, strict=True)]
        op = region_of(site, packer, rows).op_type
        nodes.append(helper.make_node(op, ["x", *names], [f"y{i}"], domain=DOMAIN, site=site.name[:200]))
        outputs.append(f"y{i}")
    return _model(nodes, constants, outputs, shape)


def dense_model(sites: Sequence[Site], shape: Sequence[int]) -> bytes:
    """The same sites in standard ops, spelled so that ONNX Runtime's own fusions find them."""
    nodes, constants, outputs = [], [], []
    for i, site in enumerate(sites):
        bias = np.zeros(site.n, np.float32) if site.bias is None else site.bias
        if site.layout == "planes":
            ones = [1] * (len(shape) - 2)
            constants.append(numpy_helper.from_array(site.weight.reshape(site.n, site.k, *ones), f"w{i}"))
            nodes.append(helper.make_node("Conv", ["x", f"w{i}", f"b{i}"], [f"p{i}"]))
        else:
            constants.append(numpy_helper.from_array(np.ascontiguousarray(site.weight.T), f"w{i}"))
            nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"]))
            nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"p{i}"]))
        constants.append(numpy_helper.from_array(bias, f"b{i}"))
        nodes += _activation(site, i, constants)
        outputs.append(nodes[-1].output[0])
    return _model(nodes, constants, outputs, shape)


def _activation(site: Site, i: int, constants: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    def scalar(name: str, value: float) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, np.float32), f"{name}{i}"))
        return f"{name}{i}"

    p, y = f"p{i}", f"a{i}"
    if site.act == "relu":
        return [helper.make_node("Relu", [p], [y])]
    if site.act == "clip":
        return [helper.make_node("Clip", [p, scalar("low", site.low), scalar("high", site.high)], [y])]
    if site.act == "silu":
        return [helper.make_node("Sigmoid", [p], [f"s{i}"]), helper.make_node("Mul", [p, f"s{i}"], [y])]
    if site.act == "gelu_erf":
        return [
            helper.make_node("Div", [p, scalar("root", 2**0.5)], [f"d{i}"]),
            helper.make_node("Erf", [f"d{i}"], [f"e{i}"]),
            helper.make_node("Add", [f"e{i}", scalar("one", 1.0)], [f"f{i}"]),
            helper.make_node("Mul", [p, f"f{i}"], [f"g{i}"]),
            helper.make_node("Mul", [f"g{i}", scalar("half", 0.5)], [y]),
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
