"""Flatten, Transpose, Constant: axes are merged and permuted."""

from __future__ import annotations

from tests.analysis import nets
from tests.analysis.told import analysis_of, group_members, groups_of


def test_flatten_makes_runs_of_columns() -> None:
    groups = groups_of(nets.CONV_FLATTEN)
    unit = next(group for group in groups if group.size == 5).units[2]
    assert {s.name: (s.axis, s.indices) for s in unit.parameters} == {
        "w2": (0, [2]),
        "one": (1, [2]),
        "w3": (0, list(range(32, 48))),
    }
    assert {s.name: s.indices for s in unit.activations}["f"] == list(range(32, 48))


def test_flatten_of_unknown_sizes_pins() -> None:
    analysis = analysis_of("""g (float[N, 3, H, W] x, float[8, 3, 1, 1] w, float[32, 4] v) => (float[N, 4] y) {
      a = Conv(x, w)
      f = Flatten(a)
      y = Gemm(f, v)
    }""")
    assert analysis.groups == ()
    assert any(pin.tensor == "f" and "unknown size" in pin.reason and pin.params for pin in analysis.pins)


def test_flatten_at_other_axes() -> None:
    text = """g (float[5, 4] x, float[2, 4, 6] w, float[6, 2] v) => (float[10, 2] y) {{
      a = MatMul(x, w)
      f = Flatten <axis = {axis}> (a)
      y = MatMul(f, v)
    }}"""
    for axis in (2, -1):
        assert group_members(text.format(axis=axis)) == [{("w", 2), ("a", 2), ("f", 1), ("v", 0)}]


def test_transpose() -> None:
    for perm in ("", "<perm = [1, 0]>"):
        members = group_members(f"""g (float[5, 4] x, float[4, 6] w, float[3, 6] v) => (float[3, 5] y) {{
          a = MatMul(x, w)
          t = Transpose {perm} (a)
          y = MatMul(v, t)
        }}""")
        assert members == [{("w", 1), ("a", 1), ("t", 0), ("v", 1)}]


def test_constant_nodes_are_parameters() -> None:
    analysis = analysis_of("""g (float[N, 2] x, float[3, 2] v) => (float[N, 2] y) {
      w = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()
      a = MatMul(x, w)
      y = MatMul(a, v)
    }""")
    (group,) = analysis.groups
    assert {(m.tensor, m.axis) for m in group.parameters} == {("w", 1), ("v", 0)}
    assert analysis.params == 12
