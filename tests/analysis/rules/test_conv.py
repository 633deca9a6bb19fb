"""Convolutions: plain, grouped, depthwise, with a channel multiplier, transposed, deformable, quantized, fused."""

from __future__ import annotations

import re

import pytest

from spa_compiler.analysis import analyze
from spa_compiler.graph.load import load
from tests.analysis import nets
from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, group_members, reasons_of, removable, units_of, weighted

GROUPED = """g (float[2, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[4, 3, 1, 1] w1, float[5, 4, 1, 1] w2)
    => (float[2, 5, 4, 4] y) {
  a = Conv(x, w0)
  b = Conv <group = 2> (a, w1)
  y = Conv(b, w2)
}"""
COMPATIBLE = """g (float[1, 3, 4, 4] x, float[32, 3, 1, 1] w0, float[32, 1, 3, 3] w1, float[32, 2, 1, 1] w2,
    float[5, 32, 1, 1] w3) => (float[1, 5, 4, 4] y) {
  a = Conv(x, w0)
  b = Conv <group = 32, pads = [1, 1, 1, 1]> (a, w1)
  c = Conv <group = 16> (b, w2)
  y = Conv(c, w3)
}"""
INCOMPATIBLE = """g (float[1, 3, 4, 4] x, float[96, 3, 1, 1] w0, float[96, 3, 1, 1] w1, float[96, 8, 1, 1] w2,
    float[5, 96, 1, 1] w3) => (float[1, 5, 4, 4] y) {
  a = Conv(x, w0)
  b = Conv <group = 32> (a, w1)
  c = Conv <group = 12> (b, w2)
  y = Conv(c, w3)
}"""
TRANSPOSED = """g (float[2, 3, 4, 4] x, float[3, 8, 2, 2] w0, float[8] b0, float[8, 5, 3, 3] w1, float[5] b1)
    => (float[2, 5, A, B] y) {
  h = ConvTranspose <strides = [2, 2]> (x, w0, b0)
  s = Sigmoid(h)
  y = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]> (s, w1, b1)
}"""
TRANSPOSED_GROUPED = """g (float[2, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[6, 4, 3, 3] w1, float[8] b1,
    float[5, 8, 1, 1] w2) => (float[2, 5, A, B] y) {
  a = Conv(x, w0)
  b = ConvTranspose <group = 2, strides = [2, 2]> (a, w1, b1)
  c = Exp(b)
  y = Conv(c, w2)
}"""
TRANSPOSED_DEPTHWISE = """g (float[2, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[6, 1, 2, 2] w1, float[6] b1,
    float[6, 2, 1, 1] w2, float[5, 12, 1, 1] w3) => (float[2, 5, 8, 8] y) {
  a = Conv(x, w0)
  b = ConvTranspose <group = 6, strides = [2, 2]> (a, w1, b1)
  c = ConvTranspose <group = 6> (b, w2)
  y = Conv(c, w3)
}"""
POINTWISE = """g (float[2, 3, 4, 5] x, float[5, 8] wa, float[6, 3, 1, 1] w0, float[6] b0, float[6, 4, 1, 1] w1,
    float[8, 2] wb) => (float[2, 4, 4, 2] y) {
  a = MatMul(x, wa)
  b = Conv(a, w0, b0)
  c = Cos(b)
  d = ConvTranspose(c, w1)
  y = MatMul(d, wb)
}"""
DEFORMABLE = """g (float[1, 3, 5, 5] x, float[6, 3, 1, 1] w0, float[18, 3, 3, 3] wo, float[9, 3, 3, 3] wm,
    float[8, 6, 3, 3] w1, float[8] b1, float[4, 8, 1, 1] w2) => (float[1, 4, 3, 3] y) {
  a = Conv(x, w0)
  o = Conv(x, wo)
  m0 = Conv(x, wm)
  m = Sigmoid(m0)
  d = DeformConv <kernel_shape = [3, 3], pads = [0, 0, 0, 0]> (a, w1, o, b1, m)
  y = Conv(d, w2)
}"""
OFFSET_GROUPS = """g (float[1, 3, 5, 5] x, float[8, 3, 1, 1] w0, float[32, 3, 2, 2] wo, float[16, 3, 2, 2] wm,
    float[6, 4, 2, 2] w1, float[4, 6, 1, 1] w2) => (float[1, 4, 4, 4] y) {
  a = Conv(x, w0)
  o = Conv(x, wo)
  m = Conv(x, wm)
  none = Constant <value = float[6] {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}> ()
  d = DeformConv <kernel_shape = [2, 2], pads = [0, 0, 0, 0], group = 2, offset_group = 4> (a, w1, o, none, m)
  y = Conv(d, w2)
}"""
INTEGER = """g (float[1, 3, 4, 4] x, float[6, 3, 1, 1] w0, uint8[5, 6, 3, 3] w1, uint8 z, float[4, 5, 1, 1] w2)
    => (float[1, 4, 2, 2] y) {
  a = Conv(x, w0)
  scale = Constant <value = float {0.03125}> ()
  zero = Constant <value = uint8 {0}> ()
  q = QuantizeLinear(a, scale, zero)
  i = ConvInteger(q, w1, zero, z)
  f = Cast <to = 1> (i)
  y = Conv(f, w2)
}"""
QUANTIZED = """g (float[1, 3, 4, 4] x, float[6, 3, 1, 1] w0, uint8[5, 6, 3, 3] w1, float[4, 5, 1, 1] w2,
    uint8[5] z1, int32[5] b1) => (float[1, 4, 2, 2] y) {
  a = Conv(x, w0)
  zero = Constant <value = uint8 {0}> ()
  one = Constant <value = float {0.03125}> ()
  s1 = Constant <value = float[5] {0.125, 0.25, 0.5, 0.125, 0.25}> ()
  q = QuantizeLinear(a, one, zero)
  i = QLinearConv(q, one, zero, w1, s1, z1, one, zero, b1)
  f = DequantizeLinear(i, one, zero)
  y = Conv(f, w2)
}"""
FUSED = """g (float[2, 3, 6, 6] x, float[8, 3, 3, 3] w0, float[8] b0, float[8, 3, 3, 3] w1, float[4, 8, 1, 1] w2)
    => (float[2, 4, 4, 4] y) <float[2, 8, 4, 4] h> {
  z = Conv(x, w1)
  h = com.microsoft.FusedConv <activation = "Relu"> (x, w0, b0, z)
  y = Conv(h, w2)
}"""
DYNAMIC_PADS = """g (float[2, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[6, 8, 3, 3] w1, float[8] b1, float[4, 8, 1, 1] w2)
    => (float[2, 4, A, B] y) <float[2, 8, 7, 7] h> {
  a = Conv(x, w0)
  pads = Constant <value = int64[4] {1, 1, 1, 1}> ()
  h = com.microsoft.ConvTransposeWithDynamicPads <strides = [2, 2]> (a, w1, pads, b1)
  y = Conv(h, w2)
}"""
CAUSAL = """g (float[2, 3, 5] x, float[8, 3, 1] w0, float[8, 1, 4] w1, float[8] b1, float[4, 8, 1] w2)
    => (float[2, 4, 5] y) <float[2, 8, 5] h, float[2, 8, 3] state> {
  a = Conv(x, w0)
  h, state = com.microsoft.CausalConvWithState <activation = "silu"> (a, w1, b1)
  y = Conv(h, w2)
}"""
COMPUTED_WEIGHT = """g (float[2, 3, 6, 6] x, float[8, 3, 3, 3] v, float[8, 1, 1, 1] s, float[4, 8, 1, 1] w2)
    => (float[2, 4, 4, 4] y) {
  w = Mul(v, s)
  h = Conv(x, w)
  y = Conv(h, w2)
}"""
ONE_DIMENSION, THREE_DIMENSIONS = (
    f"""g (float[2, 3, {axes}] x, float[8, 3, {ones}] w, float[4, 8, {ones}] v) => (float[2, 4, {axes}] y) {{
  h = Conv(x, w)
  y = Conv(h, v)
}}"""
    for axes, ones in (("9", "1"), ("4, 4, 4", "1, 1, 1"))
)

EXACT = {
    "depthwise": (nets.DEPTHWISE, 21),
    "grouped": (GROUPED, 21),
    "grouped, old": (GROUPED, 7),
    "compatible": (COMPATIBLE, 21),
    "incompatible": (INCOMPATIBLE, 21),
    "refined": (nets.GROUPED, 21),
    "grouped before Flatten": (nets.GROUPED_FLATTEN, 21),
    "transposed": (TRANSPOSED, 11),
    "transposed, grouped": (TRANSPOSED_GROUPED, 22),
    "transposed, depthwise": (TRANSPOSED_DEPTHWISE, 21),
    "pointwise": (POINTWISE, 21),
    "deformable": (DEFORMABLE, 22),
    "deformable, offset groups": (OFFSET_GROUPS, 22),
    "integer": (INTEGER, 21),
    "quantized": (QUANTIZED, 21),
    "fused": (FUSED, 21),
    "dynamic pads": (DYNAMIC_PADS, 21),
    "causal": (CAUSAL, 21),
    "computed weight": (COMPUTED_WEIGHT, 21),
    "one dimension": (ONE_DIMENSION, 21),
    "three dimensions": (THREE_DIMENSIONS, 21),
}


@pytest.mark.parametrize("name", EXACT)
def test_cut_equals_masked(name: str) -> None:
    text, opset = EXACT[name]
    assert check_exact(weighted(text, opset), name=name)
    assert check_each_unit(weighted(text, opset), name=name)


def test_plain() -> None:
    (group,) = analysis_of("""g (float[2, 3, 6, 6] x, float[8, 3, 3, 3] w, float[8] b, float[4, 8, 1, 1] v)
        => (float[2, 4, 4, 4] y) {
      h = Conv(x, w, b)
      y = Conv(h, v)
    }""").groups
    assert {(m.tensor, m.axis) for m in group.members} == {("w", 0), ("b", 0), ("h", 1), ("v", 1)}
    assert (group.size, group.granularity, group.params) == (8, "channel", 8 * 27 + 8 + 32)
    assert group.macs == 2 * 16 * (8 * 27 + 32)


def test_macs_of_open_spatial_sizes_are_those_they_are_bound_to() -> None:
    model = weighted("""g (float[N, 3, H, W] x, float[8, 3, 3, 3] w, float[4, 8, 1, 1] v) => (float[N, 4, A, B] y) {
      h = Conv(x, w)
      y = Conv(h, v)
    }""")
    (group,) = analyze(load(model), {"x": (5, 3, 12, 22)}).groups
    assert (group.size, group.params, group.macs) == (8, 8 * 27 + 32, 10 * 20 * (8 * 27 + 32))


def test_macs_of_an_open_batch_are_those_of_one_image() -> None:
    (group,) = (
        analysis_of("""g (float[N, 3, 6, 6] x, float[8, 3, 3, 3] w, float[4, 8, 1, 1] v) => (float[N, 4, 4, 4] y) {
      h = Conv(x, w)
      y = Conv(h, v)
    }""").groups
    )
    assert group.macs == 16 * (8 * 27 + 32)


def test_macs_of_a_transposed_convolution_count_positions_of_its_input() -> None:
    (group,) = analysis_of(TRANSPOSED).groups
    assert group.macs == 2 * (16 * 3 * 8 * 4 + 64 * 8 * 5 * 9)


def test_one_dimension_and_three() -> None:
    for text in (ONE_DIMENSION, THREE_DIMENSIONS):
        assert group_members(text) == [{("w", 0), ("h", 1), ("v", 1)}]


def test_windows_are_pinned_and_hold_nothing() -> None:
    windows = [pin for pin in analysis_of(nets.RESIDUAL).pins if pin.reason == "convolution window"]
    assert ("w1", 2) in {(pin.tensor, pin.axis) for pin in windows}
    assert ("r0", 3) in {(pin.tensor, pin.axis) for pin in windows}
    assert not any(pin.params for pin in windows)


def test_a_pointwise_kernel_passes_positions() -> None:
    analysis = analysis_of(POINTWISE)
    assert units_of(analysis, "wa", 1, 3) == [{("wa", 1): [3], ("wb", 0): [3]}]
    assert {("w0", 0), ("b0", 0), ("w1", 0)} <= removable(analysis)


@pytest.mark.parametrize(
    "attributes, size", [("strides = [1, 2]", 4), ("pads = [0, 1, 0, 0]", 9), ("pads = [0, 0, 0, 1]", 9)]
)
def test_a_kernel_of_one_that_jumps_or_pads_pins_positions(attributes: str, size: int) -> None:
    analysis = analysis_of(f"""g (float[2, 3, 4, 5] x, float[5, 8] wa, float[6, 3, 1, 1] w0, float[{size}, 2] wb)
        => (float[2, 6, 4, 2] y) {{
      a = MatMul(x, wa)
      b = Conv <{attributes}> (a, w0)
      y = MatMul(b, wb)
    }}""")
    assert reasons_of(analysis, "a", 3) == {"convolution window"}
    assert not removable(analysis)


def test_a_transposed_kernel_of_one_that_lengthens_its_output_pins_positions() -> None:
    analysis = analysis_of("""g (float[2, 3, 4, 5] x, float[5, 8] wa, float[3, 6, 1, 1] w0, float[9, 2] wb)
        => (float[2, 6, 4, 2] y) {
      a = MatMul(x, wa)
      b = ConvTranspose <dilations = [2, 2], output_padding = [0, 1]> (a, w0)
      y = MatMul(b, wb)
    }""")
    assert reasons_of(analysis, "a", 3) == {"convolution window"}
    assert not removable(analysis)


def test_residual_is_one_group() -> None:
    spine, inner = analysis_of(nets.RESIDUAL).groups
    assert {(m.tensor, m.axis) for m in spine.parameters} == {("w0", 0), ("w1", 1), ("w2", 0), ("b2", 0), ("w3", 1)}
    assert {(m.tensor, m.axis) for m in inner.parameters} == {("w1", 0), ("b1", 0), ("w2", 1)}


def test_depthwise_with_a_multiplier() -> None:
    channel, slot = analysis_of(nets.DEPTHWISE).groups
    assert (channel.size, channel.granularity) == (6, "channel")
    assert {s.name: s.indices for s in channel.units[2].parameters} == {
        "w0": [2],
        "wd": [2],
        "bd": [2],
        "wm": [4, 5],
        "w1": [4, 5],
    }
    assert (slot.size, slot.granularity) == (2, "slot of each conv group")
    assert {s.name: s.indices for s in slot.units[1].parameters} == {
        "wm": [1, 3, 5, 7, 9, 11],
        "w1": [1, 3, 5, 7, 9, 11],
    }


def test_grouped_takes_whole_groups_or_a_slot_of_each() -> None:
    analysis = analysis_of(GROUPED)
    whole = {("w0", 0): [3, 4, 5], ("w1", 0): [2, 3], ("w2", 1): [2, 3]}
    assert units_of(analysis, "w1", 1, 1) == [{("w0", 0): [1, 4], ("w1", 1): [1]}]
    assert whole in units_of(analysis, "w1", 0, 2)
    assert {("w1", 0): [0, 2], ("w2", 1): [0, 2]} in units_of(analysis, "w1", 0, 2)
    assert {(group.granularity, group.size) for group in analysis.groups} == {
        ("conv group", 2),
        ("slot of each conv group", 3),
        ("slot of each conv group", 2),
    }


def test_transposed_and_grouped_takes_slots_of_its_second_axis() -> None:
    analysis = analysis_of(TRANSPOSED_GROUPED)
    whole = {("w0", 0): [3, 4, 5], ("w1", 0): [3, 4, 5], ("b1", 0): [4, 5, 6, 7], ("w2", 1): [4, 5, 6, 7]}
    assert units_of(analysis, "w1", 1, 2) == [{("w1", 1): [2], ("b1", 0): [2, 6], ("w2", 1): [2, 6]}]
    assert whole in units_of(analysis, "w1", 0, 4)
    assert {("w0", 0): [1, 4], ("w1", 0): [1, 4]} in units_of(analysis, "w1", 0, 4)


def test_group_counts_that_divide_are_refined() -> None:
    analysis = analysis_of(nets.GROUPED)  # 24 = (4, 6) = (8, 3) = (4, 2, 3)
    half = {("w1", 0): [3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23]}
    half |= {("b1", 0): half["w1", 0], ("w2", 0): half["w1", 0], ("w3", 1): half["w1", 0]}
    assert half in units_of(analysis, "w1", 0, 3)
    assert sorted(group.size for group in analysis.groups) == [2, 3, 3, 4, 4]


def test_32_groups_and_16_fit_together() -> None:
    analysis = analysis_of(COMPATIBLE)
    odd = list(range(1, 32, 2))
    assert units_of(analysis, "w2", 1, 1) == [{("w0", 0): odd, ("w1", 0): odd, ("w2", 1): [1]}]
    assert {(group.granularity, group.size) for group in analysis.groups} == {
        ("conv group", 16),
        ("slot of each conv group", 2),
    }


def test_32_groups_and_12_do_not() -> None:
    analysis = analysis_of(INCOMPATIBLE)
    assert "12 groups: incompatible factorisations 3 and 8" in reasons_of(analysis, "b", 1)
    assert ("w1", 0) not in removable(analysis)
    assert {("w0", 0), ("w1", 1)} <= removable(analysis)  # a slot of each of the 32 groups
    assert {("w2", 0), ("w3", 1)} <= removable(analysis)  # and of each of the 12


def test_offsets_are_pinned() -> None:
    analysis = analysis_of(DEFORMABLE, 22)
    assert reasons_of(analysis, "o", 1) == reasons_of(analysis, "m", 1) == {"offsets of a window"}
    assert removable(analysis) == {("w0", 0), ("w1", 1), ("w1", 0), ("b1", 0), ("w2", 1)}


def test_an_offset_group_goes_with_its_offsets() -> None:
    analysis = analysis_of(OFFSET_GROUPS, 22)  # channels (group 2, half 2, slot 2): each half has offsets of its own
    second = {
        ("w0", 0): [2, 3, 6, 7],
        ("w1", 1): [2, 3],
        ("wo", 0): [*range(8, 16), *range(24, 32)],
        ("wm", 0): [*range(4, 8), *range(12, 16)],
    }
    assert second in units_of(analysis, "wo", 0, 8)


def test_scales_of_each_output_go_with_it() -> None:
    analysis = analysis_of(QUANTIZED)
    assert {("w1", 0), ("s1", 0), ("w2", 1), ("w0", 0), ("w1", 1)} <= removable(analysis)


@pytest.mark.parametrize("text", [INTEGER, QUANTIZED])
def test_an_input_zero_point_pins_the_inputs_and_not_the_outputs(text: str) -> None:
    # Codes that something other than a quantization makes: their zeros are no zeros.
    text = re.sub(
        r"q = QuantizeLinear\((\w+), (\w+), (\w+)\)", r"p = QuantizeLinear(\1, \2, \3)\n  q = Max(p, p)", text
    )
    analysis = analysis_of(text.replace("uint8 {0}", "uint8 {3}"))
    assert "summed over inputs whose zero point is not 0" in reasons_of(analysis, "w1", 1)
    assert ("w0", 0) not in removable(analysis)
    assert ("w1", 0) in removable(analysis)


def test_a_depthwise_convolution_sums_over_no_inputs() -> None:
    analysis = analysis_of("""g (float[1, 3, 4, 4] x, float[6, 3, 1, 1] w0, uint8[6, 1, 3, 3] w1, float[4, 6, 1, 1] w2)
        => (float[1, 4, 2, 2] y) {
      a = Conv(x, w0)
      scale = Constant <value = float {0.03125}> ()
      three = Constant <value = uint8 {3}> ()
      q = QuantizeLinear(a, scale, three)
      i = ConvInteger <group = 6> (q, w1, three)
      f = Cast <to = 1> (i)
      y = Conv(f, w2)
    }""")
    assert {("w0", 0), ("w1", 0), ("w2", 1)} <= removable(analysis)


def test_zero_points_of_each_output_go_with_it() -> None:
    analysis = analysis_of(INTEGER.replace("uint8 z", "uint8[5] z"))
    assert units_of(analysis, "w1", 0, 2) == [{("w1", 0): [2], ("z", 0): [2], ("w2", 1): [2]}]


def test_a_state_shares_the_channels() -> None:
    analysis = analysis_of(
        """g (float[2, 3, 5] x, float[2, 3, 3] x2, float[8, 3, 1] w0, float[8, 1, 4] w1, float[8] b1,
        float[8, 3, 1] wp, float[4, 8, 1] w2, float[4, 8, 1] w3) => (float[2, 4, 5] y, float[2, 4, 3] z) {
      a = Conv(x, w0)
      past = Conv(x2, wp)
      h, present = CausalConvWithState(a, w1, b1, past)
      y = Conv(h, w2)
      z = Conv(present, w3)
    }""",
        27,
    )
    shared = {("w0", 0): [3], ("w1", 0): [3], ("b1", 0): [3], ("wp", 0): [3], ("w2", 1): [3], ("w3", 1): [3]}
    assert units_of(analysis, "w1", 0, 3) == [shared]


def test_channels_last_is_pinned() -> None:
    analysis = analysis_of("""g (float[1, 3, 6, 6] x, float[8, 3, 1, 1] w0, float[8, 8, 3, 3] w1)
        => (float[1, 4, 4, 8] y) {
      a = Conv(x, w0)
      t = Transpose <perm = [0, 2, 3, 1]> (a)
      y = com.microsoft.NhwcConv(t, w1)
    }""")
    assert reasons_of(analysis, "w1", 0) == {"channels are last"}
    assert not removable(analysis)


@pytest.mark.parametrize(
    "line",
    [
        "Conv(x, w0)",
        "ConvTranspose(x, w0)",
        "DeformConv <kernel_shape = [1, 1]> (x, w0, x2)",
        "com.microsoft.FusedConv(x, w0)",
        "com.microsoft.CausalConvWithState(x, w0)",
    ],
)
def test_an_unknown_rank_pins_the_weight(line: str) -> None:
    analysis = analysis_of(f"""g (float[2, 3] x0, float[1, 2, 4, 4] x2, float[6, 3, 1, 1] w0) => (float[A, B, C, D] y) {{
      x = com.microsoft.Unheard(x0)
      y = {line}
    }}""")
    assert reasons_of(analysis, "w0", 0) == reasons_of(analysis, "w0", 1) == {"a tensor of unknown rank"}


def test_groups_of_an_unknown_number_of_outputs_are_pinned() -> None:
    analysis = analysis_of("""g (float[1, 3, 4, 4] x, int64[4] x2, float[6, 3, 1, 1] w0, float[4, 3, 1, 1] w1)
        => (float[1, A, 4, 4] y) {
      a = Conv(x, w0)
      w = Reshape(w1, x2)
      y = Conv <group = 2> (a, w)
    }""")
    assert "a grouped convolution of unknown size" in reasons_of(analysis, "a", 1)
    assert not removable(analysis)


def test_a_fused_convolution_needs_no_addend() -> None:
    analysis = analysis_of("""g (float[1, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[6, 4, 1, 1] w1)
        => (float[1, 4, 4, 4] y) {
      a = com.microsoft.FusedConv(x, w0)
      y = com.microsoft.ConvTransposeWithDynamicPads(a, w1)
    }""")
    assert removable(analysis) == {("w0", 0), ("w1", 0)}


@pytest.mark.parametrize(
    "line, reason",
    [
        (
            "com.microsoft.QLinearConv <channels_last = 1> (x2, s, z, w1, s, z, s, z)",
            "channels are last",
        ),
        (
            "com.microsoft.CausalConvWithState <channels_last = 1> (x, w0)",
            "a state that is not [batch, channels, positions]",
        ),
    ],
)
def test_other_layouts_are_pinned(line: str, reason: str) -> None:
    analysis = analysis_of(f"""g (float[1, 5, 6] x, uint8[1, 4, 4, 3] x2, float[6, 1, 2] w0, uint8[5, 3, 1, 1] w1,
        float s, uint8 z) => (float[A, B, C, D] y) {{
      y = {line}
    }}""")
    assert reason in reasons_of(analysis, "w0", 0) | reasons_of(analysis, "w1", 0)
    assert not removable(analysis)


def test_a_convolution_of_stored_values_sums_over_all_of_them() -> None:
    text = """g (float[2, 3, 1, 1] x, float[6, 3, 1, 1] w, float[1, 6, 1, 1] s, float[4, 6, 1, 1] v, float[4, 6, 1, 1] u)
        => (float[2, 4, 1, 1] y) {
      a = Conv(x, w)
      b = Mul(a, s)
      c = Conv(b, v)
      d = Conv(s, u)
      y = Add(c, d)
    }"""
    assert group_members(text) == []
    assert reasons_of(text, "s", 1) == {"summed over stored values"}
