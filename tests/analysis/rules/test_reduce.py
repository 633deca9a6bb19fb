"""Reductions: sums lose zeros, means keep their old count, and axes in which a zero takes part stay."""

from __future__ import annotations

import pytest

from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, reasons_of, removable, weighted

ENDS = {("w0", 0), ("w1", 1)}
EXACT = ["ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMean"]
EXTREMES = ["ReduceMax", "ReduceMin"]
ZERO_COUNTS = ["ReduceProd", "ReduceLogSumExp"]


def call(op: str, axes: str, opset: int, *, keepdims: int = 1) -> str:
    """r = the reduction of p, as the opset writes it."""
    if opset < (13 if op == "ReduceSum" else 18):
        return f"r = {op} <axes = [{axes}], keepdims = {keepdims}> (p)"
    count = axes.count(",") + 1
    return f"""over = Constant <value = int64[{count}] {{{axes}}}> ()
      r = {op} <keepdims = {keepdims}> (p, over)"""


def gated(lines: str, weights: str = "", size: str = "4, 4") -> str:
    """Positive p of 6 channels; `lines` make r of it, which broadcasts with it."""
    return f"""g (float[2, 3, {size}] x, float[6, 3, 1, 1] w0, float[6] b0{weights}, float[4, 6, 1, 1] w1)
         => (float[2, 4, {size}] y) {{
      a = Conv(x, w0, b0)
      p = Softplus(a)
      {lines}
      m = Mul(p, r)
      y = Conv(m, w1)
    }}"""


@pytest.mark.parametrize("opset", [7, 11, 13, 18, 21])
@pytest.mark.parametrize("op", EXACT)
def test_over_channels(op: str, opset: int) -> None:
    text = gated(call(op, "1", opset))
    assert removable(analysis_of(text, opset)) == {*ENDS, ("b0", 0)}
    assert check_exact(weighted(text, opset), name=op)
    assert check_each_unit(weighted(text, opset), name=op)


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("op", [*EXACT, *EXTREMES, *ZERO_COUNTS])
def test_beside_channels(op: str, opset: int) -> None:
    text = gated(call(op, "2, -1", opset))
    assert removable(analysis_of(text, opset)) == {*ENDS, ("b0", 0)}
    assert check_exact(weighted(text, opset), name=op)


@pytest.mark.parametrize("opset", [8, 13, 18, 20])
@pytest.mark.parametrize("op", EXTREMES)
@pytest.mark.parametrize("sign", ["Softplus", "Neg"])
def test_an_extreme_knows_of_the_zero(op: str, opset: int, sign: str) -> None:
    """Of negative numbers the largest is the zero of a removed channel."""
    text = gated(call(op, "1", opset)).replace("p = Softplus(a)", f"q = Softplus(a)\n  p = {sign}(q)")
    assert removable(analysis_of(text, opset)) == {*ENDS, ("b0", 0)}
    assert check_exact(weighted(text, opset), name=op)


@pytest.mark.parametrize("op", EXTREMES)
def test_old_extremes_stay(op: str) -> None:
    analysis = analysis_of(gated(call(op, "1", 7)), 7)
    assert "a zero would take part in an extreme" in reasons_of(analysis, "p", 1)


@pytest.mark.parametrize("op", ZERO_COUNTS)
def test_a_zero_takes_part(op: str) -> None:
    analysis = analysis_of(gated(call(op, "1", 18)), 18)
    assert removable(analysis) == set()
    assert any(reason.startswith("a zero would take part in") for reason in reasons_of(analysis, "p", 1))


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("axes", ["1, 2", "0, 1, 2, 3"])
def test_over_channels_and_more(op: str, axes: str) -> None:
    text = gated(call(op, axes, 21))
    assert removable(text) >= ENDS
    assert check_exact(weighted(text), name=op)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceProd"])
def test_over_all_axes(op: str) -> None:
    text = gated(f"r = {op} <keepdims = 0> (p)")
    is_free = op != "ReduceProd"
    assert (removable(text) >= ENDS) == is_free
    assert bool(check_exact(weighted(text))) == is_free


def test_over_no_axis_at_all() -> None:
    text = gated("""none = Constant <value = int64[0] {}> ()
      r = ReduceMax <noop_with_empty_axes = 1> (p, none)""")
    assert removable(text) >= ENDS
    assert check_exact(weighted(text))


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
def test_dropped_axes(op: str) -> None:
    """Without keepdims the axes behind move up."""
    text = f"""g (float[2, 3, 4, 5] x, float[6, 3, 1, 1] w0, float[6, 7] w1, float[5, 3] w2)
         => (float[2, 7] y, float[2, 4, 3] z) {{
      a = Conv(x, w0)
      p = Softplus(a)
      positions = Constant <value = int64[2] {{2, 3}}> ()
      channels = Constant <value = int64[1] {{1}}> ()
      r = {op} <keepdims = 0> (p, positions)
      y = MatMul(r, w1)
      q = {op} <keepdims = 0> (p, channels)
      z = MatMul(q, w2)
    }}"""
    assert removable(text) == {("w0", 0), ("w1", 0)}
    assert check_exact(weighted(text)) == 1


def test_axes_that_are_known_only_when_the_model_runs() -> None:
    text = gated("r = ReduceSum(p, xa)").replace("] x,", "] x, int64[1] xa,")
    analysis = analysis_of(text)
    assert removable(analysis) == set()
    assert "reduces axes that are known only when the model runs" in reasons_of(analysis, "p", 1)


@pytest.mark.parametrize("op, is_free", [("ReduceMean", False), ("ReduceSum", True)])
def test_integers(op: str, is_free: bool) -> None:
    text = gated(f"""i = Cast <to = 7> (p)
      over = Constant <value = int64[1] {{1}}> ()
      s = {op} (i, over)
      r = Cast <to = 1> (s)""")
    analysis = analysis_of(text)
    assert (removable(analysis) >= ENDS) == is_free
    assert bool(check_exact(weighted(text))) == is_free


def test_a_mean_over_images_of_any_size() -> None:
    text = gated(call("ReduceMean", "1, 2, 3", 21), size="H, W")
    assert removable(text) >= ENDS
    assert check_exact(weighted(text))


DECOMPOSED = """g (float[N, 5, 3] x, float[3, 12] w0, float[12] s, float[12] c, float[12, 4] w1) => (float[N, 5, 4] y) {{
  a = MatMul(x, w0)
  two = Constant <value = float {{2.0}}> ()
  e = Constant <value = float {{0.1}}> ()
  {}
  f = Pow(d, two)
  v = ReduceMean <axes = [-1]> (f)
  t = Add(v, e)
  q = Sqrt(t)
  n = Div(d, q)
  o = Mul(n, s)
  b = Add(o, c)
  y = MatMul(b, w1)
}}"""


@pytest.mark.parametrize("lines", ["m = ReduceMean <axes = [-1]> (a)\n d = Sub(a, m)", "d = Identity(a)"])
def test_norms_in_pieces(lines: str) -> None:
    text = DECOMPOSED.format(lines)
    assert removable(analysis_of(text, 13)) == {("w0", 1), ("s", 0), ("c", 0), ("w1", 0)}
    assert check_exact(weighted(text, 13))


STORED = """g (float[2, 3, 6, 6] x, float[12, 3, 1, 1] w0, float[6, 12, 3, 3] w, float[6, 1, 1, 1] s, float[4, 6, 1, 1] w1)
     => (float[2, 4, 4, 4] y) {{
  a = Conv(x, w0)
  r = {} <axes = [1, 2, 3]> (w)
  n = Div(w, r)
  k = Mul(n, s)
  d = Conv(a, k)
  e = Sigmoid(d)
  y = Conv(e, w1)
}}"""


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSumSquare"])
def test_statistics_of_a_weight_become_numbers(op: str) -> None:
    """Weight normalization: no mask reaches the stored weight, so its norm stays that of all of it."""
    text = STORED.format(op)
    assert removable(analysis_of(text, 13)) == {("w0", 0), ("w", 0), ("w", 1), ("s", 0), ("w1", 1)}
    assert check_exact(weighted(text, 13)) == 2


def test_floats_in_the_attribute_of_a_constant_are_stored_values_too() -> None:
    text = """g (float[N, 5] x, float[5, 4] w, float[4, 2] v) => (float[N, 2] y) {
      c = Constant <value_floats = [0.5, 1.0, -2.0, 3.0]> ()
      m = ReduceMax (c)
      a = MatMul(x, w)
      b = Mul(a, c)
      d = Add(b, m)
      y = MatMul(d, v)
    }"""
    assert removable(analysis_of(text)) == {("w", 1), ("c", 0), ("v", 0)}
    assert check_exact(weighted(text)) == 1


def test_a_stored_sum_of_exponentials_stays() -> None:
    assert ("w0", 0) not in removable(analysis_of(STORED.format("ReduceLogSumExp"), 13))


def test_a_mean_over_a_sum_whose_size_varies_keeps_it() -> None:
    """Which share of 4 stored tokens and S others goes, nobody knows."""
    text = """g (float[2, S, 3] x, float[3, 6] w, float[2, 4, 6] t, float[6, 2] v) => (float[2, 2] y) {
      a = MatMul(x, w)
      c = Concat <axis = 1> (t, a)
      d = Sin(c)
      m = ReduceMean <axes = [1], keepdims = 0> (d)
      y = MatMul(m, v)
    }"""
    analysis = analysis_of(text, 11)
    assert "statistics over an axis whose size varies" in reasons_of(analysis, "d", 1)
    assert ("t", 1) not in removable(analysis)
    assert {("w", 1), ("t", 2), ("v", 0)} <= removable(analysis)
    assert check_exact(weighted(text, 11))
