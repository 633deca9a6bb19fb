"""From facts to groups, units, pins and counts, on facts stated by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from spa_compiler.analysis.facts import Facts, Pin, Work
from spa_compiler.analysis.groups import Member, partition
from spa_compiler.analysis.terms import Axis, Dim


def tensor(name: str, *shape: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, shape=list(shape))


def chain() -> tuple[Facts, dict[str, bool]]:
    """w1 [4 out] -> h [4] -> w2 [4 in]; input and output pinned."""
    facts = Facts()
    for each in (tensor("w1", 4, 3), tensor("w2", 5, 4), tensor("h", 4)):
        facts.of(each)
    facts.algebra.join(facts.axes["w1"][0], facts.axes["h"][0])
    facts.algebra.join(facts.axes["w2"][1], facts.axes["h"][0])
    facts.pin("graph input", tensor("w1"), 1, "interface")
    facts.pin("graph output", tensor("w2"), 0, "interface")
    facts.works.append(Work("y", (facts.axes["w2"][1], facts.axes["w2"][0]), 10))
    return facts, {"w1": True, "w2": True}


def test_an_axis_that_hangs_together_as_a_whole_stays() -> None:
    facts, constants = chain()
    axis = facts.axes["h"][0]
    facts.algebra.tie(axis, np.arange(3), axis, np.arange(1, 4))
    parts = partition(facts, constants)
    assert parts.groups == ()
    assert [pin.reason for pin in parts.pins if pin.op == "coupling"] == ["all that is on the axis hangs together"]


def test_one_group() -> None:
    parts = partition(*chain())
    (group,) = parts.groups
    assert (group.id, group.size, group.granularity, group.params, group.macs) == (0, 4, "channel", 32, 200)
    assert [(m.tensor, m.axis) for m in group.members] == [("w1", 0), ("w2", 1), ("h", 0)]
    assert [(s.name, s.axis, s.indices) for s in group.units[2].parameters] == [("w1", 0, [2]), ("w2", 1, [2])]
    assert [(s.name, s.axis, s.indices) for s in group.units[2].activations] == [("h", 0, [2])]
    assert (parts.params, parts.prunable) == (32, 32)
    assert [pin.params for pin in parts.pins] == [0, 0]


def test_a_pin_holds_what_nothing_else_removes() -> None:
    facts, constants = chain()
    facts.pin("Softmax", tensor("h"), 0, "removal is -inf")
    parts = partition(facts, constants)
    assert parts.groups == ()
    assert parts.prunable == 0
    assert {pin.op: pin.params for pin in parts.pins} == {"graph input": 12, "graph output": 20, "Softmax": 32}


def test_pinned_elements_leave_the_others_free() -> None:
    facts, constants = chain()
    facts.pin("Gather", tensor("h"), 0, "selected", indices=[1])
    parts = partition(facts, constants)
    (group,) = parts.groups
    assert [unit.parameters[0].indices for unit in group.units] == [[0], [2], [3]]
    assert group.params == 24
    assert parts.prunable == 24
    assert {pin.op: pin.params for pin in parts.pins} == {"graph input": 3, "graph output": 5, "Gather": 8}


def test_window_pins_hold_nothing() -> None:
    facts, constants = chain()
    facts.pin("Conv", tensor("h"), 0, "window", window=True)
    assert next(pin.params for pin in partition(facts, constants).pins if pin.op == "Conv") == 0


def test_the_same_pin_is_told_once() -> None:
    facts, constants = chain()
    facts.pin("graph input", tensor("w1"), 1, "interface")
    assert len(partition(facts, constants).pins) == 2


def test_a_pin_on_a_product_pins_its_factors() -> None:
    facts = Facts()
    a, b = Dim(2), Dim(3)
    facts.axes = {"w": (Axis.of(a, b),), "v": (Axis.of(a),), "u": (Axis.of(b),), "h": (Axis.of(a, b),)}
    facts.pins.append(Pin("w", 0, "TopK", "ranked", (Axis.of(a, b),), (4,)))  # index 4 is (1, 1)
    parts = partition(facts, {"w": True, "v": True, "u": True})
    assert [[slab.indices for slab in unit.parameters] for group in parts.groups for unit in group.units] == [
        [[0, 1, 2], [0]],
        [[0, 3], [0]],
        [[2, 5], [2]],
    ]
    assert parts.params == 11
    assert parts.prunable == 5 + 1 + 2


def test_a_sum_makes_units_of_different_lengths() -> None:
    """C2f: half of a convolution is read as it is, the other half also by a bottleneck; a Concat reads both."""
    facts = Facts()
    whole = facts.algebra.fresh(4)
    first, second = facts.algebra.split(whole, [2, 2])
    both = facts.algebra.concat([first, second])
    facts.axes = {"conv": (whole,), "bottleneck": (second,), "reader": (both,), "h": (whole,)}
    groups = partition(facts, {"conv": True, "bottleneck": True, "reader": True}).groups
    found = [[(slab.name, slab.indices) for slab in unit.parameters] for group in groups for unit in group.units]
    assert found == [
        [("conv", [0]), ("reader", [0])],
        [("conv", [1]), ("reader", [1])],
        [("conv", [2]), ("bottleneck", [0]), ("reader", [2])],
        [("conv", [3]), ("bottleneck", [1]), ("reader", [3])],
    ]
    assert [group.params for group in groups] == [4, 6]


def test_links_make_one_group() -> None:
    """A Gather of [2, 0, 2]: index 1 is a unit of its own, and index 2 takes two indices of the result."""
    facts = Facts()
    source, chosen = facts.algebra.fresh(3), facts.algebra.fresh(3)
    facts.axes = {"w": (source,), "v": (chosen,), "h": (source,)}
    facts.algebra.tie(source, np.array([2, 0, 2]), chosen, np.arange(3))
    (group,) = partition(facts, {"w": True, "v": True}).groups
    assert [[(slab.name, slab.indices) for slab in unit.parameters] for unit in group.units] == [
        [("w", [0]), ("v", [1])],
        [("w", [1])],
        [("w", [2]), ("v", [0, 2])],
    ]
    assert [dim.tolist() for dim in group.dims] == [[0, 1, 2], [2, 0, 2]]


def test_dims_tell_what_is_pinned_of_them() -> None:
    facts, constants = chain()
    facts.pin("Gather", tensor("h"), 0, "selected", indices=[1])
    (group,) = partition(facts, constants).groups
    assert [dim.tolist() for dim in group.dims] == [[0, -1, 1, 2]]


def test_what_depends_on_the_inputs_is_no_member() -> None:
    """Heads merged with the batch: their indices mean nothing for another batch."""
    facts, constants = chain()
    h = facts.axes["h"][0]
    facts.axes["merged"] = (facts.algebra.merge([facts.algebra.fresh(2), h]),)
    facts.settled.varies["merged"] = (True,)
    (group,) = partition(facts, constants).groups
    assert [(m.tensor, m.axis) for m in group.members] == [("w1", 0), ("w2", 1), ("h", 0)]


def test_labels_name_the_granularity() -> None:
    facts, constants = chain()
    facts.algebra.name(facts.axes["h"][0], "head")
    assert partition(facts, constants).groups[0].granularity == "head"


def test_one_dim_twice_in_a_tensor() -> None:
    facts = Facts()
    dim = Dim(3)
    facts.axes = {"gram": (Axis.of(dim), Axis.of(dim)), "four": (Axis(((dim,), (dim,))),), "h": (Axis.of(dim),)}
    (group,) = partition(facts, {"gram": True, "four": True}).groups
    assert group.params == 9 + 6
    assert [(s.name, s.axis, s.indices) for s in group.units[1].parameters] == [
        ("gram", 0, [1]),
        ("gram", 1, [1]),
        ("four", 0, [1, 4]),
    ]


def test_unknown_work_makes_unknown_macs() -> None:
    facts, constants = chain()
    facts.works.append(Work("z", (facts.axes["w1"][0],), None))
    assert partition(facts, constants).groups[0].macs is None
    facts, constants = chain()
    facts.works.append(Work("z", (facts.axes["w1"][1],), None))  # nothing of the group in it
    assert partition(facts, constants).groups[0].macs == 200


def test_shapes_and_indices_are_no_parameters() -> None:
    facts, _ = chain()
    parts = partition(facts, {"w1": True, "w2": False})
    assert parts.params == 12
    assert parts.groups[0].params == 12
    assert len(parts.groups[0].parameters) == 2


def test_what_lies_on_constants_alone_stays() -> None:
    """No mask of activations could show what removing it does."""
    facts, constants = chain()
    facts.of(tensor("sum", 2, 3))
    parts = partition(facts, {**constants, "sum": True})
    assert [group.params for group in parts.groups] == [32]
    assert {(pin.tensor, pin.axis, pin.reason, pin.params) for pin in parts.pins if pin.op == "constant"} == {
        ("sum", 0, "nothing but constants has it", 6),
        ("sum", 1, "nothing but constants has it", 6),
    }


def test_groups_without_parameters_are_not_told() -> None:
    facts, _ = chain()
    assert partition(facts, {}).groups == ()


def test_slabs() -> None:
    units = np.array([-1, 1, 0, 1])
    assert Member("t", 0, True, (units,)).slabs(3) == [[2], [1, 3], []]
    assert Member("t", 0, True, (units, np.array([0, 0, 0, 0]))).slabs(2) == [[0, 1, 2, 3], [1, 3]]
