"""LSTM, GRU and RNN: a hidden unit is one index of every gate, of the biases, of the peepholes and of the states."""

from __future__ import annotations

from itertools import product

import pytest

from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, group_members, weighted

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def net(op: str, directions: int = 1, extra: str = "", states: bool = True, bias: bool = True) -> str:
    """An embedding of 5 channels, a recurrent layer of 6 units, and a reader of all its outputs."""
    d, gates = directions, GATES[op]
    weights = [f"float[{d}, {6 * gates}, 5] w", f"float[{d}, {6 * gates}, 6] r", f"float[{d}, {12 * gates}] b"]
    cell = op == "LSTM"
    inputs = ["e", "w", "r", "b" if bias else ""]
    if states:
        weights += [f"float[{d}, 2, 6] h0", f"float[{d}, 2, 6] c0", f"float[{d}, 18] p"]
        inputs += ["", "h0", *(["c0", "p"] if cell else [])]
    outputs = ["h", "last", *(["c"] if cell else [])]
    attributes = f"hidden_size = 6{extra}" + (', direction = "bidirectional"' if d == 2 else "")
    lines = [
        "e = MatMul(x, u)",
        f"{', '.join(outputs)} = {op} <{attributes}> ({', '.join(inputs)})",
        "t = Transpose <perm = [0, 2, 1, 3]> (h)",
        f"m = Constant <value = int64[3] {{0, 0, {6 * d}}}> ()",
        "f = Reshape(t, m)",
        "y = MatMul(f, v)",
        "z = MatMul(last, q)",
        *(["zc = MatMul(c, q)"] if cell else []),
    ]
    results = "float[3, 2, 4] y, float[D, 2, 2] z" + (", float[D, 2, 2] zc" if cell else "")
    weights = [f"float[7, 5] u, {', '.join(weights)}, float[{6 * d}, 4] v, float[6, 2] q"]
    return f"net (float[3, 2, 7] x, {', '.join(weights)}) => ({results}) {{\n  " + "\n  ".join(lines) + "\n}"


@pytest.mark.parametrize("op, directions", list(product(GATES, (1, 2))))
def test_cut_is_masked(op: str, directions: int) -> None:
    assert check_exact(weighted(net(op, directions))) == 2
    check_each_unit(weighted(net(op, directions)))


@pytest.mark.parametrize("op", GATES)
def test_bare(op: str) -> None:
    """Neither states nor biases."""
    assert check_exact(weighted(net(op, states=False, bias=False))) == 2


@pytest.mark.parametrize(
    "op, extra",
    [
        ("GRU", ", linear_before_reset = 1"),
        ("LSTM", ", input_forget = 1"),
        ("LSTM", ", clip = 0.5"),
        # none of these is 0 at 0
        (
            "LSTM",
            ', activations = ["HardSigmoid", "Softplus", "Softplus"], activation_alpha = [0.2], activation_beta = [0.5]',
        ),
        ("GRU", ', activations = ["Sigmoid", "Softplus"]'),
        ("RNN", ', activations = ["Affine"], activation_alpha = [0.5], activation_beta = [0.7]'),
    ],
)
def test_attributes(op: str, extra: str) -> None:
    assert check_exact(weighted(net(op, extra=extra))) == 2


def test_members() -> None:
    hidden = next(members for members in group_members(net("LSTM")) if ("w", 1) in members)
    assert {
        ("w", 1),
        ("r", 1),
        ("r", 2),
        ("b", 1),
        ("p", 1),
        ("h0", 2),
        ("c0", 2),
        ("h", 3),
        ("last", 2),
        ("c", 2),
    } <= hidden
    assert {("v", 0), ("q", 0)} <= hidden
    (group,) = (group for group in analysis_of(net("LSTM")).groups if group.granularity == "hidden unit")
    assert group.size == 6
    unit = {slab.name: slab.indices for slab in group.units[2].parameters if (slab.name, slab.axis) != ("r", 2)}
    assert unit["w"] == [2, 8, 14, 20]
    assert unit["b"] == [2, 8, 14, 20, 26, 32, 38, 44]
    assert unit["p"] == [2, 8, 14]


def test_stacked_layers_are_two_groups() -> None:
    sizes = {group.size: group.granularity for group in analysis_of(STACKED).groups}
    assert sizes == {6: "hidden unit", 8: "hidden unit"}
    assert check_exact(weighted(STACKED)) == 2


STACKED = """net (float[3, 2, 5] x, float[1, 18, 5] w1, float[1, 18, 6] r1, float[1, 8, 6] w2, float[1, 8, 8] r2, float[8, 4] v)
     => (float[1, 2, 4] y) {
  h1 = GRU <hidden_size = 6> (x, w1, r1)
  axis = Constant <value = int64[1] {1}> ()
  s1 = Squeeze(h1, axis)
  h2, last = RNN <hidden_size = 8> (s1, w2, r2)
  y = MatMul(last, v)
}"""


def test_gates_in_another_order() -> None:
    """As PyTorch writes them where nothing was folded: input, forget, cell, output gate, biases apart."""
    text = """net (float[3, 2, 5] x, float[24, 5] w, float[24, 6] r, float[24] bw, float[24] br, float[6, 4] v)
         => (float[1, 2, 4] y) {
      wi, wf, wc, wo = Split <axis = 0, num_outputs = 4> (w)
      ri, rf, rc, ro = Split <axis = 0, num_outputs = 4> (r)
      bi, bf, bc, bo = Split <axis = 0, num_outputs = 4> (bw)
      ci, cf, cc, co = Split <axis = 0, num_outputs = 4> (br)
      w1 = Concat <axis = 0> (wi, wo, wf, wc)
      r1 = Concat <axis = 0> (ri, ro, rf, rc)
      b1 = Concat <axis = 0> (bi, bo, bf, bc, ci, co, cf, cc)
      zero = Constant <value = int64[1] {0}> ()
      w2 = Unsqueeze(w1, zero)
      r2 = Unsqueeze(r1, zero)
      b2 = Unsqueeze(b1, zero)
      h, last = LSTM <hidden_size = 6> (x, w2, r2, b2)
      y = MatMul(last, v)
    }"""
    (group,) = analysis_of(text).groups
    assert (group.size, group.params) == (6, 24 * 5 + 24 * 6 + 24 + 24 + 6 * 4)
    assert check_exact(weighted(text)) == 1


def test_zero_states_of_computed_shape() -> None:
    """As exporters write them for an open batch: the hidden size among the sizes follows."""
    text = """net (float[3, N, 5] x, float[1, 18, 5] w, float[1, 18, 6] r, float[6, 4] v) => (float[1, N, 4] y) {
      s = Shape <start = 1, end = 2> (x)
      one = Constant <value = int64[1] {1}> ()
      size = Constant <value = int64[1] {6}> ()
      sizes = Concat <axis = 0> (one, s, size)
      h0 = ConstantOfShape <value = float[1] {0.5}> (sizes)
      h, last = GRU <hidden_size = 6> (x, w, r, , , h0)
      y = MatMul(last, v)
    }"""
    (members,) = group_members(text)
    assert ("h0", 2) in members
    assert check_exact(weighted(text)) == 1


def test_batch_first() -> None:
    """Not in ONNX Runtime."""
    text = """net (float[2, 3, 5] x, float[1, 24, 5] w, float[1, 24, 6] r, float[2, 1, 6] h0, float[6, 4] v)
         => (float[2, 3, 1, 4] y) {
      h = LSTM <hidden_size = 6, layout = 1> (x, w, r, , , h0)
      y = MatMul(h, v)
    }"""
    (members,) = group_members(text)
    assert members == {("w", 1), ("r", 1), ("r", 2), ("h0", 2), ("h", 3), ("v", 0)}


def test_lengths() -> None:
    text = """net (float[3, 2, 5] x, int32[2] x_lengths, float[1, 6, 5] w, float[1, 6, 6] r, float[6, 4] v)
         => (float[3, 1, 2, 4] y) {
      h = RNN <hidden_size = 6> (x, w, r, , x_lengths)
      y = MatMul(h, v)
    }"""
    assert [("w", 1) in members for members in group_members(text)] == [True]
    assert [group.macs for group in analysis_of(text).groups] == [3 * 2 * 6 * (5 + 6 + 4)]
    pins = {(pin.tensor, pin.axis, pin.reason) for pin in analysis_of(text).pins}
    assert {("x_lengths", 0, "sequences with lengths"), ("x", 1, "sequences with lengths")} <= pins


def test_what_pins() -> None:
    pins = {(pin.tensor, pin.axis, pin.reason) for pin in analysis_of(net("LSTM", 2)).pins if pin.op == "LSTM"}
    assert ("w", 0, "directions of a recurrent layer") in pins
    assert all(axis != 1 for _, axis, _ in pins)  # gates are runs of the same units, and nothing by themselves
    assert ("e", 0, "steps of a recurrent layer") in pins
