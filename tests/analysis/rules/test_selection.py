"""Slice, Gather: an axis chosen from another, in every form that opsets give these operators."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.analysis.cut import cut
from spa_compiler.graph.load import load
from tests.analysis.chain import Chain, exact
from tests.analysis.exactness import check_exact
from tests.analysis.told import analysis_of, group_members, group_sizes, pins_of, reasons_of, units_of, weighted

# --- Slice ------------------------------------------------------------------------------------------------------------


def slice_model(size: int, start: int, end: int, opset: int, left: int) -> onnx.ModelProto:
    chain = Chain(size, opset)
    if opset >= 10:
        ints = chain.net.ints
        x = chain.net.op("Slice", chain.x, ints(start), ints(end), ints(2))
    else:
        x = chain.net.op("Slice", chain.x, starts=[start], ends=[end], axes=[2])
    return chain.model(x, left)


@pytest.mark.parametrize("opset", [9, 10, 13])
@pytest.mark.parametrize("start, end", [(3, 9), (-5, 1000), (0, -4), (4, 2**31 - 1)])
def test_slice(opset: int, start: int, end: int) -> None:
    left = len(range(12)[start:end])
    model = slice_model(12, start, end, opset, left)
    assert sum(group_sizes(model)) == 12
    assert check_exact(model, seeds=(0,))


def slice_of_all(opset: int, start: int, end: int, step: int, size: int = 12) -> tuple[onnx.ModelProto, int]:
    """The part that is taken, beside all of it."""
    chain = Chain(size, opset)
    ints = chain.net.ints
    part = chain.net.op("Slice", chain.x, ints(start), ints(end), ints(-1), ints(step))
    left = len(range(size)[slice(start, end if end > -(2**60) else None, step)])
    both = chain.net.concat(chain.net.op("Neg", part), chain.x, axis=2)
    return chain.model(both, left + size), left


@pytest.mark.parametrize("opset", [10, 13])
@pytest.mark.parametrize(
    "start, end, step",
    [(0, 12, 2), (1, 12, 3), (1, 12, 5), (2, 11, 2), (-1, -(2**62), -1), (10, 1, -3), (1, 12, 1), (3, 9, 1)],
)
def test_slice_with_steps(opset: int, start: int, end: int, step: int) -> None:
    """Whatever is taken, every channel can go: none is lost to a piece of one index."""
    model, _ = slice_of_all(opset, start, end, step)
    assert 0.9 * 12 <= sum(group_sizes(model)) <= 12 or step in (2, 3)
    assert exact(model)


def test_a_step_that_fits_splits_the_axis() -> None:
    """x[.., ::2] are the first of (6, 2): pairs go together, as in rotary embeddings that are interleaved."""
    model, _ = slice_of_all(13, 0, 12, 2)
    analysis = analysis_of(model)
    assert [group.size for group in analysis.groups][:1] == [6]
    assert "selected by Slice" in {pin.reason for pin in analysis.pins}


def slices_in(model: onnx.ModelProto, removed: dict[int, list[int]]) -> list[str]:
    loaded = load(model)
    return [node.op for node in cut(loaded, analyze(loaded), removed).graph.nodes if node.op in ("Slice", "Gather")]


def test_what_is_left_of_a_slice_is_a_range_where_it_can_be() -> None:
    model, _ = slice_of_all(13, 3, 9, 1)
    everything = {group.id: [1] for group in analysis_of(model).groups}
    assert slices_in(model, everything) == ["Slice"]


def test_what_is_no_range_any_more_is_gathered() -> None:
    """Every fifth of eleven: without index 2 the places are 1, 5, 10."""
    model, _ = slice_of_all(13, 1, 12, 5, 11)
    analysis = analysis_of(model)
    (group,) = analysis.groups
    assert group.size == 11
    assert slices_in(model, {0: [2]}) == ["Slice", "Gather"]
    assert exact(model) == 1


def test_starts_that_are_computed_but_always_the_same() -> None:
    """Rotate-half as exporters write it: half of the size, read from Shape."""
    text = """g (float[N, 5, 6] x, float[6, 12] w, float[12, 3] v) => (float[N, 5, 3] y) {
      a = MatMul(x, w)
      sizes = Shape(a)
      axis = Constant <value_ints = [2]> ()
      all = Gather(sizes, axis)
      halves = Constant <value_ints = [2]> ()
      half = Div(all, halves)
      begin = Constant <value_ints = [0]> ()
      end = Constant <value_ints = [4611686018427387904]> ()
      low = Slice(a, begin, half, axis)
      high = Slice(a, half, end, axis)
      c = Neg(high)
      d = Concat <axis = 2> (c, low)
      y = MatMul(d, v)
    }"""
    assert group_sizes(text) == [6, 6]
    assert exact(weighted(text)) == 2


def test_starts_that_come_from_an_input_pin() -> None:
    text = """g (float[N, 6] x, int64[1] xs, float[6, 12] w, float[4, 3] v) => (float[N, 3] y) {
      a = MatMul(x, w)
      end = Constant <value_ints = [9000]> ()
      axis = Constant <value_ints = [1]> ()
      b = Slice(a, xs, end, axis)
      y = MatMul(b, v)
    }"""
    assert group_sizes(text) == []
    assert ("a", 1, "Slice", "sliced at run time") in pins_of(text)


@pytest.mark.parametrize(
    "lines, left",
    [
        ("end = Add(m, four)\n b = Slice(a, m, end, axis)", 4),  # from channel 1 or 2 on
        ("step = Add(m, one)\n b = Slice(a, zero, four, axis, step)", 2),  # in steps of 2 or 3
    ],
)
def test_what_hangs_on_the_length_of_a_sequence_pins(lines: str, left: int) -> None:
    """As many are taken for each length, but not the same ones."""
    text = f"""g (float[1, S, 6] x, float[6, 12] w, float[{left}, 3] v) => (float[1, S, 3] y) <float[1, S, {left}] b> {{
      a = MatMul(x, w)
      sizes = Shape(x)
      one = Constant <value_ints = [1]> ()
      zero = Constant <value_ints = [0]> ()
      axis = Constant <value_ints = [2]> ()
      three = Constant <value_ints = [3]> ()
      four = Constant <value_ints = [4]> ()
      length = Gather(sizes, one)
      m = Mod(length, three)
      {lines}
      y = MatMul(b, v)
    }}"""
    assert ("a", 2, "Slice", "sliced at run time") in pins_of(text)
    assert group_members(text) == []


MERGED = """g (float[N, 4, 6] x, float[6, 8] w, float[8, 2] v) => (float[M, 2] y) {{
  a = MatMul(x, w)
  all = Constant <value = int64[1] {{-1}}> ()
  f = Reshape(a, all)
  zero = Constant <value_ints = [0]> ()
  eight = Constant <value_ints = [8]> ()
  end = Constant <value_ints = [4611686018427387904]> ()
  row = Constant <value_ints = [0, 1, 2, 3, 4, 5, 6, 7]> ()
  b = {}
  back = Constant <value = int64[2] {{-1, 8}}> ()
  e = Reshape(b, back)
  y = MatMul(e, v)
}}"""


@pytest.mark.parametrize(
    "taken, reason",
    [
        ("Slice(f, eight, end, zero)", "sliced at run time"),
        ("Gather(f, row)", "positions on an axis whose size varies"),
    ],
)
def test_nothing_is_selected_from_positions_and_channels(taken: str, reason: str) -> None:
    """Which channels an index means differs from run to run; all of them are all of them."""
    text = MERGED.format(taken)
    assert reason in reasons_of(text, "f", 0)
    assert group_members(text) == []


def test_all_positions_and_channels_may_be_sliced() -> None:
    text = MERGED.format("Slice(f, zero, end, zero)")
    assert group_sizes(text) == [8]
    assert exact(weighted(text)) == 1


def test_a_slice_of_positions_and_of_channels() -> None:
    """The positions that are taken depend on the sequence, the channels do not: these can go."""
    text = """g (float[1, S, 6] x, float[6, 12] w, float[7, 3] v) => (float[1, T, 3] y) {
      a = MatMul(x, w)
      sizes = Shape(x)
      one = Constant <value_ints = [1]> ()
      length = Gather(sizes, one)
      last = Sub(length, one)
      from = Constant <value_ints = [2]> ()
      to = Constant <value_ints = [9]> ()
      starts = Concat <axis = 0> (one, from)
      ends = Concat <axis = 0> (last, to)
      axes = Constant <value_ints = [1, 2]> ()
      b = Slice(a, starts, ends, axes)
      c = Sigmoid(b)
      y = MatMul(c, v)
    }"""
    model = weighted(text)
    assert group_sizes(model) == [2, 3, 7]
    for length in (5, 9):
        assert check_exact(model, seeds=(0,), sizes={"S": length}) == 3


@pytest.mark.parametrize("to, step, left, groups", [(9, 1, 7, 3), (11, 2, 5, 1)])
def test_operands_of_32_bits(to: int, step: int, left: int, groups: int) -> None:
    """As above, with int32 all through: what a cut writes has the type of what stays, steps among it."""
    text = f"""g (float[1, S, 6] x, float[6, 12] w, float[{left}, 3] v) => (float[1, T, 3] y) {{
      a = MatMul(x, w)
      sizes64 = Shape(x)
      sizes = Cast <to = 6> (sizes64)
      one = Constant <value = int32[1] {{1}}> ()
      at = Constant <value_ints = [1]> ()
      length = Gather(sizes, at)
      last = Sub(length, one)
      from = Constant <value = int32[1] {{2}}> ()
      to = Constant <value = int32[1] {{{to}}}> ()
      starts = Concat <axis = 0> (one, from)
      ends = Concat <axis = 0> (last, to)
      axes = Constant <value = int32[2] {{1, 2}}> ()
      steps = Constant <value = int32[2] {{1, {step}}}> ()
      b = Slice(a, starts, ends, axes, steps)
      c = Sigmoid(b)
      y = MatMul(c, v)
    }}"""
    assert check_exact(weighted(text), seeds=(0,), sizes={"S": 6}) == groups


# --- Gather -----------------------------------------------------------------------------------------------------------


def gather_model(indices: list[int], size: int = 12, opset: int = 13) -> tuple[Chain, onnx.ModelProto, Analysis]:
    chain = Chain(size, opset)
    x = chain.net.gather(chain.x, chain.net.ints(*indices), axis=2)
    model = chain.model(x, len(indices))
    return chain, model, analysis_of(model)


@pytest.mark.parametrize("opset", [7, 13])
def test_gather_of_a_run(opset: int) -> None:
    _, model, analysis = gather_model([3, 4, 5, 6, 7, 8], opset=opset)
    assert sorted(group.size for group in analysis.groups) == [3, 3, 6]
    assert check_exact(model, seeds=(0,)) == 3


def test_gather_of_a_permutation() -> None:
    order = np.random.default_rng(0).permutation(12).tolist()
    chain, model, analysis = gather_model(order)
    (group,) = analysis.groups
    assert group.size == 12
    (unit,) = units_of(analysis, chain.weight, 1, 5)
    assert unit == {(chain.weight, 1): [5], (chain.reader, 0): [order.index(5)]}
    assert exact(model) == 1


def test_gather_of_many_runs_is_a_permutation() -> None:
    """Pairs in reverse order: 8 of them are pieces, 40 are single indices of one group."""
    for count, sizes in ((8, [2] * 8), (40, [80])):
        pairs = [index for pair in range(count)[::-1] for index in (2 * pair, 2 * pair + 1)]
        assert sorted(group.size for group in gather_model(pairs, 2 * count)[2].groups) == sizes


def test_gather_of_halves_the_other_way_round() -> None:
    chain, model, analysis = gather_model([*range(6, 12), *range(6)])
    assert [group.size for group in analysis.groups] == [6, 6]
    (unit,) = units_of(analysis, chain.weight, 1, 7)
    assert unit == {(chain.weight, 1): [7], (chain.reader, 0): [1]}
    assert exact(model) == 2


def test_gather_of_an_index_twice() -> None:
    """Both copies go with it."""
    chain, model, analysis = gather_model([2, 0, 2, 5, 9, 3])
    (unit,) = units_of(analysis, chain.weight, 1, 2)
    assert unit == {(chain.weight, 1): [2], (chain.reader, 0): [0, 2]}
    assert sum(group.size for group in analysis.groups) == 12, "what is not taken can go too"
    assert check_exact(model, seeds=(0,)) == 1


def test_gather_of_what_was_gathered() -> None:
    chain = Chain(12)
    net = chain.net
    first = net.gather(chain.x, net.ints(3, 1, 7, 2, 7, 9), axis=2)
    model = chain.model(net.gather(first, net.ints(5, 0, 2, 2, 4), axis=2), 5)
    (unit,) = units_of(model, chain.weight, 1, 7)
    assert unit == {(chain.weight, 1): [7], (chain.reader, 0): [2, 3, 4]}
    assert check_exact(model, seeds=(0,)) == 1


def test_gather_by_a_range_that_is_computed() -> None:
    """As many as there are channels: the same for every input, though no constant says so."""
    text = """g (float[N, 5, 6] x, float[6, 8] w, float[8, 3] v) => (float[N, 5, 3] y) {
      a = MatMul(x, w)
      sizes = Shape(a)
      two = Constant <value = int64 {2}> ()
      count = Gather(sizes, two)
      zero = Constant <value = int64 {0}> ()
      one = Constant <value = int64 {1}> ()
      all = Range(zero, count, one)
      b = Gather <axis = 2> (a, all)
      y = MatMul(b, v)
    }"""
    assert group_sizes(text) == [8]
    assert exact(weighted(text)) == 1


def test_gather_of_negative_indices() -> None:
    chain, model, analysis = gather_model([-1, 3, -4, 0])
    (unit,) = units_of(analysis, chain.weight, 1, 11)
    assert unit == {(chain.weight, 1): [11], (chain.reader, 0): [0]}
    assert check_exact(model, seeds=(0,)) == 1


def test_gather_of_one_keeps_that_one() -> None:
    chain = Chain(12)
    x = chain.net.unsqueeze(chain.net.gather(chain.x, chain.net.number(-2), axis=2), 2)
    model = chain.model(x, 1)
    analysis = analysis_of(model)
    (group,) = analysis.groups
    assert group.size == 11
    assert units_of(analysis, chain.weight, 1, 10) == []
    assert "selected by Gather" in {pin.reason for pin in analysis.pins}
    assert check_exact(model, seeds=(0,)) == 1


def test_queries_keys_and_values_that_are_gathered() -> None:
    """[N, 5, 3 * 4] -> [3, N, 5, 4]: the factor of three stays, each channel goes from all three."""
    chain = Chain(12)
    net = chain.net
    y = net.transpose(net.reshape(chain.x, 0, 5, 3, 4), 2, 0, 1, 3)
    q, k, v = (net.gather(y, net.number(place)) for place in range(3))
    model = chain.model(net.mul(net.mul(q, k), v), 4)
    analysis = analysis_of(model)
    assert [group.size for group in analysis.groups] == [4]
    (unit,) = units_of(analysis, chain.weight, 1, 1)
    assert unit == {(chain.weight, 1): [1, 5, 9], (chain.reader, 0): [1]}
    assert exact(model) == 1


def test_an_embedding() -> None:
    """Rows are chosen by the input, columns can go."""
    text = """g (int64[N, 5] x, float[9, 6] e, float[6, 3] v) => (float[N, 5, 3] y) {
      a = Gather(e, x)
      y = MatMul(a, v)
    }"""
    analysis = analysis_of(text)
    assert reasons_of(analysis, "e", 0) == {"selected by indices that are computed"}
    assert group_members(text) == [{("e", 1), ("a", 2), ("v", 0)}]
    assert exact(weighted(text)) == 1


def test_a_table_of_indices() -> None:
    """Rows of relative positions by a constant table of rank 2: heads, on the other axis, can go."""
    text = """g (float[N, 4, 3, 3] x, float[4, 4, 1, 1] w, float[5, 4] table, int64[3, 3] index, float[2, 4, 1, 1] v)
        => (float[N, 2, 3, 3] y) {
      a = Conv(x, w)
      b = Gather(table, index)
      c = Transpose <perm = [2, 0, 1]> (b)
      d = Add(a, c)
      y = Conv(d, v)
    }"""
    model = weighted(text)
    for tensor in model.graph.initializer:
        if tensor.name == "index":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.arange(9).reshape(3, 3) % 5, "index"))
    analysis = analysis_of(model)
    assert reasons_of(analysis, "table", 0) == {"selected by a table"}
    assert {(m.tensor, m.axis) for group in analysis.groups for m in group.parameters} == {
        ("w", 0),
        ("table", 1),
        ("v", 1),
    }
    assert exact(model) == 1


VIEW = """g (float[N, 6] x, float[6, 8] w, float[8, 3] v) => (float[N, 3] y) {
  a = MatMul(x, w)
  flat = Constant <value = int64[1] {-1}> ()
  vector = Reshape(a, flat)
  s = Shape(x)
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  rows = Gather(s, zero)
  row = Range(zero, rows, one)
  eight = Constant <value = int64 {8}> ()
  start = Mul(row, eight)
  last = Constant <value = int64[1] {1}> ()
  column = Unsqueeze(start, last)
  steps = Constant <value = int64[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
  indices = Add(column, steps)
  b = Gather(vector, indices)
  y = MatMul(b, v)
}"""


def test_a_view_that_is_written_as_a_gather() -> None:
    assert group_members(VIEW) == [{("w", 1), ("a", 1), ("b", 1), ("v", 0)}]
    model = weighted(VIEW)
    assert exact(model) == 1
    loaded = load(model)
    small = cut(loaded, analyze(loaded), {0: [1, 2]})
    assert [node.op for node in small.graph.nodes if node.outputs[0].name == "b"] == ["Reshape"]


def test_a_gather_in_another_order_is_no_view() -> None:
    """What is selected may shrink, with the table that selects it; what it is selected from may not."""
    text = VIEW.replace("{0, 1, 2, 3, 4, 5, 6, 7}", "{1, 0, 2, 3, 4, 5, 6, 7}")
    (members,) = group_members(text)
    assert {("steps", 0), ("b", 1), ("v", 0)} <= members
    assert ("w", 1) not in members
    assert exact(weighted(text)) == 1
