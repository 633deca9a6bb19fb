"""Attention cores of decoders: rotary positions, shared keys and caches are found, and what only looks alike stays."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest

from spa_compiler.graph import shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import Feeds, open_session, run
from spa_compiler.kernels.rx1 import Blocks
from spa_compiler.placement.attention import AttentionSite, find_attention
from spa_compiler.placement.nodes import Packer, insert
from spa_compiler.placement.norms import find_norms
from spa_compiler.placement.regions import join
from spa_compiler.placement.sites import find_sites
from spa_compiler.runtime.region import RegionSpec
from tests.networks import network
from tests.peers.llama import Sizes, llama_block
from tests.region_harness import linked

HEADS, KEY_HEADS, DEPTH = 4, 2, 8
WIDTH, KEY_WIDTH = HEADS * DEPTH, KEY_HEADS * DEPTH
OPSET_17 = '<ir_version: 8, opset_import: ["" : 17]>\n'
OPSET_18 = '<ir_version: 8, opset_import: ["" : 18]>\n'


def turn(x: str, split: bool, cos: str = "cos", sin: str = "sin") -> str:
    """`{x}r` is `x` with rotary positions."""
    halves = f"{x}h = Slice({x}, half, depth, last) {x}l = Slice({x}, zero, half, last, one)"
    if split:
        halves = f"{x}l, {x}h = Split <axis = 3, num_outputs = 2> ({x})"
    return f"""{halves} {x}n = Neg({x}h) {x}c = Concat <axis = -1> ({x}n, {x}l)
               {x}a = Mul({x}, {cos}) {x}b = Mul({sin}, {x}c) {x}r = Add({x}a, {x}b)"""


def repeat(x: str, out: str) -> str:
    return f"{x}u = Unsqueeze({x}, two) {x}w = Expand({x}u, each) {out} = Reshape({x}w, many)"


def decoder(
    cached: bool = False,
    split: bool = False,
    mask: str = "flat",
    change: tuple[str, str] = ("", ""),
    changes: dict[str, str] | None = None,
) -> Model:
    """Projections, attention and the output's projection with its residual, in text of which `change` replaces a part.

    Args:
        mask: `none`; `flat`, [tokens, keys]; `full`, [batch, 1, tokens, keys].
    """
    keys, values = ("key", "value") if cached else ("kr", "v")
    caches = 'float["b",2,"p",8] past_k, float["b",2,"p",8] past_v' if cached else ""
    masks = {"none": "", "flat": 'float["s","k"] mask', "full": 'float["b",1,"s","k"] mask'}[mask]
    inputs = ['float["b","s",32] x', 'float["s",8] cos', 'float["b",1,"s",8] sin', masks, caches]
    outputs = ['float["b","s",32] y', 'float["b",2,"k",8] key, float["b",2,"k",8] value' if cached else ""]
    text = f"""g ({", ".join(filter(None, inputs))}) => ({", ".join(filter(None, outputs))}) {{
      q0 = MatMul(x, wq) q1 = Reshape(q0, heads) q = Transpose <perm = [0, 2, 1, 3]> (q1) {turn("q", split)}
      k0 = MatMul(x, wk) k1 = Reshape(k0, heads) k = Transpose <perm = [0, 2, 1, 3]> (k1) {turn("k", split)}
      v0 = MatMul(x, wv) v1 = Reshape(v0, heads) v = Transpose <perm = [0, 2, 1, 3]> (v1)
      {"key = Concat <axis = 2> (past_k, kr) value = Concat <axis = -2> (past_v, v)" if cached else ""}
      {repeat(keys, "K")} {repeat(values, "V")} T = Transpose <perm = [0, 1, 3, 2]> (K)
      S = MatMul(qr, T) W = Mul(S, {{0.3}}) {"Z = Identity(W)" if mask == "none" else "Z = Add(W, mask)"}
      P = Softmax <axis = -1> (Z) C = MatMul(P, V) B = Transpose <perm = [0, 2, 1, 3]> (C) J = Reshape(B, join)
      o = MatMul(J, wo) y = Add(x, o) }}"""
    if mask == "none":
        text = text.replace(" Z = Identity(W)", "").replace("Softmax <axis = -1> (Z)", "Softmax <axis = -1> (W)")
    for before, after in [change, *(changes or {}).items()]:
        assert before in text
        text = text.replace(before, after)
    rng = np.random.default_rng(5)

    def sparse(k: int, n: int) -> np.ndarray:
        keep = np.repeat(rng.random((k, n // 4)) < 0.5, 4, axis=1)
        return (rng.standard_normal((k, n)) * keep).astype(np.float32) / 3

    constants = {
        "heads": [0, 0, -1, DEPTH],
        "many": [0, HEADS, -1, DEPTH],
        "each": [1, 1, HEADS // KEY_HEADS, 1, 1],
        "join": [0, 0, WIDTH],
        "direct": [0, -1, 1, DEPTH],
        "join1": [0, 1, WIDTH],
        "four": [1, HEADS, 1, 1],
        "zero": [0],
        "half": [DEPTH // 2],
        "depth": [DEPTH],
        "last": [3],
        "two": [2],
        "one": [1],
    }
    weights = {"wq": (WIDTH, WIDTH), "wk": (WIDTH, KEY_WIDTH), "wv": (WIDTH, KEY_WIDTH), "wo": (WIDTH, WIDTH)}
    proto = network(
        text,
        OPSET_18 if split else OPSET_17,
        check=False,
        **{name: np.array(value, np.int64) for name, value in constants.items()},
        **{name: sparse(*shape) for name, shape in weights.items()},
    )
    model = load(proto)
    shapes.infer(model)
    return model


def feeds(model: Model, batch: int, tokens: int, past: int = 0, seed: int = 0) -> Feeds:
    """Random; the mask is causal. A model without a cache has no past."""
    rng = np.random.default_rng(seed)
    past = past if any("past" in v.name for v in model.signature.inputs) else 0
    sizes = {"b": batch, "batch": batch, "s": tokens, "tokens": tokens, "p": past, "past": past, "k": past + tokens}
    found: Feeds = {}
    for value in model.signature.inputs:
        shape = [sizes.get(d, d) for d in value.shape]
        found[value.name] = rng.standard_normal(shape).astype(np.float32)
        if value.name == "position":
            found[value.name] = np.arange(past, past + tokens)[None].repeat(batch, 0)
    if "mask" in found:
        found["mask"] += np.triu(np.full((tokens, past + tokens), -3e38, np.float32), past + 1)
    return found


def known(model: Model) -> list[dict[str, tuple[int, ...]]]:
    return [shapes.fixed(model, feeds(model, *sizes)) for sizes in ((1, 16, 3), (3, 5, 7))]


def found(model: Model) -> list[AttentionSite]:
    return find_attention(model, known(model))


@pytest.mark.parametrize("mask", ["none", "flat", "full"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_every_part_is_found(cached: bool, split: bool, mask: str) -> None:
    model = decoder(cached, split, mask)
    (site,) = found(model)
    assert (site.heads, site.key_heads, site.depth, site.shared) == (HEADS, KEY_HEADS, DEPTH, 2)
    assert [t.name for t in site.tables] == ["cos", "sin", "cos", "sin"]
    assert [(c.past.name, c.present.name) for c in site.caches] == (
        [("past_k", "key"), ("past_v", "value")] if cached else []
    )
    assert site.scale == pytest.approx(0.3)
    sites = find_sites(model)[0]
    (group,) = join(model, sites, [], [site], [], known(model))
    assert [e.output.name for e in group.elements] == ["q0", "k0", "v0", "J", "y"]
    assert [t.name for t in group.external()] == ["x"]
    given = [*([] if mask == "none" else ["mask"]), "cos", "sin", *(["past_k", "past_v"] if cached else [])]
    assert [t.name for t in group.given()] == given


TRANSPOSED = "T = Transpose <perm = [0, 1, 3, 2]> (K)"


def test_keys_may_be_scaled_behind_a_cache() -> None:
    (site,) = found(decoder(True, change=(TRANSPOSED, "L = Mul(K, {2.0}) " + TRANSPOSED.replace("(K)", "(L)"))))
    assert site.scale == pytest.approx(0.6)


@pytest.mark.parametrize(
    "cached, before, after",
    [
        (False, "qc = Concat <axis = -1> (qn, ql)", "qc = Concat <axis = -1> (ql, qn)"),  # turned the other way
        (False, "qn = Neg(qh)", "qn = Abs(qh)"),
        (False, "qn = Neg(qh)", "qn = Neg(ql)"),
        (False, "qr = Add(qa, qb)", "qr = Sub(qa, qb)"),
        (False, "qa = Mul(q, cos)", "qa = Mul(qc, cos)"),
        (False, "ql = Slice(q, zero, half, last, one)", "qz = Abs(q) ql = Slice(qz, zero, half, last, one)"),
        (False, "ql = Slice(q, zero, half, last, one)", "ql = Slice(q, half, depth, last, one)"),
        (False, "qb = Mul(sin, qc)", "gain = Expand(sin, four) qb = Mul(gain, qc)"),  # a table for each head
        (False, "qb = Mul(sin, qc)", "qb = Mul(sin, qc) side = Abs(qa)"),  # somebody else reads inside
        (False, "krw = Expand(kru, each)", "krm = Neg(kru) krw = Concat <axis = 2> (kru, krm)"),
        (False, "kru = Unsqueeze(kr, two)", "krt = Transpose <perm = [0, 2, 1, 3]> (kr) kru = Unsqueeze(krt, two)"),
        (
            False,
            "krw = Expand(kru, each) K = Reshape(krw, many)",
            "krw = Expand(kru, each) krs = Transpose <perm = [0, 2, 1, 3, 4]> (krw) K = Reshape(krs, many)",
        ),
        (True, "(past_k, kr)", "(kr, past_k)"),  # new keys in front of the past ones
        (True, "key = Concat <axis = 2> (past_k, kr)", "k2 = Mul(kr, {2.0}) key = Concat <axis = 2> (past_k, k2)"),
        (
            True,
            "S = MatMul(qr, T)",
            "qt = Concat <axis = 2> (qr, qr) qs = Slice(qt, zero, one, two, one) S = MatMul(qs, T)",
        ),
        # a mask that is computed from the new keys: the node would wait for itself
        (True, "Z = Add(W, mask)", "far = ReduceSum(key) near = Add(mask, far) Z = Add(W, near)"),
    ],
)
def test_what_only_looks_alike_stays(cached: bool, before: str, after: str) -> None:
    assert len(found(decoder(cached))) == 1
    assert found(decoder(cached, change=(before, after))) == []


ONE_TOKEN = {
    **{f"{x} = Transpose <perm = [0, 2, 1, 3]> ({x}1)": "" for x in "qkv"},
    **{f"{x}1 = Reshape({x}0, heads)": f"{x} = Reshape({x}0, direct)" for x in "qkv"},
    "B = Transpose <perm = [0, 2, 1, 3]> (C) J = Reshape(B, join)": "J = Reshape(C, join1)",
}


@pytest.mark.parametrize("cached", [False, True])
def test_of_one_token_a_reshape_splits_and_joins_heads(cached: bool) -> None:
    changes = {**ONE_TOKEN, 'float["b","s",32] x': 'float["b",1,32] x', 'float["s",8] cos': "float[1,8] cos"}
    model = decoder(cached, changes=changes)
    (site,) = find_attention(model, [shapes.fixed(model, feeds(model, *sizes)) for sizes in ((1, 1, 3), (3, 1, 7))])
    assert (site.heads, site.key_heads, site.depth, len(site.caches)) == (HEADS, KEY_HEADS, DEPTH, 2 * cached)
    assert sum(n.op == "Reshape" for n in site.nodes) == 6


def test_of_any_number_of_tokens_a_reshape_splits_no_heads() -> None:
    """At one token the shapes fit; at others the graph would mean something else."""
    model = decoder(changes=ONE_TOKEN)
    assert find_attention(model, [shapes.fixed(model, feeds(model, *sizes)) for sizes in ((1, 1), (3, 1))]) == []


def test_values_of_the_new_tokens_alone_are_no_cache() -> None:
    """Both keys and values have a cache, or neither has."""
    model = decoder(True)
    (site,) = found(model)
    (concat,) = (n for n in model.graph.nodes if n.outputs[0].name == "value")
    concat.op, concat.inputs, concat.attrs = "Identity", [concat.inputs[1]], {}
    assert find_attention(model, known(decoder(True))) == []
    assert len(site.caches) == 2


def compiled(model: Model) -> tuple[Model, RegionSpec]:
    """The model with every site as a kernel, which must make one node of it."""
    twin = model.copy()
    sites = find_sites(twin)[0]
    groups = join(twin, sites, find_norms(twin), find_attention(twin, known(twin)), [], known(twin))
    (spec,) = insert(twin, groups, {s.name: Blocks(4) for s in sites}, Packer())
    assert isinstance(spec, RegionSpec)
    return twin, spec


@functools.cache
def models() -> dict[str, Model]:
    """By name; the last is a whole block of a Llama."""
    block = load(llama_block(Sizes(hidden=32, inner=80, heads=4, kv_heads=2)))
    shapes.infer(block)
    return {
        "flat mask": decoder(False),
        "full mask, split": decoder(False, True, "full"),
        "cache, no mask": decoder(True, False, "none"),
        "cache, mask": decoder(True, True, "full"),
        "block": block,
    }


@functools.cache
def regions() -> dict[str, tuple[Model, RegionSpec]]:
    return {name: compiled(model) for name, model in models().items()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["flat mask", "full mask, split", "cache, no mask", "cache, mask", "block"])
def test_the_region_computes_what_the_graph_computes(name: str, threads: int) -> None:
    twin, _ = regions()[name]
    library = linked(*(spec for _, spec in regions().values()))
    ours = open_session(to_proto(twin).SerializeToString(), threads=threads, library=library)
    theirs = open_session(to_proto(models()[name]).SerializeToString())
    for sizes in ((1, 1, 0), (1, 1, 9), (2, 1, 130), (1, 3, 4), (2, 20, 5), (1, 70, 60), (1, 130, 0)):
        feed = feeds(models()[name], *sizes, seed=sum(sizes))
        want, got = run(theirs, feed), run(ours, feed)
        for output, value in want.items():
            assert got[output].shape == value.shape
            np.testing.assert_allclose(got[output], value, atol=2e-5 * np.abs(value).max())


def test_a_block_of_a_llama_is_one_node() -> None:
    twin, spec = regions()["block"]
    assert sorted(n.op for n in twin.graph.nodes if n.domain != "ai.spa") == [
        "Gather",
        "Gather",
        "Unsqueeze",
        "Unsqueeze",
    ]
    calls = [line.split("(")[0].removeprefix("spa_") for line in spec.lines]
    attention = ["table", "table", "rotate", "rotate", "attention_cached"]
    feed_forward = ["norm", "linear", "linear_times", "linear_out"]
    assert calls == ["pack", "norm", "linear", "linear", "linear", *attention, "linear", *feed_forward]


def test_outputs_keep_their_names_and_order() -> None:
    twin, _ = regions()["block"]
    (node,) = (n for n in twin.graph.nodes if n.domain == "ai.spa")
    assert [t.name for t in node.outputs] == ["output", "key", "value"]
    onnx.checker.check_model(to_proto(models()["block"]))
