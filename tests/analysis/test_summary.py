"""Pins added up by reason: each parameter once, whatever names it."""

from __future__ import annotations

import math

import pytest

from spa_compiler.analysis.summary import Reason, _Held, reasons
from tests.analysis import nets
from tests.analysis.told import analysis_of


def of(text: str) -> dict[tuple[str, str], Reason]:
    return {(reason.op, reason.reason): reason for reason in reasons(analysis_of(text))}


def test_a_parameter_that_one_reason_holds_twice_counts_once() -> None:
    found = of("""g (float[1, 4] x, float[4, 6] w, float[6, 2] v) => (float[1, 6] a, float[1, 2] y) {
      a = MatMul(x, w)
      y = MatMul(a, v)
    }""")
    assert found["graph output", "interface"] == Reason("graph output", "interface", 2, 36, "a[1]")
    assert found["graph input", "interface"] == Reason("graph input", "interface", 1, 24, "x[1]")


def test_equal_layers_are_no_single_one() -> None:
    layers = "".join(f"h{i} = MatMul(x, w{i})\ny{i} = Relu(h{i})\n" for i in range(3))
    weights = ", ".join(f"float[4, 6] w{i}" for i in range(3))
    outputs = ", ".join(f"float[1, 6] y{i}" for i in range(3))
    found = of(f"g (float[1, 4] x, {weights}) => ({outputs}) {{ {layers} }}")
    assert found["graph output", "interface"].params == 72
    assert found["graph output", "interface"].axes == 3


def test_constants_of_nodes_count() -> None:
    found = of("""g (float[1, 3] x) => (float[1, 3] y) {
      c = Constant <value = float[3] {1.0, 2.0, 3.0}> ()
      y = Mul(x, c)
    }""")
    assert found["graph output", "interface"].params == 3


@pytest.mark.parametrize("name", nets.ALL)
def test_no_reason_holds_more_than_is_pinned(name: str) -> None:
    analysis = analysis_of(nets.ALL[name])
    found = reasons(analysis)
    assert {(pin.op, pin.reason) for pin in analysis.pins} == {(reason.op, reason.reason) for reason in found}
    assert sum(reason.axes for reason in found) == len(analysis.pins)
    assert all(0 <= reason.params <= analysis.params - analysis.prunable for reason in found)
    assert [reason.params for reason in found] == sorted((reason.params for reason in found), reverse=True)
    held = _Held(analysis)
    stuck = sum(math.prod(int(stays.sum()) for _, stays in axes) for axes in held.stuck)
    assert stuck == analysis.params - analysis.prunable


def test_what_goes_on_another_axis_is_held_by_nobody() -> None:
    found = of("""g (float[1, 4] x, float[4, 6] w, float[6, 5] v, float[5, 2] u) => (float[1, 2] y) {
      a = MatMul(x, w)
      s = Softmax(a)
      b = MatMul(s, v)
      y = MatMul(b, u)
    }""")
    (softmax,) = [reason for (op, _), reason in found.items() if op == "Softmax"]
    assert softmax.params == 24, "the columns of v go, and all of it with them"
    assert found["graph input", "interface"].params == 24
    assert found["graph output", "interface"].params == 0
