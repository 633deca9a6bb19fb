"""ONNX Runtime's attentions: they agree with ai.onnx's, in every layout of queries, keys and values."""

from __future__ import annotations

import pytest

from spa_compiler.analysis.cut import cut, removed_slabs
from tests.analysis.exactness import FLOOR, Subject, check_each_unit, check_exact, differences, outputs
from tests.analysis.told import groups_of, net, pins_inside, reasons_of

SLOT = "query head of each key-value head"
WITH_SCORES = ("y = MatMul(a, wo)", "z = MatMul(a, wo)\n  t = ReduceSum(s)\n  y = Add(z, t)")


def sizes_of(text: str) -> dict[str, int]:
    return {name: size for name, (size, _) in groups_of(net(text)).items()}


ATTENTION = """g (float[2, 5, 6] x, float[6, 7] w0, float[7, 33] w, float[33] b, float[3, 5, 5] m, float[15, 2] wo)
    => (float[2, 5, 2] y) {
  h = MatMul(x, w0)
  one = Constant <value = int64[1] {0}> ()
  m4 = Unsqueeze(m, one)
  a = com.microsoft.Attention <num_heads = 3, qkv_hidden_sizes = [9, 9, 15]> (h, w, b, , , m4)
  y = MatMul(a, wo)
}"""


def test_attention() -> None:
    groups = groups_of(net(ATTENTION))
    assert groups["head"] == (3, {("w", 1), ("b", 0), ("m", 0), ("m4", 1), ("a", 2), ("wo", 0)})
    assert groups["head dimension"] == (5, {("w", 1), ("b", 0), ("a", 2), ("wo", 0)})
    assert groups["channel"] == (7, {("w0", 1), ("h", 2), ("w", 0)})
    assert len(groups) == 3
    inside = "computed and used inside of the operator, where no activation can be masked"
    assert pins_inside(net(ATTENTION)) == {("w", 1, "Attention", inside)}
    check_exact(net(ATTENTION))
    check_each_unit(net(ATTENTION))


def test_attention_of_equal_sizes_gets_to_name_them() -> None:
    text = ATTENTION.replace("num_heads = 3, qkv_hidden_sizes = [9, 9, 15]", "num_heads = 3")
    text = text.replace("33", "45")
    assert groups_of(net(text))["head dimension"][0] == 5
    check_exact(net(text))


def test_attention_with_a_cache_keeps_its_heads() -> None:
    text = ATTENTION.replace("a = com", "a, xp = com").replace("[9, 9, 15]", "[15, 15, 15]").replace("33", "45")
    text = text.replace("=> (", "=> (float[2, 2, 3, 5, 5] xp, ")
    assert sizes_of(text) == {"channel": 7}
    one_size = "the kernel wants one size for all heads of queries, keys and values"
    assert one_size in reasons_of(net(text), "w", 1)
    assert one_size not in reasons_of(net(ATTENTION), "w", 1)
    check_exact(net(text))


def test_a_past_of_keys_and_values_in_one_tensor_keeps_their_size() -> None:
    text = ATTENTION.replace("float[15, 2] wo", "float[15, 2] wo, float[2, 2, 3, 4, 5] past")
    text = text.replace("[9, 9, 15]", "[15, 15, 15]").replace("33", "45").replace("(h, w, b, , ,", "(h, w, b, , past,")
    assert "the kernel wants one size for all heads of queries, keys and values" in reasons_of(net(text), "w", 1)
    assert groups_of(net(text))["head"][1] >= {("w", 1), ("past", 2)}


MULTI_HEAD = """g (float[2, 5, 6] x, float[2, 7, 6] xt, float[6, 12] wq, float[6, 12] wk, float[6, 15] wv, float[39] b,
    float[1, 3, 5, 7] m, float[15, 2] wo) => (float[2, 5, 2] y) {
  q = MatMul(x, wq)
  k = MatMul(xt, wk)
  v = MatMul(xt, wv)
  a = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v, b, , m)
  y = MatMul(a, wo)
}"""


def test_multi_head_attention() -> None:
    assert groups_of(net(MULTI_HEAD)) == {
        "head": (
            3,
            {("wq", 1), ("wk", 1), ("wv", 1), ("q", 2), ("k", 2), ("v", 2), ("b", 0), ("m", 1), ("a", 2), ("wo", 0)},
        ),
        "head dimension": (4, {("wq", 1), ("wk", 1), ("q", 2), ("k", 2), ("b", 0)}),
        "head dimension of wv": (5, {("wv", 1), ("v", 2), ("b", 0), ("a", 2), ("wo", 0)}),
    }
    check_exact(net(MULTI_HEAD))
    check_each_unit(net(MULTI_HEAD))


def test_multi_head_attention_without_bias_is_attention() -> None:
    fused = MULTI_HEAD.replace("(q, k, v, b, , m)", "(q, k, v)")
    plain = fused.replace(
        "com.microsoft.MultiHeadAttention <num_heads = 3>", "Attention <q_num_heads = 3, kv_num_heads = 3>"
    )
    assert groups_of(net(fused)) == groups_of(net(plain))
    ours, theirs = Subject(net(fused)), Subject(net(plain))
    removed = {group.id: [0] for group in ours.analysis.groups}
    gone = [removed_slabs(subject.analysis, removed)[0] for subject in (ours, theirs)]
    assert {place: list(at) for place, at in gone[0].items()} == {place: list(at) for place, at in gone[1].items()}
    feeds = ours.example(0)
    small = [outputs(cut(subject.model, subject.analysis, removed), feeds) for subject in (ours, theirs)]
    assert differences(*small)["y"] < FLOOR["float32"]


def test_a_bias_on_new_keys_alone_keeps_the_size_of_a_key() -> None:
    text = """g (float[2, 5, 6] x, float[6, 12] wq, float[6, 12] wk, float[6, 12] wv, float[36] b, float[2, 3, 4, 4] pk,
        float[2, 3, 4, 4] pv, float[12, 2] wo) => (float[2, 5, 2] y) {
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      v = MatMul(x, wv)
      a, ck, cv = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v, b, , , pk, pv)
      y = MatMul(a, wo)
    }"""
    assert sizes_of(text) == {"head": 3}
    assert "a bias on some of the keys" in reasons_of(net(text), "q", 2)
    check_exact(net(text))
    free = text.replace("(q, k, v, b,", "(q, k, v, ,")
    assert sizes_of(free) == {"head": 3, "head dimension": 4}
    check_exact(net(free))


def test_scores_that_are_given_out_show_the_bias() -> None:
    """A constant that is nothing to Softmax is something to those who read the scores; heads go from them, too."""
    text = MULTI_HEAD.replace("  a = com", "  a, , , s = com").replace(*WITH_SCORES)
    assert sizes_of(text) == {"head": 3, "head dimension": 5}
    assert groups_of(net(text))["head"][1] >= {("wq", 1), ("wk", 1), ("wv", 1), ("s", 1)}
    assert sizes_of(text.replace("(q, k, v, b, , m)", "(q, k, v, , , m)"))["head dimension"] == 4


def test_keys_and_values_from_another_sequence_share_their_size() -> None:
    text = """g (float[2, 5, 6] x, float[2, 1, 7, 6] xt, float[6, 12] wq, float[3, 6, 4] wk, float[3, 6, 4] wv,
        float[12, 2] wo) => (float[2, 5, 2] y) {
      q = MatMul(x, wq)
      k = MatMul(xt, wk)
      v = MatMul(xt, wv)
      a = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v)
      y = MatMul(a, wo)
    }"""
    groups = groups_of(net(text))
    assert sizes_of(text) == {"head": 3, "head dimension": 4}
    assert groups["head dimension"][1] >= {("wq", 1), ("wk", 2), ("wv", 2), ("wo", 0)}
    check_exact(net(text))


@pytest.mark.parametrize("parts", [2, 3])
def test_packed_keys_and_values_share_their_size(parts: int) -> None:
    rest = {2: "q, k", 3: "k"}[parts]
    text = f"""g (float[2, 5, 6] x, float[6, 12] wq, float[6, {12 * parts}] w, float[12, 2] wo) => (float[2, 5, 2] y) {{
      q = MatMul(x, wq)
      k0 = MatMul(x, w)
      shape = Constant <value = int64[5] {{2, 5, 3, {parts}, 4}}> ()
      k = Reshape(k0, shape)
      a = com.microsoft.MultiHeadAttention <num_heads = 3> ({rest})
      y = MatMul(a, wo)
    }}"""
    assert groups_of(net(text))["head"][1] >= {("w", 1), ("k0", 2), ("k", 2), ("a", 2), ("wo", 0)}
    assert groups_of(net(text))["head dimension"][1] >= {("w", 1), ("k0", 2), ("k", 4), ("a", 2), ("wo", 0)}


GROUP_QUERY = """g (float[1, 4, 6] x, float[6, 64] wq, float[6, 16] wk, float[6, 16] wv, float[1, 8, 4, 4] m,
    float[64, 2] wo) => (float[1, 4, 2] y) {
  lengths = Constant <value = int32[1] {3}> ()
  total = Constant <value = int32 {4}> ()
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  a, ck, cv = com.microsoft.GroupQueryAttention <num_heads = 8, kv_num_heads = 2> (
    q, k, v, , , lengths, total, , , , m)
  y = MatMul(a, wo)
}"""


def test_group_query_attention() -> None:
    groups = groups_of(net(GROUP_QUERY))
    assert {name: size for name, (size, _) in groups.items()} == {"head": 2, SLOT: 4}
    assert groups["head"][1] >= {("wq", 1), ("wk", 1), ("wv", 1), ("m", 1), ("a", 2), ("wo", 0), ("ck", 1), ("cv", 1)}
    assert groups[SLOT][1] == {("wq", 1), ("q", 2), ("m", 1), ("a", 2), ("wo", 0)}
    assert "the kernel wants one size for all heads of queries, keys and values" in reasons_of(net(GROUP_QUERY), "q", 2)
    check_exact(net(GROUP_QUERY))
    check_each_unit(net(GROUP_QUERY))


def test_a_cache_and_scores_of_grouped_queries_lose_heads() -> None:
    """Keys and values that are stored as codes have a scale for each element of a head."""
    text = GROUP_QUERY.replace(
        "float[64, 2] wo",
        "float[64, 2] wo, int8[1, 2, 4, 8] pk, int8[1, 2, 4, 8] pv, float[1, 2, 1, 8] ks, float[1] vs",
    )
    text = text.replace(
        "(\n    q, k, v, , , lengths, total, , , , m)", "(q, k, v, pk, pv, lengths, total, , , , m, , ks, vs)"
    )
    text = text.replace("a, ck, cv =", "a, ck, cv, s =").replace(*WITH_SCORES)
    groups = groups_of(net(text))
    assert groups["head"][1] >= {("pk", 1), ("pv", 1), ("ks", 1), ("ck", 1), ("cv", 1), ("s", 1), ("wo", 0)}
    assert not {("vs", 0), ("vs", 1), ("ks", 3), ("pk", 3)} & {
        place for _, members in groups.values() for place in members
    }
    assert groups[SLOT][1] >= {("wq", 1), ("s", 1), ("wo", 0)}


def test_packed_group_query_attention_with_rotation() -> None:
    text = """g (float[1, 4, 6] x, float[6, 192] w, float[9, 8] cos, float[9, 8] sin, float[8] sink, float[128, 2] wo)
        => (float[1, 4, 2] y) {
      lengths = Constant <value = int32[1] {3}> ()
      total = Constant <value = int32 {4}> ()
      q = MatMul(x, w)
      a, ck, cv = com.microsoft.GroupQueryAttention <num_heads = 8, kv_num_heads = 2, do_rotary = 1> (
        q, , , , , lengths, total, cos, sin, , , sink)
      y = MatMul(a, wo)
    }"""
    assert sizes_of(text) == {"head": 2, SLOT: 4}
    assert groups_of(net(text))[SLOT][1] == {("w", 1), ("q", 2), ("sink", 0), ("a", 2), ("wo", 0)}
    check_exact(net(text))


def test_a_cache_at_the_interface_keeps_the_key_value_heads() -> None:
    text = GROUP_QUERY.replace("=> (", "=> (float[1, 2, 4, 8] ck, ")
    assert sizes_of(text) == {SLOT: 4}
    check_exact(net(text))


@pytest.mark.parametrize("named", ["", "num_heads = 2, rotary_embedding_dim = 6, "])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(named: str, interleaved: int) -> None:
    width = 10 if named else 6
    text = f"""g (float[2, 4, 6] x, float[6, {2 * width}] w, float[9, 3] cos, float[9, 3] sin, float[{2 * width}, 2] wo)
        => (float[2, 4, 2] y) {{
      p = Constant <value = int64[2, 4] {{0, 1, 2, 3, 2, 3, 4, 5}}> ()
      h = MatMul(x, w)
      r = com.microsoft.RotaryEmbedding <{named}interleaved = {interleaved}> (h, p, cos, sin)
      y = MatMul(r, wo)
    }}"""
    rest = {"head dimension": 4} if named else {}
    assert sizes_of(text) == {"head": 2, "rotary pair": 3, **rest}
    assert groups_of(net(text))["rotary pair"][1] == {("w", 1), ("h", 2), ("r", 2), ("cos", 1), ("sin", 1), ("wo", 0)}
    check_exact(net(text))


def test_relative_position_bias() -> None:
    text = """g (float[2, 5, 6] x, float[6, 24] w, float[24] b, float[8, 2] table, float[8, 2] wo) => (float[2, 5, 2] y) {
      length = Constant <value = int64 {5}> ()
      m = com.microsoft.RelativePositionBias <max_distance = 8> (table, length, length)
      a = com.microsoft.Attention <num_heads = 2> (x, w, b, , , m)
      y = MatMul(a, wo)
    }"""
    assert groups_of(net(text))["head"] == (2, {("table", 1), ("m", 1), ("w", 1), ("b", 0), ("a", 2), ("wo", 0)})


def test_a_gated_relative_position_bias() -> None:
    """Heads go from the gate and from the attention that it biases; what a head holds stays inside of the gate."""
    text = """g (float[2, 5, 6] x, float[6, 6] wq, float[6] bq, float[1, 2, 5, 5] table, float[3, 8] gate, float[8] added,
        float[1, 2, 1, 1] scale, float[6, 24] w, float[24] b, float[8, 2] wo) => (float[2, 5, 2] y)
        <float[2, 2, 5, 5] m> {
      q = MatMul(x, wq)
      m = com.microsoft.GatedRelativePositionBias <num_heads = 2> (q, bq, table, gate, added, scale)
      a = com.microsoft.Attention <num_heads = 2> (x, w, b, , , m)
      y = MatMul(a, wo)
    }"""
    groups = groups_of(net(text))
    gate = {("wq", 1), ("q", 2), ("bq", 0), ("table", 1), ("scale", 1), ("m", 1)}
    assert groups["head"] == (2, {*gate, ("w", 1), ("b", 0), ("a", 2), ("wo", 0)})
    assert [name for name, (_, members) in groups.items() if ("wq", 1) in members] == ["head"]
    inside = "computed and used inside of the operator, where no activation can be masked"
    assert inside in reasons_of(net(text), "q", 2)
    assert inside in reasons_of(net(text), "gate", 0)
