"""Branches, loops and scans: what holds behind them."""

from __future__ import annotations

import pytest

from spa_compiler.graph.settle import settle
from tests.onnx_text import model_from

IF = """g (float[N, 4] x, bool c) => (float[N, m] y)
  <int64[1] one = {1}, bool yes = {1}> {
  y = If(CONDITION) <then_branch = a () => (float[N, 4] p) { p = Relu(x) },
                     else_branch = b () => (float[N, 8] q) { q = Concat<axis = 1>(x, x) }>
}"""


def test_both_branches_of_an_if() -> None:
    settled = settle(model_from(IF.replace("CONDITION", "c")))
    assert settled.shapes["y"] == (2, None)
    assert settled.varies["y"] == (True, True)


def test_the_branch_that_is_taken() -> None:
    settled = settle(model_from(IF.replace("CONDITION", "yes")))
    assert settled.shapes["y"] == (2, 4)
    assert settled.varies["y"] == (True, False)


LOOP = """g (float[N, 4] x, int64 times) => (float[N, 4] y, float[t, N, 4] z)
  <int64 five = {5}, bool yes = {1}> {
  y, z = Loop(TIMES, yes, x) <body = b (int64 i, bool c, float[N, 4] s) => (bool d, float[N, 4] u, float[N, 4] v) {
    d = Identity(c) u = Add(s, x) v = Relu(u) }>
}"""


@pytest.mark.parametrize("times, length", [("five", 5), ("times", None)])
def test_loops(times: str, length: int | None) -> None:
    settled = settle(model_from(LOOP.replace("TIMES", times)))
    assert settled.shapes["y"] == (2, 4)
    assert settled.shapes["z"] == (length, 2, 4)
    assert settled.varies["z"] == (length is None, True, False)


def test_scans() -> None:
    settled = settle(
        model_from("""g (float[7, 4] x, float[4] s) => (float[4] y, float[t, 4] z) {
      y, z = Scan(s, x) <num_scan_inputs = 1,
        body = b (float[4] a, float[4] p) => (float[4] n, float[4] o) { n = Add(a, p) o = Relu(n) }>
    }""")
    )
    assert settled.shapes["y"] == (4,)
    assert settled.shapes["z"] == (7, 4)
