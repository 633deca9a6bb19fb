"""Element-wise operators: axes that meet are joined, constants and gates included; size 1 couples nothing."""

from __future__ import annotations

import onnx.defs
import pytest

from spa_compiler.analysis.rules import RULES, elementwise
from tests.analysis.told import analysis_of, group_members


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
    analysis = analysis_of("""g (float[N, 4] x, float[N, M] x2, float[4, 6] w, float[6, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      b = Add(a, x2)
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


def test_the_table_names_operators_that_exist() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(RULES) <= known
    assert set(elementwise.RULES) <= set(RULES)
