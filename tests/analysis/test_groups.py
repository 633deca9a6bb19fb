"""From facts to groups, units, pins and counts, on facts stated by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from spa_compiler.analysis.axes import Axis, Dim
from spa_compiler.analysis.facts import Facts, Pin, Work
from spa_compiler.analysis.groups import Member, partition


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
    facts.axes = {"w": (Axis.of(a, b),), "v": (Axis.of(a),), "u": (Axis.of(b),)}
    facts.pins.append(Pin("w", 0, "TopK", "ranked", (Axis.of(a, b),), (4,)))  # index 4 is (1, 1)
    parts = partition(facts, {"w": True, "v": True, "u": True})
    assert [[slab.indices for slab in unit.parameters] for group in parts.groups for unit in group.units] == [
        [[0, 1, 2], [0]],
        [[0, 3], [0]],
        [[2, 5], [2]],
    ]
    assert parts.params == 11
    assert parts.prunable == 5 + 1 + 2


def test_links_make_units_of_different_lengths() -> None:
    """C2f: half of a convolution is read as it is, the other half also by a bottleneck; a Concat reads both."""
    facts = Facts()
    first, second, whole = Dim(2), Dim(2), Dim(4)
    facts.axes = {"conv": (Axis.of(whole),), "bottleneck": (Axis.of(second),), "reader": (Axis(((first,), (second,))),)}
    assert facts.algebra.join(Axis.of(whole), Axis(((first,), (second,)))) is None
    (group,) = partition(facts, {"conv": True, "bottleneck": True, "reader": True}).groups
    found = [[(slab.name, slab.indices) for slab in unit.parameters] for unit in group.units]
    assert found[0] == [("conv", [0]), ("reader", [0])]
    assert found[3] == [("conv", [3]), ("bottleneck", [1]), ("reader", [3])]
    assert group.params == 4 + 2 + 4


def test_one_dim_twice_in_a_tensor() -> None:
    facts = Facts()
    dim = Dim(3)
    facts.axes = {"gram": (Axis.of(dim), Axis.of(dim)), "four": (Axis(((dim,), (dim,))),)}
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


def test_groups_without_parameters_are_not_told() -> None:
    facts, _ = chain()
    assert partition(facts, {}).groups == ()


def test_slabs() -> None:
    units = np.array([-1, 1, 0, 1])
    assert Member("t", 0, True, (units,)).slabs(3) == [[2], [1, 3], []]
    assert Member("t", 0, True, (units, np.array([0, 0, 0, 0]))).slabs(2) == [[0, 1, 2, 3], [1, 3]]
