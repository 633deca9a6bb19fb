"""Element-wise operators: axes that meet are joined, constants and gates included; size 1 couples nothing."""

from __future__ import annotations

import pytest

from spa_compiler.analysis.rules import elementwise
from tests.analysis.exactness import check_exact
from tests.analysis.told import analysis_of, group_members, weighted


def between(lines: str, weights: str = "") -> str:
    """`lines` make b from a, with 6 channels in the last axis."""
    return f"""g (float[N, 5, 4] x, float[4, 6] w{weights}, float[6, 2] v) => (float[N, 5, 2] y) {{
      a = MatMul(x, w)
      {lines}
      y = MatMul(b, v)
    }}"""


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Erf", "Gelu", "Identity", "Dropout", "LeakyRelu", "HardSwish"])
def test_unary(op: str) -> None:
    assert group_members(between(f"b = {op}(a)")) == [{("w", 1), ("a", 2), ("b", 2), ("v", 0)}]


def test_cast_and_clip() -> None:
    lines = """lo = Constant <value_float = 0.0> ()
      c = Clip(a, lo)
      d = Cast <to = 11> (c)
      b = CastLike(d, lo)"""
    assert group_members(between(lines)) == [{("w", 1), ("a", 2), ("c", 2), ("d", 2), ("b", 2), ("v", 0)}]


@pytest.mark.parametrize("shape, axis", [("6", 0), ("5, 6", 1), ("1, 1, 6", 2)])
@pytest.mark.parametrize("operands", ["a, s", "s, a"])
def test_constants_follow(shape: str, axis: int, operands: str) -> None:
    members = group_members(between(f"b = Add({operands})", f", float[{shape}] s"))
    assert members == [{("w", 1), ("a", 2), ("s", axis), ("b", 2), ("v", 0)}]


@pytest.mark.parametrize("shape", ["1", "5, 1", "1, 1, 1"])
def test_size_one_couples_nothing(shape: str) -> None:
    assert group_members(between("b = Mul(a, s)", f", float[{shape}] s")) == [{("w", 1), ("a", 2), ("b", 2), ("v", 0)}]


def test_a_broadcast_activation_takes_the_wide_axis() -> None:
    lines = """s = MatMul(x, u)
      b = Mul(s, t)"""
    members = group_members(between(lines, ", float[4, 1] u, float[6] t"))
    assert {("t", 0), ("b", 2), ("v", 0)} in members


def test_gates_and_residuals_join() -> None:
    lines = """g = MatMul(x, u)
      h = Tanh(g)
      m = Mul(a, h)
      b = Sum(m, a, g)"""
    (members,) = group_members(between(lines, ", float[4, 6] u"))
    assert {("w", 1), ("u", 1), ("v", 0)} <= members


def test_where_joins_all_three() -> None:
    lines = """c = Greater(a, t)
      b = Where(c, a, s)"""
    (members,) = group_members(between(lines, ", float[6] t, float[1, 6] s"))
    assert {("w", 1), ("t", 0), ("s", 1), ("c", 2), ("v", 0)} <= members


def test_an_axis_of_unknown_size_pins_what_it_meets() -> None:
    analysis = analysis_of("""g (float[N, 4] x, bool[6] x_some, float[6] s, float[4, 6] w, float[6, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      c = Compress <axis = 0> (s, x_some)
      b = Add(a, c)
      y = MatMul(b, v)
    }""")
    assert analysis.groups == ()
    assert any(
        pin.op == "Add" and pin.reason == "meets an axis of unknown size" and pin.params for pin in analysis.pins
    )


def test_training_dropout_pins() -> None:
    analysis = analysis_of(
        between("r = Constant <value_float = 0.5> ()\n t = Cast <to = 9> (r)\n b = Dropout(a, r, t)")
    )
    assert analysis.groups == ()
    assert {pin.reason for pin in analysis.pins if pin.op == "Dropout"} == {"dropout that may be in training mode"}


TRUTH = "half = Constant <value_float = 0.5> ()\n c = Greater(p, half)\n"
TRUTHS = TRUTH + "d = Greater(w, half)\n"
CODE = "c = Cast <to = 2> (p)\n"  # uint8
CODES = CODE + "d = Cast <to = 2> (w)\n"
BACK = "\n b = Cast <to = 1> (e)"

LINES = {
    "Acosh": "p1 = Exp(p)\n b = Acosh(p1)",
    "BitShift": CODES + 'e = BitShift <direction = "LEFT"> (c, d)' + BACK,
    "BitwiseNot": CODE + "e = BitwiseNot(c)" + BACK,
    "CastLike": "b = CastLike(p, a)",
    "Cast": "e = Cast <to = 11> (a)" + BACK,
    "IsInf": "e = IsInf(a)" + BACK,
    "IsNaN": "e = IsNaN(a)" + BACK,
    "Mod": "b = Mod <fmod = 1> (a, w)",
    "Not": TRUTH + "e = Not(c)" + BACK,
    "Where": TRUTH + "b = Where(c, w, a)",
    **{op: TRUTHS + f"e = {op}(c, d)" + BACK for op in ("And", "Or", "Xor")},
    **{op: CODES + f"e = {op}(c, d)" + BACK for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")},
    **{op: f"e = {op}(a, w)" + BACK for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
}
"""Operators that do not take floats, or not all, or make none; p is between 0 and 1."""

NOT_IN_ONNX_RUNTIME = {"BitCast", "SwiGLU"}


@pytest.mark.parametrize("op", sorted(set(elementwise.RULES) - NOT_IN_ONNX_RUNTIME))
def test_cut_is_masked(op: str) -> None:
    wide = elementwise.RULES[op] is elementwise.nary
    lines = LINES.get(op, f"b = {op}({'p, w' if wide else 'p'})")
    opset = 24
    text = f"""net (float[3, 5, 4] x, float[4, 6] u, float[6] w, float[6, 2] v) => (float[3, 5, 2] y) {{
      a = MatMul(x, u)
      p = Sigmoid(a)
      {lines}
      y = MatMul(b, v)
    }}"""
    model = weighted(text, opset)
    assert check_exact(model, seeds=(0,), ratios=(0.5,)) == 1
    if wide:
        assert any(("w", 0) in members and ("u", 1) in members for members in group_members(analysis_of(text, opset)))


def test_newest() -> None:
    gate = between("g = MatMul(x, s)\n b = SwiGLU(a, g)", ", float[4, 6] s")
    bits = between("c = BitCast <to = 6> (s)\n d = BitCast <to = 1> (c)\n b = Add(a, d)", ", float[1, 6] s")
    for text in (gate, bits):
        assert any({("w", 1), ("s", 1), ("v", 0)} <= members for members in group_members(analysis_of(text, opset=28)))


@pytest.mark.parametrize("opset", [7, 9, 11, 13])
def test_old_opsets(opset: int) -> None:
    limit = "a0 = Constant <value = float {0.5}> ()\n c = Clip(a, , a0)"
    clip = "c = Clip <min = -0.5, max = 0.5> (a)" if opset < 11 else limit
    text = between(f"{clip}\n d, m = Dropout(c)\n b = PRelu(d, s)", ", float[5, 6] s")
    (members,) = group_members(analysis_of(text, opset))
    assert {("w", 1), ("c", 2), ("d", 2), ("s", 1), ("v", 0)} <= members
    assert check_exact(weighted(text, opset)) == 1
