"""Convolutions: plain, grouped, depthwise, with a channel multiplier, and group counts that meet."""

from __future__ import annotations

from tests.analysis import nets
from tests.analysis.told import analysis_of, group_members, groups_of


def test_plain() -> None:
    (group,) = groups_of("""g (float[2, 3, 6, 6] x, float[8, 3, 3, 3] w, float[8] b, float[4, 8, 1, 1] v)
        => (float[2, 4, 4, 4] y) {
      h = Conv(x, w, b)
      y = Conv(h, v)
    }""")
    assert {(m.tensor, m.axis) for m in group.members} == {("w", 0), ("b", 0), ("h", 1), ("v", 1)}
    assert (group.size, group.granularity, group.params) == (8, "channel", 8 * 27 + 8 + 32)
    assert group.macs == 2 * 16 * (8 * 27 + 32)


def test_macs_without_spatial_sizes_are_unknown() -> None:
    (group,) = groups_of("""g (float[N, 3, H, W] x, float[8, 3, 3, 3] w, float[4, 8, 1, 1] v) => (float[N, 4, A, B] y) {
      h = Conv(x, w)
      y = Conv(h, v)
    }""")
    assert (group.size, group.params, group.macs) == (8, 8 * 27 + 32, None)


def test_one_dimension_and_three() -> None:
    for axes, ones in (("9", "1"), ("4, 4, 4", "1, 1, 1")):
        members = group_members(f"""g (float[2, 3, {axes}] x, float[8, 3, {ones}] w, float[4, 8, {ones}] v)
            => (float[2, 4, {axes}] y) {{
          h = Conv(x, w)
          y = Conv(h, v)
        }}""")
        assert members == [{("w", 0), ("h", 1), ("v", 1)}]


def test_windows_are_pinned_and_hold_nothing() -> None:
    pins = analysis_of(nets.RESIDUAL).pins
    windows = [pin for pin in pins if pin.reason == "convolution window"]
    assert ("w1", 2) in {(pin.tensor, pin.axis) for pin in windows}
    assert ("r0", 3) in {(pin.tensor, pin.axis) for pin in windows}
    assert not any(pin.params for pin in windows)


def test_residual_is_one_group() -> None:
    spine, inner = groups_of(nets.RESIDUAL)
    assert {(m.tensor, m.axis) for m in spine.parameters} == {("w0", 0), ("w1", 1), ("w2", 0), ("b2", 0), ("w3", 1)}
    assert {(m.tensor, m.axis) for m in inner.parameters} == {("w1", 0), ("b1", 0), ("w2", 1)}


def test_depthwise_with_a_multiplier() -> None:
    analysis = analysis_of(nets.DEPTHWISE)
    channel, slot = analysis.groups
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
    assert [(p.node, p.attribute, analysis.facts.algebra.size(p.axis)) for p in analysis.facts.patches] == [
        ("d", "group", 6),
        ("m", "group", 6),
    ]


def test_grouped_takes_whole_groups_or_a_slot_of_each() -> None:
    groups, inputs, outputs = groups_of("""g (float[2, 3, 4, 4] x, float[6, 3, 1, 1] w0, float[4, 3, 1, 1] w1,
        float[5, 4, 1, 1] w2) => (float[2, 5, 4, 4] y) {
      a = Conv(x, w0)
      b = Conv <group = 2> (a, w1)
      y = Conv(b, w2)
    }""")
    assert (groups.granularity, groups.size) == ("conv group", 2)
    assert {s.name: s.indices for s in groups.units[1].parameters} == {"w0": [3, 4, 5], "w1": [2, 3], "w2": [2, 3]}
    assert [(s.name, s.axis, s.indices) for s in inputs.units[1].parameters] == [("w0", 0, [1, 4]), ("w1", 1, [1])]
    assert {s.name: s.indices for s in outputs.units[0].parameters} == {"w1": [0, 2], "w2": [0, 2]}


def test_group_counts_that_divide_are_refined() -> None:
    sizes = {(group.granularity, group.size) for group in groups_of(nets.GROUPED)}
    assert sizes == {
        ("conv group", 4),
        ("slot of each conv group", 2),
        *(("slot of each conv group", n) for n in (3, 4)),
    }


def test_group_counts_that_do_not_divide_are_pinned() -> None:
    analysis = analysis_of("""g (float[2, 3, 4, 4] x, float[12, 3, 1, 1] w0, float[12, 3, 1, 1] w1,
        float[12, 2, 1, 1] w2, float[5, 12, 1, 1] w3) => (float[2, 5, 4, 4] y) {
      a = Conv(x, w0)
      b = Conv <group = 4> (a, w1)
      c = Conv <group = 6> (b, w2)
      y = Conv(c, w3)
    }""")
    reasons = {pin.reason for pin in analysis.pins if pin.tensor == "b"}
    assert "6 groups: incompatible factorisations 2 and 3" in reasons
    removable = {(m.tensor, m.axis) for group in analysis.groups for m in group.parameters}
    assert ("w1", 0) not in removable
    assert ("w1", 1) in removable  # a slot of each of the four groups
