"""Gemm and MatMul: which axes hang together, for every layout of the operands."""

from __future__ import annotations

import pytest

from spa_compiler.analysis import analyze
from spa_compiler.graph.load import load
from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, group_members, pins_of, weighted


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["5", "1, 5"])
def test_gemm(transposed: int, bias: str) -> None:
    shape = "5, 4" if transposed else "4, 5"
    members = group_members(f"""g (float[N, 4] x, float[{shape}] w, float[{bias}] b, float[5, 2] v)
        => (float[N, 2] y) {{
      h = Gemm <transB = {transposed}> (x, w, b)
      y = Gemm(h, v)
    }}""")
    bias_axis = len(bias.split(",")) - 1
    assert members == [{("w", 1 - transposed), ("b", bias_axis), ("h", 1), ("v", 0)}]


def test_gemm_transposed_left() -> None:
    members = group_members("""g (float[4, 6] x, float[4, 5] w, float[6, 3] v) => (float[5, 3] y) {
      h = Gemm <transA = 1> (w, x)
      y = MatMul(h, v)
    }""")
    assert members == []  # 4 and 6 come from the input, 5 is the output's
    members = group_members("""g (float[4, 6] x, float[8, 4] w, float[8, 5] v) => (float[5, 6] y) {
      h = MatMul(w, x)
      y = Gemm <transA = 1> (v, h)
    }""")
    assert members == [{("w", 0), ("h", 0), ("v", 0)}]


def test_scalar_bias_couples_nothing() -> None:
    members = group_members("""g (float[N, 4] x, float[4, 5] w, float[1] b, float[5, 2] v) => (float[N, 2] y) {
      h = Gemm(x, w, b)
      y = Gemm(h, v)
    }""")
    assert members == [{("w", 1), ("h", 1), ("v", 0)}]


def test_matmul_of_two_activations_carries_the_coupling() -> None:
    members = group_members("""g (float[N, 5, 6] x, float[6, 8] q, float[6, 8] k, float[5, 3] o) => (float[N, 5, 3] y) {
      a = MatMul(x, q)
      b = MatMul(x, k)
      c = Transpose <perm = [0, 2, 1]> (b)
      s = MatMul(a, c)
      y = MatMul(s, o)
    }""")
    assert members == [{("q", 1), ("k", 1), ("a", 2), ("b", 2), ("c", 1)}]


def test_batch_axes_are_joined() -> None:
    members = group_members("""g (float[7, 4] x, float[6, 4, 5] w, float[6, 5, 3] v, float[2, 6] u0,
        float[3, 1, 1] u1)
        => (float[3, 7, 2] y) {
      a = MatMul(x, w)
      b = MatMul(a, v)
      c = Transpose <perm = [2, 1, 0]> (b)
      u = Mul(u0, u1)
      d = Transpose <perm = [0, 2, 1]> (u)
      y = MatMul(c, d)
    }""")
    assert {("w", 0), ("v", 0), ("a", 0), ("b", 0), ("c", 2), ("u0", 1), ("u", 2), ("d", 1)} in members
    assert {("w", 2), ("v", 1), ("a", 2)} in members


def test_vectors() -> None:
    members = group_members("""g (float[4, 6] x, float[6, 8] w, float[8] v) => (float[4] y) {
      h = MatMul(x, w)
      y = MatMul(h, v)
    }""")
    assert members == [{("w", 1), ("h", 1), ("v", 0)}]


def test_macs_count_one_sample() -> None:
    text = """g (float[{batch}, 4] x, float[4, 5] w, float[5, 2] v) => (float[{batch}, 2] y) {{
      h = MatMul(x, w)
      y = Gemm(h, v)
    }}"""
    assert analysis_of(text.format(batch="N")).groups[0].macs == 4 * 5 + 5 * 2
    assert analysis_of(text.format(batch=3)).groups[0].macs == 3 * (4 * 5 + 5 * 2)


def test_macs_of_an_open_sequence_are_those_of_the_sizes_chosen() -> None:
    text = """g (float[N, S, 4] x, float[4, 5] w, float[5, 2] v) => (float[N, S, 2] y) {
      h = MatMul(x, w)
      y = MatMul(h, v)
    }"""
    analysis = analyze(load(weighted(text)), {"x": [2, 9, 4]})
    assert analysis.groups[0].macs == 9 * (4 * 5 + 5 * 2)


def test_a_weight_between_input_and_output_is_pinned() -> None:
    text = "g (float[N, 4] x, float[4, 5] w) => (float[N, 5] y) { y = MatMul(x, w) }"
    assert pins_of(text) >= {("x", 1, "graph input", "interface"), ("y", 1, "graph output", "interface")}
    holding = {(pin.tensor, pin.axis, pin.params) for pin in analysis_of(text).pins if pin.params}
    assert holding >= {("x", 1, 20), ("y", 1, 20)}
    assert all(axis == 1 for _, axis, _ in holding)


def test_an_open_inner_size_is_bound_to_what_fits() -> None:
    members = group_members("""g (float[N, K] x, float[4, 6] w, float[6, 5] v) => (float[N, 5] y) {
      h = MatMul(x, w)
      y = MatMul(h, v)
    }""")
    assert members == [{("w", 1), ("h", 1), ("v", 0)}]


def test_heads_are_named() -> None:
    """In a product of two computed tensors, what lies between the batch and the matrices are heads."""
    groups = analysis_of("""g (float[N, 5, 6] x, float[6, 4, 3] q, float[6, 4, 3] k, float[5, 2] o, float[4, 1, 1] s)
        => (float[N, 1, 5, 2] y) {
      eq = Einsum <equation = "nsc,chd->nhsd"> (x, q)
      ek = Einsum <equation = "nsc,chd->nhds"> (x, k)
      a = MatMul(eq, ek)
      b = Mul(a, s)
      axes = Constant <value_ints = [1]> ()
      c = ReduceSum(b, axes)
      y = MatMul(c, o)
    }""").groups
    assert sorted((group.granularity, group.size) for group in groups) == [("head", 4), ("head dimension", 3)]


@pytest.mark.parametrize(
    "text",
    [
        """g (float[N, 4] x, float[{rows}, {columns}] w, float[5] b, float[5, 2] v) => (float[N, 2] y) {{
          h = Gemm <transB = {transposed}> (x, w, b)
          y = Gemm(h, v)
        }}""",
        """g (float[{columns}, 3] x0, float[3, 4] x, float[4, 6] k, float[6, 5] w, float[5] v) => (float[3] y) {{
          h = MatMul(x, k)
          i = MatMul(h, w)
          y = MatMul(i, v)
        }}""",
        """g (float[7, 4] x, float[6, 4, {columns}] w, float[6, {columns}, 3] v, float[6, 1, 1] s)
            => (float[1, 7, 3] y) {{
          a = MatMul(x, w)
          r = Exp(a)
          b = MatMul(r, v)
          c = Mul(b, s)
          axes = Constant <value_ints = [0]> ()
          y = ReduceSum(c, axes)
        }}""",
    ],
)
@pytest.mark.parametrize("transposed", [0, 1])
def test_cut_equals_masked(text: str, transposed: int) -> None:
    rows, columns = (5, 4) if transposed else (4, 5)
    model = weighted(text.format(rows=rows, columns=columns, transposed=transposed))
    assert check_exact(model, seeds=(0,))
    assert check_each_unit(model)


@pytest.mark.parametrize(
    "line, shape",
    [
        ("MatMul(w, b)", "8, 5"),
        ("Gemm <transB = 1> (w, b)", "5, 8"),
        ('Einsum <equation = "ij,kj->ik"> (w, b)', "5, 8"),
    ],
)
def test_a_sum_over_stored_values_stays_whole(line: str, shape: str) -> None:
    """No mask reaches the product of two weights, even where an activation has the axis that it is summed over."""
    text = f"""g (float[3, 5] x, float[5, 8] w, float[{shape}] b, float[8, 2] c, float[5, 2] d) => (float[3, 2] y) {{
      h = MatMul(x, w)
      z = MatMul(h, c)
      p = {line}
      u = MatMul(x, p)
      t = MatMul(u, d)
      y = Add(z, t)
    }}"""
    assert group_members(text) == [{("b", shape.split(", ").index("5")), ("p", 1), ("u", 1), ("d", 0)}]
    assert "summed over stored values" in {reason for *_, reason in pins_of(text)}
    assert check_exact(weighted(text)) == 1
