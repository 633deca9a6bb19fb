"""Quantization: scales and zero points follow their axis; products of codes are exact where the zero point is 0."""

from __future__ import annotations

import onnx
import pytest

from tests.analysis.exactness import check_exact
from tests.analysis.told import analysis_of, group_sizes, pins_of, weighted


def proto(text: str) -> onnx.ModelProto:
    """Weights named z.. are zero points of 3, n.. zero points of 0, s.. scales."""
    model = weighted(text)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name[0] in "zn":
            values = (values * 0 + (3 if tensor.name[0] == "z" else 0)).astype(values.dtype)
        elif tensor.name[0] == "s":
            values = abs(values) * 0.05 + 0.02
        elif values.dtype.kind in "iu":
            values = (values * 0 + range(1, 1 + values.shape[-1])).astype(values.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model


def net(lines: str, weights: str, last: str = "b") -> str:
    return f"""net (float[3, 5] x, float[5, 6] u, {weights}) => (float[3, 2] y) {{
      a = MatMul(x, u)
      {lines}
      y = MatMul({last}, v)
    }}"""


PER_TENSOR = net("q = QuantizeLinear(a, s, z)\n b = DequantizeLinear(q, s, z)", "float s, uint8 z, float[6, 2] v")
PER_AXIS = net("q = QuantizeLinear(a, s, z)\n b = DequantizeLinear(q, s, z)", "float[6] s, int8[6] z, float[6, 2] v")
WEIGHT = net("d = DequantizeLinear <axis = 1> (c, s)\n b = MatMul(a, d)", "int8[6, 8] c, float[8] s, float[8, 2] v")
BLOCKED = net(
    "d = DequantizeLinear <axis = 0, block_size = 2> (c, s, z)\n b = MatMul(a, d)",
    "int8[6, 8] c, float[3, 8] s, int8[3, 8] z, float[8, 2] v",
)
DYNAMIC = net(
    """q, sq, zq = DynamicQuantizeLinear(a)
      i = MatMulInteger(q, c, zq, z)
      f = Cast <to = 1> (i)
      t = Mul(sq, s)
      b = Mul(f, t)""",
    "int8[6, 8] c, int8[8] z, float[8] s, float[8, 2] v",
)
QLINEAR = net(
    """q = QuantizeLinear(a, s1, n1)
      i = QLinearMatMul(q, s1, n1, c, s2, z2, s3, z3)
      b = DequantizeLinear(i, s3, z3)""",
    "float s1, uint8 n1, uint8[6, 8] c, float[8] s2, uint8[8] z2, float s3, uint8 z3, float[8, 2] v",
)


@pytest.mark.parametrize(
    "text, sizes",
    [(PER_TENSOR, [6]), (PER_AXIS, [6]), (WEIGHT, [6, 8]), (BLOCKED, [3, 8]), (DYNAMIC, [6, 8]), (QLINEAR, [6, 8])],
)
def test_exact(text: str, sizes: list[int]) -> None:
    assert group_sizes(proto(text)) == sizes
    assert check_exact(proto(text)) == len(sizes)


def test_scales_follow() -> None:
    (group,) = analysis_of(proto(PER_AXIS)).groups
    assert {("s", 0), ("z", 0), ("u", 1), ("v", 0)} <= {(m.tensor, m.axis) for m in group.members}
    columns = [{(m.tensor, m.axis) for m in group.members} for group in analysis_of(proto(QLINEAR)).groups]
    assert any({("c", 1), ("s2", 0), ("z2", 0), ("v", 0)} <= members for members in columns)


def test_codes_of_what_is_masked_need_no_mask() -> None:
    """The code of zero is the zero point, whatever that is; a mask would put 0 there."""
    offset = QLINEAR.replace("n1", "z1")
    assert group_sizes(proto(offset)) == [6, 8]
    assert not any((m.tensor, m.axis) == ("q", 1) for group in analysis_of(proto(offset)).groups for m in group.members)
    assert check_exact(proto(offset)) == 2


@pytest.mark.parametrize("weight", ["z3", "n4"])
def test_a_zero_point_pins_what_is_summed_up(weight: str) -> None:
    """Whatever that of the weight is, which is not masked."""
    chain = QLINEAR.replace(
        "b = DequantizeLinear(i, s3, z3)",
        f"j = QLinearMatMul(i, s3, z3, e, s3, {weight}, s3, z3)\n b = DequantizeLinear(j, s3, z3)",
    ).replace("float[8, 2] v", "uint8[8, 4] e, uint8 n4, float[4, 2] v")
    assert group_sizes(proto(chain)) == [4, 6]
    assert ("e", 0, "QLinearMatMul", "summed over codes whose zero point is not 0") in pins_of(proto(chain))
    assert check_exact(proto(chain)) == 2


def test_blocks_go_as_a_whole() -> None:
    (group,) = (group for group in analysis_of(proto(BLOCKED)).groups if group.size == 3)
    assert group.granularity == "block of one scale"
    unit = {(slab.name, slab.axis): slab.indices for slab in group.units[1].parameters}
    assert unit == {("c", 0): [2, 3], ("s", 0): [1], ("z", 0): [1], ("u", 1): [2, 3]}


def test_blocks_that_do_not_fill_the_axis() -> None:
    text = BLOCKED.replace("block_size = 2", "block_size = 4").replace("[3, 8]", "[2, 8]")
    assert group_sizes(proto(text)) == [8]
    assert pins_of(proto(text)) >= {
        ("c", 0, "DequantizeLinear", "blocks of one scale that do not fill the axis"),
        ("s", 0, "DequantizeLinear", "blocks of one scale that do not fill the axis"),
    }


def test_old_opsets_have_one_scale() -> None:
    assert check_exact(weighted(PER_TENSOR, opset=10)) == 1


MICROSOFT = {
    "DynamicQuantizeMatMul": net(
        "b = com.microsoft.DynamicQuantizeMatMul(a, c, s, z)", "int8[6, 8] c, float[8] s, int8[8] z, float[8, 2] v"
    ),
    "MatMulIntegerToFloat": net(
        """q, sq, zq = DynamicQuantizeLinear(a)
      b = com.microsoft.MatMulIntegerToFloat(q, c, sq, s, zq, z)""",
        "int8[6, 8] c, float[8] s, int8[8] z, float[8, 2] v",
    ),
    "QGemm": net(
        """q = QuantizeLinear(a, s1, n1)
      i = com.microsoft.QGemm <transB = 1> (q, s1, n1, c, s, z, , s3, z3)
      b = DequantizeLinear(i, s3, z3)""",
        "float s1, uint8 n1, int8[8, 6] c, float[8] s, int8[8] z, float s3, uint8 z3, float[8, 2] v",
    ),
    "QLinearAdd": net(
        """q = QuantizeLinear(a, s1, z1)
      t = com.microsoft.QLinearAdd(q, s1, z1, e, s1, z1, s3, z1)
      l = com.microsoft.QLinearSigmoid(t, s3, z1, s3, z1)
      d = DequantizeLinear(l, s3, z1)
      m = DequantizeLinear <axis = 1> (c, s, z)
      b = MatMul(d, m)""",
        "float s1, uint8 z1, uint8[6] e, float s3, int8[6, 8] c, float[8] s, int8[8] z, float[8, 2] v",
    ),
    "QLinearConcat": net(
        """q = QuantizeLinear(a, s1, z1)
      two = com.microsoft.QLinearConcat <axis = 1> (s1, z1, q, s1, z1, q, s3, z3)
      b = DequantizeLinear(two, s1, z1)""",
        "float s1, uint8 z1, float s3, uint8 z3, float[12, 2] v",
    ),
}


@pytest.mark.parametrize("op", MICROSOFT)
def test_microsoft(op: str) -> None:
    sizes = {"QLinearConcat": [6]}.get(op, [6, 8])
    assert group_sizes(proto(MICROSOFT[op])) == sizes
    assert check_exact(proto(MICROSOFT[op])) == len(sizes)


def test_the_range_of_stored_values_is_that_of_all_of_them() -> None:
    """A weight that is quantized when the model runs: without its largest values it would get another scale."""
    text = """g (float[3, 5] x, float[5, 8] w0, float[8, 4] w, float[4, 2] v) => (float[3, 2] y) {
      a = MatMul(x, w0)
      qa, sa, za = DynamicQuantizeLinear(a)
      qb, sb, zb = DynamicQuantizeLinear(w)
      c = MatMulInteger(qa, qb, za, zb)
      f = Cast <to = 1> (c)
      s = Mul(sa, sb)
      h = Mul(f, s)
      y = MatMul(h, v)
    }"""
    reason = "the range of stored values"
    assert pins_of(text) >= {("w", axis, "DynamicQuantizeLinear", reason) for axis in (0, 1)}
    assert group_sizes(text) == []


@pytest.mark.parametrize(
    "line",
    ["MatMulInteger(c, d)", "com.microsoft.MatMulIntegerToFloat(c, d, s, s)", "com.microsoft.QGemm(c, s, n, d, s, n)"],
)
def test_a_sum_over_stored_codes_stays_whole(line: str) -> None:
    text = f"""g (float[3, 5] x, uint8[5, 8] c, uint8[8, 4] d, float s, uint8 n, float[8, 2] v) => (float[3, 2] y)
        <float[3, 4] e> {{
      f = Cast <to = 1> (c)
      g = MatMul(x, f)
      h = MatMul(g, v)
      p = {line}
      q = Cast <to = 1> (p)
      r = ReduceSum <keepdims = 0> (q)
      y = Add(h, r)
    }}"""
    assert "summed over stored values" in {reason for *_, reason in pins_of(text)}
    assert group_sizes(text) == [4]  # outputs of the product
