"""Axes that are joined: definitions hold everywhere, factorisations meet or are refused with words."""

from __future__ import annotations

import pytest

from spa_compiler.analysis.axes import Axes
from spa_compiler.analysis.terms import Axis, Dim
from tests.analysis.forms import agree, form, hangs_on, product


def test_equal_sizes_become_one() -> None:
    axes = Axes()
    a, b, c = (axes.fresh(6) for _ in range(3))
    assert axes.join(a, b) is None
    assert axes.join(b, c) is None
    assert axes.resolve(a) == axes.resolve(c)
    assert agree(axes, a, b, c)


def test_a_product_holds_in_every_axis() -> None:
    axes = Axes()
    channels, elsewhere = axes.fresh(12), axes.fresh(12)
    axes.join(channels, elsewhere)
    assert axes.join(channels, product(3, 4)) is None
    assert form(axes, elsewhere) == (3, 4)


def test_a_sum_holds_in_every_axis() -> None:
    axes = Axes()
    channels, elsewhere = axes.fresh(5), axes.fresh(5)
    axes.join(channels, elsewhere)
    parts = axes.fresh(2), axes.fresh(3)
    assert axes.join(axes.concat(parts), channels) is None
    assert form(axes, elsewhere) == [2, 3]
    assert agree(axes, elsewhere, axes.concat(parts))


def test_factorisations_refine_each_other() -> None:
    axes = Axes()
    axis = axes.fresh(12)
    assert axes.join(axis, product(3, 4)) is None
    assert axes.join(axis, product(6, 2)) is None
    assert form(axes, axis) == (3, 2, 2)


@pytest.mark.parametrize(
    "first, second, said", [((3, 4), (2, 6), "4 and 6"), ((6, 4), (4, 6), "4 and 6"), ((2, 9), (3, 6), "6 and 9")]
)
def test_factorisations_that_do_not_fit(first: tuple[int, int], second: tuple[int, int], said: str) -> None:
    axes = Axes()
    axis = axes.fresh(first[0] * first[1])
    assert axes.join(axis, product(*first)) is None
    assert axes.join(axis, product(*second)) == f"incompatible factorisations {said}"
    assert form(axes, axis) == first


def test_a_product_of_a_class_with_itself() -> None:
    axes = Axes()
    one, other = Dim(3), Dim(3)
    assert axes.join(Axis.of(one, other), Axis.of(other, one)) is None
    assert list(axes.atoms(Axis.of(one))) == list(axes.atoms(Axis.of(other)))


def test_sizes_that_differ_or_are_unknown() -> None:
    axes = Axes()
    assert axes.join(axes.fresh(4), axes.fresh(5)) == "sizes 4 and 5 differ"
    assert axes.join(axes.fresh(4), axes.fresh(None)) == "meets an axis of unknown size"
    assert axes.join(axes.fresh(None), axes.fresh(None)) is None
    merged = Axis.of(Dim(3), Dim(None))
    assert axes.size(merged) is None
    assert axes.join(merged, axes.fresh(None)) == "meets an axis of unknown size"
    assert axes.join(merged, merged) is None


def test_sums_join_term_by_term() -> None:
    axes = Axes()
    a, b, c, d = (axes.fresh(size) for size in (2, 3, 2, 3))
    assert axes.join(axes.concat([a, b]), axes.concat([c, d])) is None
    assert agree(axes, a, c)
    assert agree(axes, b, d)


def test_sums_cut_each_other() -> None:
    axes = Axes()
    a, b, c, d = (axes.fresh(size) for size in (2, 5, 4, 3))
    assert axes.join(axes.concat([a, b]), axes.concat([c, d])) is None
    assert [form(axes, axis) for axis in (a, b, c, d)] == [2, [2, 3], [2, 2], 3]
    assert agree(axes, axes.concat([a, b]), axes.concat([c, d]))


def test_a_sum_of_one_dim_twice() -> None:
    """A doubled axis (Swin's patch merging) meets a plain one: both halves die together."""
    axes = Axes()
    half, whole = axes.fresh(3), axes.fresh(6)
    assert axes.join(whole, axes.concat([half, half])) is None
    ((*found,),) = hangs_on(axes, whole)
    assert found[:3] == found[3:]


def test_part_of_a_merged_axis_is_refused() -> None:
    axes = Axes()
    reason = axes.join(product(3, 2), axes.concat([axes.fresh(3), axes.fresh(3)]))
    assert reason == "part of an axis meets a merged axis"
    assert axes.join(product(3, 2), axes.concat([axes.fresh(4), axes.fresh(2)])) is None  # between rows


def test_rows_of_a_merged_axis_meet_a_sum() -> None:
    """A fused [q | k] block meets (3, 4): its rows of 4 are cut, and both pieces share their columns."""
    axes = Axes()
    pieces, merged = axes.concat([axes.fresh(8), axes.fresh(4)]), product(3, 4)
    assert axes.join(pieces, merged) is None
    assert form(axes, merged) == [(2, 4), 4]
    assert agree(axes, pieces, merged)


def test_labels_survive_joins_and_splits() -> None:
    axes = Axes()
    plain, group = axes.fresh(8), axes.fresh(8, "conv group")
    axes.join(plain, group)
    axes.join(plain, product(4, 2))
    assert {atom.label for atom in axes.atoms(plain)} == {"conv group"}
    axes.split(axes.factor(plain, [4, 2])[0], [1, 3])
    assert {atom.label for atom in axes.atoms(plain)} == {"conv group"}
