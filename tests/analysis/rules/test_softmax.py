"""Softmax and its kin: what is normalized over stays, all other axes pass."""

from __future__ import annotations

import pytest

from spa_compiler.analysis.rules.softmax import REASON
from tests.analysis.exactness import check_exact
from tests.analysis.told import analysis_of, reasons_of, removable, weighted

HEADS = """g (float[2, 5, 8] x, float[8, 12] wq, float[8, 12] wk, float[4, 1, 1] s, float[4, 5, 3] wo) => (float[2, 4, 5, 3] y) {{
  split = Constant <value = int64[4] {{2, 5, 4, 3}}> ()
  q0 = MatMul(x, wq)
  q1 = Reshape(q0, split)
  q = Transpose <perm = [0, 2, 1, 3]> (q1)
  k0 = MatMul(x, wk)
  k1 = Reshape(k0, split)
  k = Transpose <perm = [0, 2, 3, 1]> (k1)
  t = MatMul(q, k)
  m = Mul(t, s)
  p = {} (m)
  z = MatMul(p, wo)
  y = Neg(z)
}}"""


def channels(op: str) -> str:
    return f"""g (float[2, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[4, 6, 1, 1] w1) => (float[2, 4, 4, 4] y) {{
      a = Conv(x, w0)
      b = {op} (a)
      y = Conv(b, w1)
    }}"""


@pytest.mark.parametrize("opset", [7, 11, 13, 21])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
def test_the_axis_stays(op: str, opset: int) -> None:
    analysis = analysis_of(channels(f"{op} <axis = 1>"), opset)
    assert removable(analysis) == set()
    assert REASON in reasons_of(analysis, "a", 1)


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("op", ["Softmax <axis = 3>", "LogSoftmax <axis = 2>", "Hardmax <axis = -1>"])
def test_channels_pass(op: str, opset: int) -> None:
    text = channels(op)
    assert removable(analysis_of(text, opset)) == {("w0", 0), ("w1", 1)}
    assert check_exact(weighted(text, opset)) == 1


def test_the_default_axis_moved_to_the_end() -> None:
    assert removable(analysis_of(channels("Softmax"), 12)) == set()
    assert removable(analysis_of(channels("Softmax"), 13)) == {("w0", 0), ("w1", 1)}


def test_old_ones_flatten_what_follows() -> None:
    assert removable(analysis_of(channels("Softmax <axis = 0>"), 12)) == set()
    assert removable(analysis_of(channels("Softmax <axis = 0>"), 13)) == {("w0", 0), ("w1", 1)}


@pytest.mark.parametrize("opset", [12, 13])
def test_head_dimensions_pass(opset: int) -> None:
    text = HEADS.format("Softmax <axis = -1>")
    assert {("wq", 1), ("wk", 1)} <= removable(analysis_of(text, opset))
    assert check_exact(weighted(text, opset))
