"""Every element has one number, what Links tie has one label, and pins hold labels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from spa_compiler.analysis.facts import Facts, Pin
from spa_compiler.analysis.numbering import Numbering, distinct
from spa_compiler.analysis.terms import Axis


def facts_of(**axes: Axis) -> Facts:
    return Facts(axes={name: (axis,) for name, axis in axes.items()})


def tensor(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name)


def test_elements_are_numbered_once() -> None:
    facts = Facts()
    a, b = facts.algebra.fresh(2), facts.algebra.fresh(3)
    facts.axes = {"w": (a, b), "v": (facts.algebra.merge([a, b]),), "u": (facts.algebra.concat([b, a]),)}
    numbering = Numbering(facts)
    assert numbering.on(a).tolist() == [[0, 1]]
    assert numbering.on(b).tolist() == [[2, 3, 4]]
    assert numbering.on(facts.axes["v"][0]).tolist() == [[0, 0, 0, 1, 1, 1], [2, 3, 4, 2, 3, 4]]
    assert numbering.on(facts.axes["u"][0]).tolist() == [[2, 3, 4, 0, 1]]
    assert numbering.free.all()


def test_of_an_axis_of_unknown_size_nothing_is_told() -> None:
    facts = Facts()
    facts.axes = {"x": (facts.algebra.fresh(None), facts.algebra.fresh(2))}
    numbering = Numbering(facts)
    assert numbering.on(facts.axes["x"][0]).size == 0
    assert not numbering.may_lose(facts.axes["x"][0])
    assert numbering.may_lose(facts.axes["x"][1])


def test_links_give_labels() -> None:
    facts = Facts()
    a, b = facts.algebra.fresh(3), facts.algebra.fresh(4)
    facts.axes = {"a": (a,), "b": (b,)}
    facts.algebra.tie(a, np.array([2, 0, 2]), b, np.array([0, 1, 3]))
    numbering = Numbering(facts)
    (left,), (right,) = numbering.on(a), numbering.on(b)
    assert left[2] == right[0] == right[3]
    assert left[0] == right[1]
    assert len({*left.tolist(), *right.tolist()}) == 4


def test_an_axis_that_is_split_later_may_be_linked() -> None:
    facts = Facts()
    a, b = facts.algebra.fresh(5), facts.algebra.fresh(5)
    facts.axes = {"a": (a,), "b": (b,)}
    facts.algebra.tie(a, np.arange(5)[::-1], b, np.arange(5))
    facts.algebra.split(a, [2, 3])
    numbering = Numbering(facts)
    assert numbering.on(a)[0].tolist() == numbering.on(b)[0, ::-1].tolist()
    assert numbering.free.all()


def test_a_linked_axis_that_is_merged_stays() -> None:
    facts = Facts()
    a, b = facts.algebra.fresh(6), facts.algebra.fresh(6)
    facts.axes = {"a": (a,), "b": (b,)}
    facts.algebra.tie(a, np.arange(6)[::-1], b, np.arange(6), "gathered")
    facts.algebra.factor(a, [2, 3])
    numbering = Numbering(facts)
    assert not numbering.may_lose(a)
    assert not numbering.may_lose(b)
    assert numbering.loose == {"gathered"}
    assert [(pin.tensor, pin.axis, pin.reason) for pin in facts.pins] == [
        ("a", 0, "part of an axis meets a merged axis")
    ]
    assert [labels.size for labels in numbering.held] == [11]


def test_pins_hold_labels() -> None:
    facts = Facts()
    a, b = facts.algebra.fresh(2), facts.algebra.fresh(3)
    facts.axes = {"w": (facts.algebra.merge([a, b]),), "v": (a,)}
    facts.pin("TopK", tensor("w"), 0, "ranked", indices=[4])  # (1, 1)
    facts.pin("TopK", tensor("v"), 0, "ranked", indices=[0])
    numbering = Numbering(facts)
    assert [labels.tolist() for labels in numbering.held] == [[1, 3], [0]]
    assert (~numbering.free[numbering.on(a)]).all()
    assert numbering.free[numbering.on(b)].tolist() == [[True, False, True]]
    assert not numbering.may_lose(a)
    assert numbering.may_lose(facts.axes["w"][0])


def test_a_pin_on_an_axis_holds_all_of_it() -> None:
    facts = Facts()
    a, b = facts.algebra.fresh(2), facts.algebra.fresh(3)
    facts.axes = {"w": (facts.algebra.concat([a, b]),)}
    facts.pins.append(Pin("w", 0, "TopK", "ranked", (b,)))
    numbering = Numbering(facts)
    assert numbering.may_lose(a)
    assert not numbering.may_lose(b)
    assert [labels.tolist() for labels in numbering.held] == [distinct(numbering.on(b)[0]).tolist()]


def test_a_pin_can_be_added() -> None:
    facts = facts_of(w=Facts().algebra.fresh(4))
    numbering = Numbering(facts)
    numbering.hold(Pin("w", 0, "constant", "why", (facts.axes["w"][0],)), np.array([1, 2]))
    assert numbering.free.tolist() == [True, False, False, True]
    assert len(numbering.held) == len(facts.pins) == 1


def test_what_goes_with_dead_labels() -> None:
    facts = Facts()
    a, b = facts.algebra.fresh(2), facts.algebra.fresh(3)
    merged = facts.algebra.merge([a, b])
    facts.axes = {"w": (merged,), "one": (facts.algebra.fresh(1),)}
    numbering = Numbering(facts)
    dead = np.zeros(numbering.free.size + 1, np.bool_)
    dead[numbering.on(a)[0, 1]] = True
    dead[numbering.on(b)[0, 0]] = True
    assert numbering.gone(merged, dead).tolist() == [True, False, False, True, True, True]
    assert numbering.gone(facts.axes["one"][0], dead).tolist() == [False]


def test_distinct() -> None:
    assert distinct(np.array([3, 1, 3, 2, 1])).tolist() == [1, 2, 3]
    assert distinct(np.zeros(0, np.int64)).size == 0
