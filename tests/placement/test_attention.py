"""The attention core is found however exporters spell it, and what only looks like it is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_session, run
from spa_compiler.kernels.rx1 import Blocks
from spa_compiler.placement.attention import AttentionSite, find_attention
from spa_compiler.placement.nodes import Packer, insert
from spa_compiler.placement.norms import find_norms
from spa_compiler.placement.regions import join
from spa_compiler.placement.sites import find_sites
from spa_compiler.runtime.link import link
from tests.region_harness import MCPU

HEADS, DEPTH = 3, 8
WIDTH = HEADS * DEPTH


def encoder(
    scale: str = "div",
    mask: str = "keys",
    perm_key: tuple[int, ...] = (0, 2, 3, 1),
    axis: int = -1,
    read: str = "",
    rank: int = 0,
) -> onnx.ModelProto:
    """Q, K, V, attention, output projection with residual; `read`: a tensor inside that is an output too; `rank`: of
    all projections, which are then products of two full weights beside a sparse one."""
    rng = np.random.default_rng(3)
    nodes, constants = [], []

    def const(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def op(kind: str, inputs: list[str], output: str, **attrs: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attrs))
        return output

    def linear(x: str, name: str) -> str:
        keep = np.repeat(rng.random((WIDTH, WIDTH // 4)) < 0.4, 4, axis=1)
        w = const(f"{name}_w", (rng.standard_normal((WIDTH, WIDTH)) * keep).astype(np.float32))
        y = op("MatMul", [x, w], f"{name}_mm")
        if rank:
            factors = rng.standard_normal((2, WIDTH, rank)).astype(np.float32) / 4
            thin = op("MatMul", [x, const(f"{name}_d", factors[0])], f"{name}_down")
            y = op("Add", [op("MatMul", [thin, const(f"{name}_u", factors[1].T.copy())], f"{name}_up"), y], f"{name}_s")
        return op("Add", [y, const(f"{name}_b", rng.standard_normal(WIDTH).astype(np.float32))], name)

    def heads(x: str, name: str, perm: tuple[int, ...]) -> str:
        # the target computed at run time, as exporters do
        size = op("Gather", [op("Shape", [x], f"{name}_shape"), "one"], f"{name}_len")
        length = op("Unsqueeze", [size, "zeros"], f"{name}_n")
        target = op("Concat", ["batch", length, "heads", "depth"], f"{name}_target", axis=0)
        return op("Transpose", [op("Reshape", [x, target], f"{name}_split")], f"{name}_heads", perm=list(perm))

    for name, value in (("one", np.int64(1)), ("zeros", [0]), ("heads", [HEADS]), ("depth", [DEPTH]), ("batch", [0])):
        const(name, np.array(value, np.int64))
    const("factor", np.float32(DEPTH**0.5 if scale == "div" else DEPTH**-0.5))
    q, k, v = (linear("x", n) for n in "qkv")
    qh, vh = heads(q, "q", (0, 2, 1, 3)), heads(v, "v", (0, 2, 1, 3))
    if scale == "query":
        qh = op("Mul", [qh, "factor"], "q_scaled")
    kh = heads(k, "k", perm_key)
    s = op("MatMul", [qh, kh], "scores")
    if scale in ("div", "mul"):
        s = op("Div" if scale == "div" else "Mul", [s, "factor"], "scaled")
    if mask != "none":
        s = op("Add", [s, "mask"], "masked")
    c = op("MatMul", [op("Softmax", [s], "p", axis=axis), vh], "context")
    back = op("Transpose", [c], "back", perm=[0, 2, 1, 3])
    joined = op("Reshape", [back, const("width", np.array([0, 0, WIDTH], np.int64))], "joined")
    op("Add", [linear(joined, "o"), "x"], "y")
    mask_shape = {"keys": ["b", 1, 1, "t"], "full": ["b", 1, "t", "t"], "heads": [1, HEADS, "t", "t"]}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "t", WIDTH])]
    if mask != "none":
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, mask_shape[mask]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", WIDTH])]
    if read:
        outputs.append(helper.make_tensor_value_info(read, TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(model: Model, batch: int, tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    sizes = {"b": batch, "t": tokens}
    result = {}
    for value in model.signature.inputs:
        shape = [sizes.get(d, d) for d in value.shape]
        result[value.name] = rng.standard_normal(shape).astype(np.float32)
        if value.name == "mask":
            result["mask"] = np.where(result["mask"] > 0.8, np.float32(-1e4), np.float32(0))
    return result


def found(proto: onnx.ModelProto) -> list[AttentionSite]:
    model = load(proto)
    shapes.infer(model)
    return find_attention(model, [shapes.fixed(model, feeds(model, *s)) for s in ((1, 16), (3, 5))])


@pytest.mark.parametrize("scale", ["div", "mul", "query", "none"])
@pytest.mark.parametrize("mask", ["none", "keys", "full", "heads"])
def test_every_spelling_is_found(scale: str, mask: str) -> None:
    (site,) = found(encoder(scale, mask))
    assert (site.heads, site.depth) == (HEADS, DEPTH)
    assert site.scale == pytest.approx(1.0 if scale == "none" else DEPTH**-0.5)
    assert (site.mask is None) == (mask == "none")
    # the shape computations of the Reshapes that go are taken along
    assert {"Shape", "Gather", "Concat"} <= {n.op for n in site.nodes}


@pytest.mark.parametrize(
    "change",
    [
        {"perm_key": (0, 2, 1, 3), "mask": "none"},  # queries against keys that are not transposed: another product
        {"axis": 2},  # softmax over queries
        {"read": "p"},  # somebody else wants the probabilities
        {"read": "back"},
    ],
)
def test_what_only_looks_like_it_stays(change: dict[str, object]) -> None:
    proto = encoder(**change)  # type: ignore[arg-type]
    if change.get("perm_key"):
        model = load(proto)
        assert find_attention(model, [{}]) == []
    else:
        assert found(proto) == []


def test_a_mask_of_another_length_is_refused(tmp_path: Path) -> None:
    proto = encoder("div", "keys")
    model = load(proto)
    shapes.infer(model)
    known = [shapes.fixed(model, feeds(model, *s)) for s in ((1, 16), (3, 5))]
    sites = find_sites(model)[0]
    groups = join(model, sites, [], find_attention(model, known), [], known)
    link(insert(model, groups, {s.name: Blocks(4) for s in sites}, Packer()), (MCPU,), tmp_path / "kernels.so")
    session = open_session(to_proto(model).SerializeToString(), library=tmp_path / "kernels.so")
    x = feeds(load(proto), 1, 16) | {"mask": np.zeros((1, 1, 1, 15), np.float32)}
    with pytest.raises(Exception, match=r"mask 0 must be \[1 or 1,3 or 1,16 or 1,16\], its shape is \[1,1,1,15\]"):
        run(session, x)


@pytest.mark.parametrize("mask", ["none", "keys", "full", "heads"])
@pytest.mark.parametrize(("threads", "rank"), [(1, 0), (2, 0), (2, 6)])
def test_the_region_computes_what_the_graph_computes(mask: str, threads: int, rank: int, tmp_path: Path) -> None:
    proto = encoder("div", mask, rank=rank)
    model = load(proto)
    shapes.infer(model)
    known = [shapes.fixed(model, feeds(model, *s)) for s in ((1, 16), (3, 5))]
    sites = find_sites(model)[0]
    groups = join(model, sites, find_norms(model), find_attention(model, known), [], known)
    regions = insert(model, groups, {s.name: Blocks(4) for s in sites}, Packer())
    assert [n.domain for n in model.graph.nodes] == ["ai.spa"]
    calls = [line.split("(")[0] for line in regions[0].lines]
    thin = ["spa_linear", "spa_sum"] if rank else ["spa_linear"]
    out = "spa_sum_out" if rank else "spa_linear_out"
    assert calls == ["spa_pack", *thin * 3, "spa_attention", *thin[:-1], out]
    link(regions, (MCPU,), tmp_path / "kernels.so")
    ours = open_session(to_proto(model).SerializeToString(), threads=threads, library=tmp_path / "kernels.so")
    theirs = open_session(proto.SerializeToString())
    for batch, tokens in ((1, 1), (1, 3), (2, 7), (1, 16), (3, 33), (2, 64), (1, 65), (1, 200), (40, 70)):
        x = feeds(load(proto), batch, tokens)
        want, got = run(theirs, x)["y"], run(ours, x)["y"]
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), (batch, tokens)
