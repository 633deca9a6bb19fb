"""What cannot be followed stays, for a reason in words."""

from __future__ import annotations

import pytest

from spa_compiler.analysis.rules import opaque
from tests.analysis.exactness import check_exact
from tests.analysis.told import group_members, pins_of, weighted


def between(lines: str) -> str:
    """`lines` make b from a, with 6 channels in the last axis."""
    return f"""g (float[3, 5] x, bool xb, float[5, 6] u, float[6, 2] v) => (float[N, 2] y) {{
      a = MatMul(x, u)
      {lines}
      y = MatMul(b, v)
    }}"""


@pytest.mark.parametrize(
    "op, lines",
    [
        ("If", "b = If(xb) <then_branch = t () => (o) { o = Neg(a) }, else_branch = e () => (p) { p = Abs(a) }>"),
        ("SequenceConstruct", "i = Constant <value = int64 {0}> ()\n s = SequenceConstruct(a)\n b = SequenceAt(s, i)"),
        ("Unique", "n = Unique(a)\n b = Identity(a)"),
        ("NonZero", "n = NonZero(a)\n b = Identity(a)"),
    ],
)
def test_pins(op: str, lines: str) -> None:
    assert group_members(between(lines)) == []
    assert ("a", 1, op, opaque.OPAQUE[op]) in pins_of(between(lines))


BATCHED = """g (float[3, 16, 2] x, float[2, 6] u, float[6, 2] v) => (float[3, 2] y, float[3, 2] z) {
  a = MatMul(x, u)
  t = Transpose <perm = [0, 2, 1]> (a)
  shape = Constant <value = int64[4] {0, 0, 4, 4}> ()
  m = Reshape(t, shape)
  d = Det(m)
  y = MatMul(d, v)
  shape2 = Constant <value = int64[4] {0, 0, 16, 1}> ()
  s = Reshape(t, shape2)
  axis = Constant <value = int64 {2}> ()
  f = DFT(s, , axis)
  axes = Constant <value = int64[2] {2, 3}> ()
  square = ReduceSumSquare <keepdims = 0> (f, axes)
  z = MatMul(square, v)
}"""


def test_batches_of_determinants_and_transforms_pass() -> None:
    (members,) = group_members(BATCHED)
    assert {("u", 1), ("t", 1), ("m", 1), ("d", 1), ("s", 1), ("f", 1), ("v", 0)} <= members
    assert check_exact(weighted(BATCHED)) == 1


def test_reasons_are_words() -> None:
    reasons = [*opaque.OPAQUE.values(), *opaque.DOMAINS.values()]
    assert all(reason and reason[0].islower() and not reason.endswith(".") for reason in reasons)
