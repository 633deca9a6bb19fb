"""Tensors made from sizes: those of written sizes shrink with what they meet, random ones stay."""

from __future__ import annotations

import pytest

from tests.analysis.exactness import check_exact
from tests.analysis.told import group_members, pins_of, weighted


def between(lines: str, more: str = "") -> str:
    """`lines` make b from a, with 6 channels in the last axis."""
    return f"""g (float[3, 5] x, int64 x_n, float[5, 6] u{more}, float[6, 2] v) => (float[N, 2] y) {{
      a = MatMul(x, u)
      {lines}
      y = MatMul(b, v)
    }}"""


RANGE = between(
    """lo = Constant <value = float {1.0}> ()
      hi = Constant <value = float {7.0}> ()
      step = Constant <value = float {1.0}> ()
      r = Range(lo, hi, step)
      b = Mul(a, r)"""
)
FILLED = between(
    """s = Constant <value = int64[2] {3, 6}> ()
      c = ConstantOfShape <value = float[1] {2.5}> (s)
      b = Add(a, c)"""
)
FROM_SHAPE = between(
    """s = Shape(a)
      c = ConstantOfShape <value = float[1] {2.5}> (s)
      b = Mul(a, c)"""
)


@pytest.mark.parametrize("text", [RANGE, FILLED, FROM_SHAPE])
def test_written_sizes_follow(text: str) -> None:
    assert any(("u", 1) in members for members in group_members(text))
    assert check_exact(weighted(text)) == 1


def test_computed_sizes_stay() -> None:
    text = between(
        """lo = Constant <value = int64 {0}> ()
      step = Constant <value = int64 {1}> ()
      r = Range(lo, x_n, step)
      f = Cast <to = 1> (r)
      b = Mul(a, f)"""
    )
    assert group_members(text) == []
    assert ("f", 0, "Mul", "meets an axis of unknown size") in pins_of(text)


@pytest.mark.parametrize(
    "op, lines, reason",
    [
        ("RandomNormalLike", "r = RandomNormalLike(a)\n b = Add(a, r)", "random numbers hang on the shape"),
        ("RandomUniform", "r = RandomUniform <shape = [3, 6]> ()\n b = Add(a, r)", "random numbers hang on the shape"),
        ("Bernoulli", "p = Sigmoid(a)\n r = Bernoulli(p)\n b = Add(a, r)", "random numbers hang on the shape"),
        ("EyeLike", "r = EyeLike(a)\n b = Add(a, r)", "positions of a diagonal"),
        (
            "HannWindow",
            "n = Constant <value = int64 {6}> ()\n r = HannWindow(n)\n b = Add(a, r)",
            "positions of a signal window",
        ),
    ],
)
def test_what_stays(op: str, lines: str, reason: str) -> None:
    assert group_members(between(lines)) == []
    assert (op, reason) in {pin[2:] for pin in pins_of(between(lines))}
