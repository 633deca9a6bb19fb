"""Attention, rotary embeddings and what else ai.onnx has for sequences: heads, sizes of heads, pairs."""

from __future__ import annotations

import pytest

from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, groups_of, net, pins_inside

FLAT = """g (float[2, 5, 6] x, float[6, 18] wq, float[6, 9] wk, float[6, 12] wv, float[24, 2] wo)
    => (float[2, 5, 2] y) {
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  a = Attention <q_num_heads = 6, kv_num_heads = 3> (q, k, v)
  y = MatMul(a, wo)
}"""

APART = """g (float[2, 5, 6] x, float[4, 6, 3] wq, float[2, 6, 3] wk, float[2, 6, 7] wv, float[4, 5, 5] mask,
    float[4, 7, 3] wo) => (float[2, 4, 5, 3] y) {
  axis = Constant <value = int64[1] {1}> ()
  x1 = Unsqueeze(x, axis)
  q = MatMul(x1, wq)
  k = MatMul(x1, wk)
  v = MatMul(x1, wv)
  a = Attention <scale = 0.7, is_causal = 1, softcap = 2.0> (q, k, v, mask)
  y = MatMul(a, wo)
}"""

SUMMED = """g (float[2, 5, 6] x, float[3, 6, 4] wq, float[3, 6, 4] wk, float[3, 6, 7] wv, bool[1, 3, 5, 5] xmask,
    float[3, 7, 3] wo) => (float[2, 5, 3] y) {
  axis = Constant <value = int64[1] {1}> ()
  x1 = Unsqueeze(x, axis)
  q = MatMul(x1, wq)
  k = MatMul(x1, wk)
  v = MatMul(x1, wv)
  a = Attention(q, k, v)
  o = MatMul(a, wo)
  y = ReduceSum <keepdims = 0> (o, axis)
}"""

CACHED = """g (float[2, 5, 6] x, float[2, 2, 7, 4] xk, float[2, 2, 7, 3] xv, float[6, 16] wq, float[6, 8] wk,
    float[6, 6] wv, float[12, 2] wo) => (float[2, 5, 2] y, float[2, 2, 12, 4] ck, float[2, 2, 12, 3] cv) {
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  a, ck, cv = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v, , xk, xv)
  y = MatMul(a, wo)
}"""


def test_flat_heads() -> None:
    assert groups_of(net(FLAT)) == {
        "head": (3, {("wq", 1), ("wk", 1), ("wv", 1), ("q", 2), ("k", 2), ("v", 2), ("a", 2), ("wo", 0)}),
        "query head of each key-value head": (2, {("wq", 1), ("q", 2), ("a", 2), ("wo", 0)}),
        "head dimension": (3, {("wq", 1), ("wk", 1), ("q", 2), ("k", 2)}),
        "head dimension of wv": (4, {("wv", 1), ("v", 2), ("a", 2), ("wo", 0)}),
    }
    assert pins_inside(net(FLAT)) == set()


def test_macs_are_those_of_both_products() -> None:
    open_batch = FLAT.replace("[2, 5, 6] x", "[N, 5, 6] x").replace("[2, 5, 2] y", "[N, 5, 2] y")
    for text, samples in ((FLAT, 2), (open_batch, 1)):
        macs = {group.granularity: group.macs for group in analysis_of(net(text)).groups}
        projections = 5 * (6 * (18 + 9 + 12) + 24 * 2)
        assert macs["head"] == samples * (projections + 5 * 5 * (18 + 24))


def test_heads_on_an_axis() -> None:
    groups = groups_of(net(APART))
    assert groups == {
        "head dimension": (3, {("wq", 2), ("wk", 2), ("q", 3), ("k", 3)}),
        "head dimension of wv": (7, {("wv", 2), ("v", 3), ("a", 3), ("wo", 1)}),
    }  # the output has the heads


def test_a_mask_for_every_head() -> None:
    text = SUMMED.replace("bool[1, 3, 5, 5] xmask", "float[3, 5, 5] mask").replace("(q, k, v)", "(q, k, v, mask)")
    size, members = groups_of(net(text))["head"]
    assert size == 3
    assert members >= {("mask", 0), ("wq", 0), ("wk", 0), ("wv", 0), ("wo", 0), ("a", 1)}
    check_exact(net(text))


def test_a_mask_from_outside_keeps_the_heads() -> None:
    assert set(groups_of(net(SUMMED))) == {"head", "head dimension", "head dimension of wv"}
    assert "head" not in groups_of(net(SUMMED.replace("(q, k, v)", "(q, k, v, xmask)")))


def test_a_cache_keeps_its_heads_but_not_their_queries() -> None:
    assert set(groups_of(net(CACHED))) == {"query head of each key-value head"}


@pytest.mark.parametrize("text", [FLAT, APART, SUMMED, CACHED], ids=["flat", "apart", "summed", "cached"])
def test_attention_is_cut_exactly(text: str) -> None:
    assert check_exact(net(text)) > 0
    check_each_unit(net(text))


def test_the_scores_as_an_output() -> None:
    text = FLAT.replace("a = Att", "a, , , s = Att").replace("=> (", "=> (float[2, 6, 5, 5] s, ")
    assert set(groups_of(net(text))) == {"head dimension", "head dimension of wv"}
    check_exact(net(text))


def test_open_sizes_and_a_split_projection() -> None:
    text = """g (float[N, S, 6] x, float[6, 18] wq, float[6, 36] w, float[18, 6] wo) => (float[N, S, 6] y) {
      p = Constant <value = int64[2] {18, 18}> ()
      q = MatMul(x, wq)
      kv = MatMul(x, w)
      k, v = Split <axis = -1> (kv, p)
      a = Attention <q_num_heads = 3, kv_num_heads = 3, is_causal = 1> (q, k, v)
      y = MatMul(a, wo)
    }"""
    groups = groups_of(net(text))
    assert {name: size for name, (size, _) in groups.items()} == {
        "head": 3,
        "head dimension": 6,
        "head dimension of w": 6,
    }
    assert groups["head"][1] >= {("wq", 1), ("w", 1), ("wo", 0)}
    check_exact(net(text))


ROTARY = """g (float[2, 5, 6] x, float[6, {h}] wq, float[6, {h}] wk, float[6, 6] wv, float[9, 4] cos, float[9, 4] sin,
    float[6, 2] wo) => (float[2, 5, 2] y) {{
  p = Constant <value = int64[2, 5] {{0, 1, 2, 3, 4, 3, 4, 5, 6, 7}}> ()
  q0 = MatMul(x, wq)
  k0 = MatMul(x, wk)
  v = MatMul(x, wv)
  q = RotaryEmbedding <{a}num_heads = 3> (q0, cos, sin, p)
  k = RotaryEmbedding <{a}num_heads = 3> (k0, cos, sin, p)
  a = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v)
  y = MatMul(a, wo)
}}"""
PARTLY = "rotary_embedding_dim = 8, "


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [8, 11])
def test_rotary_embedding(interleaved: int, width: int) -> None:
    attributes = f"interleaved = {interleaved}, " + (PARTLY if width > 8 else "")
    text = ROTARY.format(h=3 * width, a=attributes)
    groups = groups_of(net(text))
    assert groups["rotary pair"] == (
        4,
        {("wq", 1), ("wk", 1), ("q0", 2), ("k0", 2), ("q", 2), ("k", 2), ("cos", 1), ("sin", 1)},
    )
    assert groups["head"][0] == 3
    rest = sorted(size for name, (size, _) in groups.items() if name.startswith("head dimension"))
    assert rest == ([2, 3] if width > 8 else [2])
    check_exact(net(text))
    check_each_unit(net(text))


@pytest.mark.parametrize(("interleaved", "indices"), [(0, [0, 4, 8, 12, 16, 20]), (1, [0, 1, 8, 9, 16, 17])])
def test_a_rotary_unit_is_a_pair(interleaved: int, indices: list[int]) -> None:
    analysis = analysis_of(net(ROTARY.format(h=24, a=f"interleaved = {interleaved}, ")))
    (group,) = (group for group in analysis.groups if group.granularity == "rotary pair")
    (slab,) = (slab for slab in group.units[0].parameters if slab.name == "wq")
    assert slab.indices == indices


def test_rotary_embedding_of_heads_on_an_axis() -> None:
    text = """g (float[2, 5, 6] x, float[3, 6, 8] wq, float[3, 6, 8] wk, float[3, 6, 4] wv, float[2, 5, 4] cos,
        float[2, 5, 4] sin, float[3, 4, 2] wo) => (float[2, 5, 2] y) {
      axis = Constant <value = int64[1] {1}> ()
      x1 = Unsqueeze(x, axis)
      q0 = MatMul(x1, wq)
      k0 = MatMul(x1, wk)
      v = MatMul(x1, wv)
      q = RotaryEmbedding(q0, cos, sin)
      k = RotaryEmbedding(k0, cos, sin)
      a = Attention(q, k, v)
      o = MatMul(a, wo)
      y = ReduceSum <keepdims = 0> (o, axis)
    }"""
    assert {name: size for name, (size, _) in groups_of(net(text)).items()} == {
        "head": 3,
        "rotary pair": 4,
        "head dimension": 4,
    }
    check_exact(net(text))


def test_tables_from_outside_keep_the_pairs() -> None:
    text = ROTARY.format(h=24, a="").replace("] cos", "] xcos").replace("0, cos", "0, xcos")
    assert {name: size for name, (size, _) in groups_of(net(text)).items()} == {"head": 3, "head dimension": 2}
    check_exact(net(text))


def test_tensor_scatter() -> None:
    text = """g (float[2, 5, 6] x, float[6, 8] w, float[2, 9, 8] cache, float[8, 3] v) => (float[2, 9, 3] y) {
      at = Constant <value = int64[2] {1, 3}> ()
      h = MatMul(x, w)
      c = TensorScatter <axis = -2> (cache, h, at)
      y = MatMul(c, v)
    }"""
    assert groups_of(net(text)) == {"channel": (8, {("w", 1), ("h", 2), ("cache", 2), ("c", 2), ("v", 0)})}
    check_exact(net(text))


LINEAR = """g (float[2, 5, 6] x, float[6, 16] wq, float[6, 8] wk, float[6, 6] wv, float[6, {g}] wd, float[6, {b}] wb,
    float[12, 2] wo) => (float[2, 5, 2] y) <float[2, 5, 12] o, float[2, 2, 4, 3] s> {{
  q = MatMul(x, wq)
  k0 = MatMul(x, wk)
  k = Tanh(k0)
  v = MatMul(x, wv)
  d0 = MatMul(x, wd)
  d1 = Softplus(d0)
  d = Neg(d1)
  b0 = MatMul(x, wb)
  b = Sigmoid(b0)
  o, s = {domain}LinearAttention <q_num_heads = 4, kv_num_heads = 2> (q, k, v, , d, b)
  y = MatMul(o, wo)
}}"""


@pytest.mark.parametrize("decay", [2, 8])
@pytest.mark.parametrize("rate", [1, 2])
def test_linear_attention(decay: int, rate: int) -> None:
    text = LINEAR.format(g=decay, b=rate, domain="com.microsoft.")
    groups = groups_of(net(text))
    assert {name: size for name, (size, _) in groups.items()} == {
        "head": 2,
        "query head of each key-value head": 2,
        "head dimension": 4,
        "head dimension of wv": 3,
    }
    assert (("wd", 1) in groups["head dimension"][1]) == (decay == 8)
    assert ("s", 1) in groups["head"][1]
    check_exact(net(text))


def test_linear_attention_of_ai_onnx() -> None:
    newest = LINEAR.format(g=8, b=2, domain="")
    assert groups_of(net(newest, 27)) == groups_of(net(LINEAR.format(g=8, b=2, domain="com.microsoft.")))
