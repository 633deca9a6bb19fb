"""Pools: channels pass, windows are pinned, and what counts positions across channels pins these."""

from __future__ import annotations

import pytest

from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, reasons_of, removable, weighted


def pooled(lines: str, dims: str = "8, 8", stated: str = "") -> str:
    """Convolution, `lines` from a to b, convolution; `stated` is what inference does not know."""
    rank = dims.count(",") + 1
    ones, result = ", ".join("1" * rank), ", ".join("ABC"[:rank])
    return f"""g (float[2, 3, {dims}] x, float[6, 3, {ones}] w0, float[4, 6, {ones}] w1) => (float[M, 4, {result}] y)
        <{stated}> {{
      a = Conv(x, w0)
      {lines}
      y = Conv(b, w1)
    }}"""


QUANTIZED = """s = Constant <value = float {{0.05}}> ()
      z = Constant <value = uint8 {{7}}> ()
      q = QuantizeLinear(a, s, z)
      {}
      b = DequantizeLinear(p, s, z)"""
QUANTIZED_LAST = """s = Constant <value = float {{0.05}}> ()
      z = Constant <value = uint8 {{7}}> ()
      q0 = QuantizeLinear(a, s, z)
      q = Transpose <perm = [0, 2, 3, 1]> (q0)
      {}
      p1 = Transpose <perm = [0, 3, 1, 2]> (p)
      b = DequantizeLinear(p1, s, z)"""
REGIONS = """r = Constant <value = float[3, 4] {0.0, 0.0, 4.0, 4.0, 1.0, 1.0, 6.0, 5.0, 2.0, 0.0, 7.0, 7.0}> ()
      i = Constant <value = int64[3] {0, 1, 1}> ()
      rois = RoiAlign <output_height = 2, output_width = 2> (a, r, i)
      b = ReduceMean <keepdims = 1, axes = [0]> (rois)"""

PASSING = {
    "max": (pooled("b = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)"), 21),
    "max, old": (pooled("b = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)"), 7),
    "max, unread indices": (pooled("b, i = MaxPool <kernel_shape = [2, 2]> (a)"), 21),
    "max, 1 D": (pooled("b = MaxPool <kernel_shape = [2], ceil_mode = 1> (a)", "9"), 21),
    "max, 3 D": (pooled("b = MaxPool <kernel_shape = [2, 2, 1]> (a)", "4, 4, 4"), 21),
    "average": (pooled("b = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (a)"), 21),
    "average, old": (pooled("b = AveragePool <kernel_shape = [2, 2]> (a)"), 7),
    "lp": (pooled("b = LpPool <kernel_shape = [2, 2], p = 1> (a)"), 21),
    "global average": (pooled("b = GlobalAveragePool(a)"), 21),
    "global max": (pooled("b = GlobalMaxPool(a)"), 21),
    "global lp": (pooled("b = GlobalLpPool <p = 3> (a)"), 21),
    "quantized": (pooled(QUANTIZED.format(
        "p = com.microsoft.QLinearAveragePool <kernel_shape = [2, 2]> (q, s, z, s, z)"),
        stated="uint8[2, 6, 7, 7] p"), 21),
    "quantized, global": (pooled(QUANTIZED.format(
        "p = com.microsoft.QLinearGlobalAveragePool(q, s, z, s, z)"),
        stated="uint8[2, 6, 1, 1] p"), 21),
    "quantized, channels last": (pooled(QUANTIZED_LAST.format(
        "p = com.microsoft.QLinearAveragePool <kernel_shape = [2, 2], channels_last = 1> (q, s, z, s, z)"),
        stated="uint8[2, 7, 7, 6] p, uint8[2, 6, 7, 7] p1"), 21),
    "quantized, global, channels last": (pooled(QUANTIZED_LAST.format(
        "p = com.microsoft.QLinearGlobalAveragePool <channels_last = 1> (q, s, z, s, z)"),
        stated="uint8[2, 1, 1, 6] p, uint8[2, 6, 1, 1] p1"), 21),
    "max, channels last": (pooled(QUANTIZED_LAST.format(
        "p = com.microsoft.NhwcMaxPool <kernel_shape = [2, 2]> (q)"),
        stated="uint8[2, 7, 7, 6] p, uint8[2, 6, 7, 7] p1"), 21),
    "regions": (pooled(REGIONS), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_channels_pass(name: str) -> None:
    text, opset = PASSING[name]
    assert removable(analysis_of(text, opset)) == {("w0", 0), ("w1", 1)}
    assert check_exact(weighted(text, opset), name=name)
    assert check_each_unit(weighted(text, opset), name=name)


def test_max_roi_pool_passes_channels() -> None:
    text = """g (float[1, 3, 8, 8] x, float[6, 3, 1, 1] w0, float[4, 6, 1, 1] w1) => (float[2, 4, 2, 2] y) {
      a = Conv(x, w0)
      r = Constant <value = float[2, 5] {0.0, 0.0, 0.0, 4.0, 4.0, 0.0, 1.0, 1.0, 6.0, 5.0}> ()
      b = MaxRoiPool <pooled_shape = [2, 2]> (a, r)
      y = Conv(b, w1)
    }"""
    assert reasons_of(text, "b", 0) == {"chosen by regions"}
    assert removable(text) == {("w0", 0), ("w1", 1)}
    assert check_exact(weighted(text))


def test_a_window_of_one_position_passes() -> None:
    text = """g (float[2, 3, 6, 5] x, float[5, 8] wa, float[8, 2] wb) => (float[2, 3, 3, 2] y) {
      a = MatMul(x, wa)
      b = MaxPool <kernel_shape = [2, 1], strides = [2, 1]> (a)
      y = MatMul(b, wb)
    }"""
    assert removable(text) == {("wa", 1), ("wb", 0)}
    assert reasons_of(text, "b", 2) == {"pooling window"}
    assert check_exact(weighted(text))


def test_windows_are_pinned() -> None:
    text = """g (float[2, 3, 6, 5] x, float[5, 8] wa, float[4, 2] wb) => (float[2, 3, 6, 2] y) {
      a = MatMul(x, wa)
      b = AveragePool <kernel_shape = [1, 2], strides = [1, 2]> (a)
      y = MatMul(b, wb)
    }"""
    assert not removable(text)
    assert reasons_of(text, "a", 3) == reasons_of(text, "b", 3) == {"pooling window"}


def test_indices_that_are_read_pin_channels() -> None:
    analysis = analysis_of("""g (float[1, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[4, 6, 1, 1] w1)
        => (float[1, 4, 4, 4] y) {
      a = Conv(x, w0)
      p, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
      b = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]> (p, i)
      y = Conv(b, w1)
    }""")
    assert not removable(analysis)
    assert reasons_of(analysis, "a", 1) == reasons_of(analysis, "b", 1) == {"flat positions count all channels"}


def test_indices_that_are_an_output_pin_channels() -> None:
    analysis = analysis_of("""g (float[1, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[4, 6, 1, 1] w1)
        => (float[1, 4, 2, 2] y, int64[1, 6, 2, 2] i) {
      a = Conv(x, w0)
      p, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
      y = Conv(p, w1)
    }""")
    assert not removable(analysis)
    assert reasons_of(analysis, "i", 1) == {"interface"}


def test_neighbours_are_pinned() -> None:
    text = """g (float[2, 3, 4, 5] x, float[6, 3, 1, 1] w0, float[5, 8] wa, float[8, 2] wb) => (float[2, 6, 4, 2] y) {
      a = Conv(x, w0)
      b = MatMul(a, wa)
      c = LRN <size = 3> (b)
      y = MatMul(c, wb)
    }"""
    analysis = analysis_of(text)
    assert "neighbour window" in reasons_of(analysis, "b", 1)
    assert removable(analysis) == {("wa", 1), ("wb", 0)}
    assert check_exact(weighted(text))


def test_a_mask_of_positions_is_pinned() -> None:
    analysis = analysis_of("""g (float[1, 3, 4, 4] x, int32[1, 1, 4, 4] x2, float[6, 3, 1, 1] w0, float[4, 6, 1, 1] w1)
        => (float[1, 4, 2, 2] y) {
      a = Conv(x, w0)
      p = com.microsoft.MaxpoolWithMask <kernel_shape = [2, 2], strides = [2, 2]> (a, x2)
      y = Conv(p, w1)
    }""")
    assert not removable(analysis)
    assert "a mask of positions" in reasons_of(analysis, "a", 1)


@pytest.mark.parametrize(
    "line",
    [
        "MaxPool <kernel_shape = [2, 2]> (x)",
        "GlobalMaxPool(x)",
        "LRN <size = 3> (x)",
        "MaxRoiPool <pooled_shape = [1, 1]> (x, x2)",
    ],
)
def test_an_unknown_rank_is_pinned(line: str) -> None:
    analysis = analysis_of(f"""g (float[2, 3] x0, float[1, 5] x2, float[6, 3, 1, 1] w0) => (float[A, B, C, D] y) {{
      x = com.microsoft.Unheard(x0)
      a = {line}
      y = Conv(a, w0)
    }}""")
    assert reasons_of(analysis, "w0", 1) == {"a tensor of unknown rank"}
