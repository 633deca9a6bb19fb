"""The algebra alone: splits hold everywhere, factorisations meet or are refused with words, ranges become Links."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.analysis.axes import Axes, Axis, Dim


def sizes(axes: Axes, axis: Axis) -> list[list[int | None]]:
    return [[dim.size for dim in term] for term in axes.resolve(axis)]


def test_equal_sizes_become_one() -> None:
    axes = Axes()
    a, b, c = axes.fresh(6), axes.fresh(6), axes.fresh(6)
    assert axes.join(a, b) is None
    assert axes.join(b, c) is None
    assert axes.resolve(a) == axes.resolve(c)


def test_size_one_has_no_dims() -> None:
    axes = Axes()
    assert axes.resolve(axes.fresh(1)) == ((),)
    assert axes.size(axes.fresh(1)) == 1
    assert axes.resolve(Axis.of(Dim(1), Dim(3)))[0][0].size == 3


def test_a_split_holds_in_every_axis() -> None:
    axes = Axes()
    channels, elsewhere = axes.fresh(12), axes.fresh(12)
    axes.join(channels, elsewhere)
    assert axes.join(channels, Axis.of(Dim(3), Dim(4))) is None
    assert sizes(axes, elsewhere) == [[3, 4]]


def test_factorisations_refine_each_other() -> None:
    axes = Axes()
    axis = axes.fresh(12)
    assert axes.join(axis, Axis.of(Dim(3), Dim(4))) is None
    assert axes.join(axis, Axis.of(Dim(6), Dim(2))) is None
    assert sizes(axes, axis) == [[3, 2, 2]]


@pytest.mark.parametrize("first, second", [((3, 4), (2, 6)), ((6, 4), (4, 6))])
def test_factorisations_that_do_not_fit(first: tuple[int, int], second: tuple[int, int]) -> None:
    axes = Axes()
    axis = axes.fresh(first[0] * first[1])
    assert axes.join(axis, Axis.of(Dim(first[0]), Dim(first[1]))) is None
    reason = axes.join(axis, Axis.of(Dim(second[0]), Dim(second[1])))
    assert reason == f"incompatible factorisations {first[1]} and {second[1]}"
    assert sizes(axes, axis) == [list(first)]


def test_a_product_of_a_class_with_itself() -> None:
    axes = Axes()
    one, other = Dim(3), Dim(3)
    assert axes.join(Axis.of(one, other), Axis.of(other, one)) is None
    assert axes.atoms((one,)) == axes.atoms((other,))


def test_sizes_that_differ_or_are_unknown() -> None:
    axes = Axes()
    assert axes.join(axes.fresh(4), axes.fresh(5)) == "sizes 4 and 5 differ"
    assert axes.join(axes.fresh(4), axes.fresh(None)) == "meets an axis of unknown size"
    assert axes.join(axes.fresh(None), axes.fresh(None)) is None
    assert axes.size(Axis.of(Dim(3), Dim(None))) is None


def test_sums_join_term_by_term() -> None:
    axes = Axes()
    a, b, c, d = Dim(2), Dim(3), Dim(2), Dim(3)
    assert axes.join(Axis(((a,), (b,))), Axis(((c,), (d,)))) is None
    assert axes.atoms((a,)) == axes.atoms((c,))
    assert axes.atoms((b,)) == axes.atoms((d,))
    assert axes.links == ()


def test_sums_cut_differently_are_linked_by_element() -> None:
    axes = Axes()
    whole, left, right = Dim(5), Dim(2), Dim(3)
    assert axes.join(Axis.of(whole), Axis(((left,), (right,)))) is None
    found = [(link.left_indices.tolist(), link.right, link.right_indices.tolist()) for link in axes.links]
    assert found == [([0, 1], left, [0, 1]), ([2, 3, 4], right, [0, 1, 2])]


def test_part_of_a_product_is_refused() -> None:
    axes = Axes()
    reason = axes.join(Axis.of(Dim(3), Dim(2)), Axis(((Dim(4),), (Dim(2),))))
    assert reason == "part of an axis meets a merged axis"


def test_a_split_takes_linked_slabs_along() -> None:
    axes = Axes()
    whole, half = Dim(12), Dim(6)
    assert axes.link(whole, np.arange(6, 12), half, np.arange(6)) is None
    assert axes.join(Axis.of(whole), Axis.of(Dim(4), Dim(3))) is None
    assert [dim.size for dim in axes.atoms((half,))] == [2, 3]
    assert axes.atoms((half,))[1] is axes.atoms((whole,))[1]
    (link,) = axes.links
    assert (link.left_indices.tolist(), link.right_indices.tolist()) == ([2, 3], [0, 1])


def test_a_split_across_linked_slabs_is_refused() -> None:
    axes = Axes()
    whole, part = Dim(12), Dim(5)
    axes.link(whole, np.arange(1, 6), part, np.arange(5))
    assert "tied" in (axes.join(Axis.of(whole), Axis.of(Dim(4), Dim(3))) or "")
    assert axes.atoms((whole,)) == (whole,)


def test_a_slab_tied_to_a_whole_dim_is_refused() -> None:
    axes = Axes()
    whole, part = Dim(12), Dim(3)
    axes.link(whole, np.arange(3), part, np.arange(3))
    assert "tied to all 3" in (axes.join(Axis.of(whole), Axis.of(Dim(4), Dim(3))) or "")


def test_digits_of_products_and_sums() -> None:
    axes = Axes()
    a, b = Dim(2), Dim(3)
    axis = Axis(((a, b), (a,)))
    found = [(dim, digits.tolist()) for dim, digits in axes.digits(axis)]
    assert found == [(a, [0, 0, 0, 1, 1, 1, -1, -1]), (b, [0, 1, 2, 0, 1, 2, -1, -1]), (a, [-1] * 6 + [0, 1])]
    with pytest.raises(ValueError, match="unknown size"):
        axes.digits(axes.fresh(None))


def test_merge() -> None:
    axes = Axes()
    a, b, concat = axes.fresh(2), axes.fresh(3), Axis(((Dim(2),), (Dim(3),)))
    merged = axes.merge([a, axes.fresh(1), b])
    assert merged is not None
    assert sizes(axes, merged) == [[2, 3]]
    assert axes.merge([concat, axes.fresh(1)]) is concat
    assert axes.merge([concat, a]) is None
    assert axes.size(axes.merge([]) or a) == 1


def test_labels_survive_joins_and_splits() -> None:
    axes = Axes()
    plain, group = axes.fresh(8), Dim(8, "conv group")
    axes.join(plain, Axis.of(group))
    axes.join(plain, Axis.of(Dim(4), Dim(2)))
    assert {dim.label for dim in axes.resolve(plain)[0]} == {"conv group"}
