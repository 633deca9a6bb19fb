"""Reshape, Slice and Einsum where some sizes are not known."""

from __future__ import annotations

import pytest

from spa_compiler.graph.settle import settle
from tests.onnx_text import model_from


def test_a_size_that_is_known_while_others_are_not() -> None:
    settled = settle(
        model_from("""g (float[4, 6] x, float[4, 6, 5] z) => (float[n, 5] y, float[n, 2] v)
      <int64[3] keep = {0, -1, 5}, int64[1] from = {1}, int64[1] to = {3}, int64[1] axis = {1}> {
      n = NonZero(x)
      t = Transpose(n)
      rows = GatherND(z, t)
      r = Unsqueeze(rows, from)
      same = Reshape(r, keep)
      y = Squeeze(same, from)
      v = Slice(y, from, to, axis)
    }""")
    )
    assert settled.shapes["same"] == (None, 1, 5)
    assert settled.shapes["v"] == (None, 2)


@pytest.mark.parametrize(
    "equation, shape", [("bhid,bhjd->bhij", (2, 3, 4, 4)), ("...ij,jk->...ik", None), ("bhid,bhjd", (4, 4))]
)
def test_einsum(equation: str, shape: tuple[int, ...] | None) -> None:
    right = "2, 3, 4, 5" if shape else "5, 6"
    settled = settle(
        model_from(f"""g (float[2, 3, 4, 5] a, float[{right}] b) => (float y)
      {{ e = Einsum<equation = "{equation}">(a, b) y = ReduceSum<keepdims = 0>(e) }}""")
    )
    assert settled.shapes["e"] == (shape or (2, 3, 4, 6))
