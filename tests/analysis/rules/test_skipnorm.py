"""ONNX Runtime's norms of sums: the sum takes part in the statistics, so it is completed where it shrinks."""

from __future__ import annotations

import pytest

from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, reasons_of, removable, weighted

ENDS = {("w0", 1), ("w2", 1), ("w1", 0)}


def summed(lines: str, weights: str = "float[12] s, float[12] c, float[12] k") -> str:
    """Two products a and d of 12 channels, `lines` from them to b and z, product."""
    return f"""g (float[2, 5, 3] x, float[3, 12] w0, float[3, 12] w2, {weights}, float[12, 4] w1) => (float[2, 5, 4] y) {{
      a = MatMul(x, w0)
      d = MatMul(x, w2)
      {lines}
      m = Add(b, z)
      y = MatMul(m, w1)
    }}"""


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize("arguments", ["a, d, s", "a, d, s, c", "a, d, s, c, k"])
def test_layer_norm(arguments: str, opset: int) -> None:
    text = summed(f"b, , , z = com.microsoft.SkipLayerNormalization <epsilon = 0.1> ({arguments})")
    assert removable(analysis_of(text, opset)) >= ENDS
    assert check_exact(weighted(text, opset))


def test_layer_norm_alone() -> None:
    text = summed("b = com.microsoft.SkipLayerNormalization(a, d, s, c)\n z = Relu(a)")
    assert removable(analysis_of(text, 17)) >= ENDS
    assert check_exact(weighted(text, 17))
    assert check_each_unit(weighted(text.replace(", float[12] k", ""), 17))


@pytest.mark.parametrize("shape", ["5, 12", "1, 5, 12"])
def test_a_stored_skip(shape: str) -> None:
    """No mask reaches it, so all of it counts."""
    text = summed("b, , , z = com.microsoft.SkipLayerNormalization(a, t, s, c, k)").replace(
        "float[12] s", f"float[12] s, float[{shape}] t"
    )
    assert {("w0", 1), ("t", shape.count(",")), ("w1", 0)} <= removable(analysis_of(text, 17))
    assert check_exact(weighted(text, 17))


@pytest.mark.parametrize("arguments", ["a, d, s", "a, d, s, k"])
def test_rms_norm(arguments: str) -> None:
    text = summed(f"b, , , z = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.1> ({arguments})")
    assert removable(analysis_of(text, 17)) >= ENDS
    assert check_exact(weighted(text, 17))


def test_rms_norm_of_a_stored_skip_stays() -> None:
    text = summed("b, , , z = com.microsoft.SkipSimplifiedLayerNormalization(a, t, s)").replace(
        "float[12] s", "float[12] s, float[1, 5, 12] t"
    )
    analysis = analysis_of(text, 17)
    assert ("w0", 1) not in removable(analysis)
    assert "statistics of stored values" in reasons_of(analysis, "t", 2)


EMBED = """g (int32[2, 5] x1, int32[2, 5] x2, int32[2, 5] x3, float[9, 8] tw, float[7, 8] tp, float[3, 8] tt, float[8] s,
     float[8] c, float[8, 6] w0, float[6, 3] w1) => (float[2, 5, 3] y, int32[2] i) {
  e, i = com.microsoft.EmbedLayerNormalization <mask_index_type = 1> (x1, x2, tw, tp, tt, s, c, x3)
  h = MatMul(e, w0)
  y = MatMul(h, w1)
}"""


def test_embeddings_stay() -> None:
    analysis = analysis_of(EMBED, 17)
    assert removable(analysis) == {("w0", 1), ("w1", 0)}
    assert "statistics of stored embeddings" in reasons_of(analysis, "tw", 1)


@pytest.mark.parametrize("lines", [
    "b = com.microsoft.GroupNorm <groups = 4, activation = 0> (t, s, c)",
    "b, z = com.microsoft.SkipGroupNorm <groups = 4, activation = 0> (t, s, c, t, k)",
    "b, z = com.microsoft.SkipGroupNorm <groups = 4, activation = 0> (t, s, c, sk, k)",
])  # fmt: skip
def test_group_norm_loses_whole_groups(lines: str) -> None:
    """These have no kernel for the CPU, so no model is run."""
    text = f"""g (float[2, 3, 4, 4] x, float[12, 3, 1, 1] w0, float[12] s, float[12] c, float[12] k, float[2, 12] sk,
         float[12, 4] w1) => (float[A, B, C, D] y) {{
      a = Conv(x, w0)
      t = Transpose <perm = [0, 2, 3, 1]> (a)
      {lines}
      y = MatMul(b, w1)
    }}"""
    assert [group.size for group in analysis_of(text, 17).groups] == [4]
    assert {("w0", 0), ("s", 0), ("c", 0), ("w1", 0)} <= removable(analysis_of(text, 17))
