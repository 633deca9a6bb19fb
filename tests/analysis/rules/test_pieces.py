"""Concat, Split, Pad: an axis made of others, in every form that opsets give these operators."""

from __future__ import annotations

from typing import Any

import onnx
import pytest

from tests.analysis.builder import Net
from tests.analysis.chain import Chain, exact
from tests.analysis.exactness import check_exact
from tests.analysis.told import analysis_of, group_members, group_sizes, pins_of, reasons_of, units_of, weighted

# --- Concat -----------------------------------------------------------------------------------------------------------


def test_concat_puts_axes_one_after_another() -> None:
    text = """g (float[N, 3, 2, 2] x, float[4, 3, 1, 1] w, float[6, 3, 1, 1] v, float[5, 10, 1, 1] u)
        => (float[N, 5, 2, 2] y) {
      a = Conv(x, w)
      b = Conv(x, v)
      c = Concat <axis = 1> (a, b)
      d = Sigmoid(c)
      y = Conv(d, u)
    }"""
    assert group_members(text) == [
        {("w", 0), ("a", 1), ("c", 1), ("d", 1), ("u", 1)},
        {("v", 0), ("b", 1), ("c", 1), ("d", 1), ("u", 1)},
    ]
    (unit,) = units_of(text, "v", 0, 2)
    assert unit == {("v", 0): [2], ("u", 1): [6]}
    assert exact(weighted(text)) == 2


def test_concat_of_an_axis_with_itself() -> None:
    """As in Swin's patch merging: a channel goes from every piece."""
    text = """g (float[N, 4] x, float[4, 6] w, float[18, 2] v) => (float[N, 2] y) {
      a = MatMul(x, w)
      b = Sigmoid(a)
      c = Concat <axis = -1> (a, b, a)
      y = MatMul(c, v)
    }"""
    (unit,) = units_of(text, "w", 1, 1)
    assert unit == {("w", 1): [1], ("v", 0): [1, 7, 13]}
    assert exact(weighted(text)) == 1


def test_concat_joins_the_other_axes() -> None:
    text = """g (float[N, 4] x, float[4, 6] w, float[4, 6] w1, float[4, 1] s, float[6, 2] v) => (float[M, 2] y) {
      a = MatMul(x, w)
      b = MatMul(x, w1)
      c = Concat <axis = 0> (a, b)
      y = MatMul(c, v)
    }"""
    (members,) = group_members(text)
    assert {("w", 1), ("w1", 1), ("v", 0)} <= members
    assert exact(weighted(text)) == 1


def test_a_sum_of_concats_cut_differently() -> None:
    text = """g (float[N, 4] x, float[4, 6] a, float[4, 2] b, float[4, 3] c, float[4, 5] d, float[8, 2] v)
        => (float[N, 2] y) {
      a1 = MatMul(x, a)
      b1 = MatMul(x, b)
      c1 = MatMul(x, c)
      d1 = MatMul(x, d)
      p = Concat <axis = 1> (a1, b1)
      q = Concat <axis = 1> (c1, d1)
      s = Add(p, q)
      y = MatMul(s, v)
    }"""
    assert group_sizes(text) == [2, 3, 3]
    assert exact(weighted(text)) == 3


# --- Split ------------------------------------------------------------------------------------------------------------


def split_model(opset: int, form: str, sizes: list[int]) -> onnx.ModelProto:
    chain = Chain(sum(sizes), opset)
    names = [f"part{place}" for place in range(len(sizes))]
    inputs = [chain.x]
    attributes: dict[str, Any] = {"axis": 2}
    if form == "sizes" and opset >= 13:
        inputs.append(chain.net.ints(*sizes))
    elif form == "sizes":
        attributes["split"] = sizes
    elif opset >= 18:
        attributes["num_outputs"] = len(sizes)
    chain.net.named("Split", inputs, names, **attributes)
    first, *others = names
    return chain.model(chain.net.concat(*others, chain.net.sigmoid(first), axis=2), sum(sizes))


@pytest.mark.parametrize("opset", [7, 11, 13, 18])
@pytest.mark.parametrize("form, sizes", [("sizes", [4, 3, 5]), ("even", [4, 4, 4])])
def test_split(opset: int, form: str, sizes: list[int]) -> None:
    model = split_model(opset, form, sizes)
    assert group_sizes(model) == sorted(sizes)
    assert exact(model) == 3


def test_split_into_parts_that_do_not_divide() -> None:
    """num_outputs = 3 of 10 makes 4, 4 and 2."""
    model = split_model(18, "even", [4, 4, 2])
    assert group_sizes(model) == [2, 4, 4]
    assert exact(model) == 3


def test_halves_that_meet_are_one() -> None:
    """A gated layer in one product: [gate | up]."""
    chain = Chain(12)
    gate, up = chain.net.split(chain.x, 6, 6, axis=-1)
    model = chain.model(chain.net.mul(chain.net.sigmoid(gate), up), 6)
    analysis = analysis_of(model)
    (unit,) = units_of(analysis, chain.weight, 1, 2)
    assert unit == {(chain.weight, 1): [2, 8], (chain.reader, 0): [2]}
    assert exact(model) == 1


def test_a_piece_that_nobody_reads_goes_with_its_weights() -> None:
    chain = Chain(12)
    chain.net.named("Split", [chain.x, chain.net.ints(4, 8)], ["unread", "rest"], axis=2)
    model = chain.model("rest", 8)
    assert group_sizes(model) == [4, 8]
    assert check_exact(model, seeds=(0,)) == 2


def test_an_axis_of_positions_and_channels_is_not_split() -> None:
    """Which channels its halves have differs from run to run."""
    text = """g (float[N, 4, 6] x, float[6, 8] w, float[8, 2] v) => (float[M, 2] y) {
      a = MatMul(x, w)
      all = Constant <value = int64[1] {-1}> ()
      f = Reshape(a, all)
      b, c = Split <num_outputs = 2> (f)
      d = Add(b, c)
      back = Constant <value = int64[2] {-1, 8}> ()
      e = Reshape(d, back)
      y = MatMul(e, v)
    }"""
    assert "positions on an axis whose size varies" in reasons_of(text, "f", 0)
    assert group_members(text) == []


def test_sizes_of_pieces_that_are_computed() -> None:
    """Halves of what Shape says."""
    text = """g (float[N, 6] x, float[6, 12] w, float[6, 3] v, float[6, 3] u) => (float[N, 3] y) {
      a = MatMul(x, w)
      sizes = Shape(a)
      one = Constant <value_ints = [1]> ()
      two = Constant <value_ints = [2]> ()
      all = Gather(sizes, one)
      half = Div(all, two)
      halves = Concat <axis = 0> (half, half)
      b, c = Split <axis = 1> (a, halves)
      d = Exp(b)
      e = MatMul(d, v)
      f = MatMul(c, u)
      y = Add(e, f)
    }"""
    assert group_sizes(text) == [6, 6]
    assert exact(weighted(text)) == 2


# --- Pad --------------------------------------------------------------------------------------------------------------


def pad_model(
    opset: int, form: str, low: int, high: int, value: float = 0.5, mode: str = "constant"
) -> onnx.ModelProto:
    chain = Chain(8, opset)
    net, pads = chain.net, [0, 0, low, 0, 0, high]
    if opset < 11:
        x = net.op("Pad", chain.x, pads=pads, mode=mode, value=value)
    elif form == "axes":
        x = net.op("Pad", chain.x, net.ints(low, high), net.const(value), net.ints(-1), mode=mode)
    else:
        x = net.op("Pad", chain.x, net.ints(*pads), net.const(value), mode=mode)
    return chain.model(x, 8 + low + high)


@pytest.mark.parametrize("opset, form", [(7, ""), (11, ""), (18, ""), (18, "axes")])
@pytest.mark.parametrize("low, high", [(2, 3), (0, 4), (3, 0)])
def test_pad(opset: int, form: str, low: int, high: int) -> None:
    model = pad_model(opset, form, low, high)
    assert group_sizes(model) == sorted(size for size in (8, low, high) if size > 1)
    assert check_exact(model, seeds=(0,))


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_padding_that_repeats_pins(mode: str) -> None:
    model = pad_model(13, "", 2, 2, mode=mode)
    analysis = analysis_of(model)
    assert analysis.groups == ()
    assert f"padded ({mode})" in {pin.reason for pin in analysis.pins}


@pytest.mark.parametrize("low, high", [(-2, 3), (3, -2)])
def test_padding_that_cuts_off_pins(low: int, high: int) -> None:
    model = pad_model(13, "", low, high)
    assert analysis_of(model).groups == ()


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_padded_pixels_leave_channels_alone(mode: str) -> None:
    text = f"""g (float[N, 3, 4, 4] x, float[6, 3, 1, 1] w, float[5, 6, 3, 3] v)
        => (float[N, 5, 4, 4] y) <int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}> {{
      a = Conv(x, w)
      b = Pad <mode = "{mode}"> (a, pads)
      y = Conv(b, v)
    }}"""
    assert group_sizes(text) == [6]
    assert exact(weighted(text)) == 1


def test_amounts_that_are_computed_stay() -> None:
    """Rows are padded by half of the image: then all amounts come from the graph, and padded channels stay."""
    text = """g (float[N, 3, H, 4] x, float[6, 3, 1, 1] w, float[5, 10, 1, 1] v) => (float[N, 5, A, 4] y) {
      a = Conv(x, w)
      sizes = Shape(x)
      two = Constant <value_ints = [2]> ()
      height = Gather(sizes, two)
      half = Div(height, two)
      zero = Constant <value_ints = [0]> ()
      pads = Concat <axis = 0> (zero, two, half, zero, zero, two, zero, zero)
      b = Pad(a, pads)
      y = Conv(b, v)
    }"""
    assert group_sizes(text) == [6]
    assert ("b", 0, "Pad", "padded by amounts that are computed") in pins_of(text)
    model = weighted(text)
    assert check_exact(model, seeds=(0,), sizes={"N": 2, "H": 6}) == 1


def test_a_shortcut_without_weights() -> None:
    """ResNet on CIFAR, option A: every other pixel, and channels padded with zeros. Stages hang together, with units of
    different lengths.
    """
    net = Net("option_a", 13)
    first = net.weight(4, 3, 1, 1)
    x = net.relu(net.op("Conv", net.input("x", 2, 3, 8, 8), first))
    second = net.weight(8, 4, 3, 3)
    y = net.op("Conv", x, second, strides=[2, 2], pads=[1, 1, 1, 1])
    short = net.op("Slice", x, net.ints(0, 0), net.ints(8, 8), net.ints(2, 3), net.ints(2, 2))
    short = net.op("Pad", short, net.ints(0, 2, 0, 0, 0, 2, 0, 0))
    z = net.relu(net.add(y, short))
    last = net.weight(5, 8, 1, 1)
    model = net.model(net.op("Conv", z, last))
    analysis = analysis_of(model)
    assert sorted(group.size for group in analysis.groups) == [2, 2, 4]
    (unit,) = units_of(analysis, first, 0, 1)
    assert unit == {(first, 0): [1], (second, 0): [3], (second, 1): [1], (last, 1): [3]}
    (unit,) = units_of(analysis, second, 0, 7)
    assert unit == {(second, 0): [7], (last, 1): [7]}
    assert exact(model) == 3
