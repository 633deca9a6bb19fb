"""The algebra alone: splits hold everywhere, factorisations meet or are refused with words, all of it index by index."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.analysis.axes import Axes, Axis, Dim, Factor, Incompatible

Form: TypeAlias = "int | tuple[Form, ...] | list[Form]"
"""Sizes of an axis as it stands: a Dim is a number, a product a tuple, a sum a list."""


def form(axes: Axes, axis: Axis) -> Form:
    return _sum([[_factor(factor) for factor in term] for term in axes.resolve(axis)])


def _sum(terms: Sequence[Sequence[Form]]) -> Form:
    products: list[Form] = [term[0] if len(term) == 1 else tuple(term) for term in terms]
    return products[0] if len(products) == 1 else products


def _factor(factor: Factor) -> Form:
    if isinstance(factor, Dim):
        return factor.size or 0
    return _sum([[_factor(inner) for inner in term] for term in factor.terms])


def hangs_on(axes: Axes, *several: Axis) -> list[list[set[int]]]:
    """For each axis and each of its indices, the elements that it hangs on."""
    offset: dict[int, int] = {}
    total = 0
    for axis in several:
        for atom in axes.atoms(axis):
            if id(atom) not in offset:
                offset[id(atom)] = total
                total += atom.size or 0
    out = []
    for axis in several:
        elements = axes.elements(axis, offset)
        assert elements.shape[1] == axes.size(axis)
        out.append([set(column[column >= 0].tolist()) for column in elements.T])
    return out


def agree(axes: Axes, *several: Axis) -> bool:
    """Whether every index of all these axes lives and dies together."""
    first, *others = hangs_on(axes, *several)
    return all(first == other for other in others)


def product(*sizes: int) -> Axis:
    return Axis.of(*(Dim(size) for size in sizes))


# --- join -------------------------------------------------------------------------------------------------------------


def test_equal_sizes_become_one() -> None:
    axes = Axes()
    a, b, c = (axes.fresh(6) for _ in range(3))
    assert axes.join(a, b) is None
    assert axes.join(b, c) is None
    assert axes.resolve(a) == axes.resolve(c)
    assert agree(axes, a, b, c)


def test_size_one_has_no_dims() -> None:
    axes = Axes()
    assert axes.resolve(axes.fresh(1)) == ((),)
    assert axes.size(axes.fresh(1)) == 1
    assert form(axes, product(1, 3, 1)) == 3


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


def test_nested_sums() -> None:
    """What all terms end with stands behind the sum, so that it can meet the Dims of a plain product."""
    axes = Axes()
    p, a, b, q = axes.fresh(2), axes.fresh(3), axes.fresh(5), axes.fresh(4)
    inner = axes.concat([axes.merge([a, q]), axes.merge([b, q])])
    whole = axes.merge([p, inner])
    assert form(axes, whole) == (2, [3, 5], 4)
    plain = product(2, 8, 4)
    assert axes.join(plain, whole) is None
    assert form(axes, plain) == (2, [3, 5], 4)
    assert agree(axes, plain, whole)


def test_a_sum_in_front_is_spread_out() -> None:
    axes = Axes()
    a, b, q = axes.fresh(3), axes.fresh(5), axes.fresh(4)
    assert form(axes, axes.merge([axes.concat([a, b]), q])) == [(3, 4), (5, 4)]
    assert agree(axes, axes.merge([axes.concat([a, b]), q]), axes.concat([axes.merge([a, q]), axes.merge([b, q])]))


def test_a_repeated_sum_is_a_product() -> None:
    axes = Axes()
    p, a, b = axes.fresh(2), axes.fresh(3), axes.fresh(5)
    inner = axes.concat([a, b, a, b])
    whole = axes.merge([p, inner])
    (term,) = axes.resolve(whole)
    assert [_factor(factor) for factor in term] == [2, [(), ()], [3, 5]]
    assert agree(axes, whole, axes.concat([inner, inner])) is False  # rows of p are elements of their own
    assert axes.size(whole) == 32


def test_an_empty_axis_is_a_neighbour_like_any_other() -> None:
    axes = Axes()
    a, none = axes.fresh(6), axes.fresh(0)
    assert axes.join(a, axes.concat([none, a])) is None
    assert axes.join(none, axes.merge([none, a])) is None
    assert [axes.size(part) for part in axes.split(a, [2, 0, 4])] == [2, 0, 4]
    assert [axes.size(part) for part in axes.factor(none, [0, 3])] == [0, 3]
    assert axes.size(axes.concat([none, none])) == 0


# --- factor, split, merge, concat -------------------------------------------------------------------------------------


def test_merge() -> None:
    axes = Axes()
    a, b = axes.fresh(2), axes.fresh(3)
    assert form(axes, axes.merge([a, axes.fresh(1), b])) == (2, 3)
    assert axes.merge([a]) is a
    assert axes.size(axes.merge([a, axes.fresh(None)])) is None


def test_factor_splits_everywhere() -> None:
    axes = Axes()
    rows, elsewhere = axes.fresh(12), axes.fresh(12)
    axes.join(rows, elsewhere)
    heads, width = axes.factor(rows, [3, 4])
    assert (form(axes, heads), form(axes, width), form(axes, elsewhere)) == (3, 4, (3, 4))
    assert agree(axes, elsewhere, axes.merge([heads, width]))


def test_factor_of_a_product_takes_its_factors() -> None:
    axes = Axes()
    a, b = axes.fresh(4), axes.fresh(6)
    first, second, third, fourth = axes.factor(axes.merge([a, b]), [4, 1, 2, 3])
    assert [form(axes, axis) for axis in (first, second, third, fourth)] == [4, (), 2, 3]
    assert agree(axes, a, first)
    assert form(axes, b) == (2, 3)


def test_factor_keeps_labels() -> None:
    axes = Axes()
    axis = axes.fresh(12, "head")
    assert {atom.label for part in axes.factor(axis, [3, 4]) for atom in axes.atoms(part)} == {"head"}


def test_factor_of_a_sum() -> None:
    """[q | k | v] in heads of 4: one head size for all."""
    axes = Axes()
    q, k = axes.fresh(8), axes.fresh(4)
    heads, width = axes.factor(axes.concat([q, k]), [3, 4])
    assert form(axes, heads) == [2, ()]
    assert form(axes, width) == 4
    assert form(axes, q) == (2, 4)
    assert agree(axes, k, width)


@pytest.mark.parametrize("sizes", [(6, 6), (5, 7)])
def test_factor_across_a_sum_is_refused(sizes: tuple[int, int]) -> None:
    axes = Axes()
    with pytest.raises(Incompatible, match="blocks of 4 do not fit a concatenated axis"):
        axes.factor(axes.concat([axes.fresh(size) for size in sizes]), [3, 4])


def test_factor_that_does_not_fit_is_refused() -> None:
    axes = Axes()
    with pytest.raises(Incompatible, match="incompatible factorisations 4 and 6"):
        axes.factor(product(6, 4), [4, 6])


def test_split() -> None:
    axes = Axes()
    whole, elsewhere = axes.fresh(7), axes.fresh(7)
    axes.join(whole, elsewhere)
    first, second = axes.split(whole, [3, 4])
    assert form(axes, elsewhere) == [3, 4]
    assert agree(axes, elsewhere, axes.concat([first, second]))


def test_split_where_it_is_cut_already() -> None:
    axes = Axes()
    parts = [axes.fresh(3), axes.fresh(4), axes.fresh(5)]
    low, high = axes.split(axes.concat(parts), [7, 5])
    assert agree(axes, low, axes.concat(parts[:2]))
    assert agree(axes, high, parts[2])


def test_split_of_a_merged_axis() -> None:
    axes = Axes()
    a, b = axes.fresh(4), axes.fresh(3)
    low, high = axes.split(axes.merge([a, b]), [6, 6])
    assert form(axes, a) == [2, 2]
    assert (form(axes, low), form(axes, high)) == ((2, 3), (2, 3))
    with pytest.raises(Incompatible, match="part of an axis meets a merged axis"):
        axes.split(axes.merge([a, b]), [4, 8])


def test_split_and_factor_by_turns() -> None:
    """[B, S, 3 * H * d] in thirds, each in heads: all thirds have heads of the same size, but heads of their own."""
    axes = Axes()
    fused = axes.fresh(24)
    parts = axes.split(fused, [8, 8, 8])
    heads = [axes.factor(part, [2, 4]) for part in parts]
    assert form(axes, fused) == [(2, 4)] * 3
    assert not set(axes.atoms(heads[0][0])) & set(axes.atoms(heads[1][0]))
    assert not set(axes.atoms(heads[0][1])) & set(axes.atoms(heads[1][1]))


# --- labels, links, elements ------------------------------------------------------------------------------------------


def test_labels_survive_joins_and_splits() -> None:
    axes = Axes()
    plain, group = axes.fresh(8), axes.fresh(8, "conv group")
    axes.join(plain, group)
    axes.join(plain, product(4, 2))
    assert {atom.label for atom in axes.atoms(plain)} == {"conv group"}
    axes.split(axes.factor(plain, [4, 2])[0], [1, 3])
    assert {atom.label for atom in axes.atoms(plain)} == {"conv group"}


def test_a_label_is_given_where_there_is_none() -> None:
    axes = Axes()
    a, b = axes.fresh(2, "head"), axes.fresh(3)
    axes.name(axes.merge([a, b]), "head dimension")
    assert [atom.label for atom in axes.atoms(axes.merge([a, b]))] == ["head", "head dimension"]


def test_ties_are_kept_as_said() -> None:
    axes = Axes()
    left, right = axes.fresh(4), axes.fresh(2)
    axes.tie(left, np.array([3, 1]), right, np.array([0, 1]))
    (link,) = axes.links
    assert (link.left, link.right) == (left, right)
    assert (link.left_indices.tolist(), link.right_indices.tolist()) == ([3, 1], [0, 1])


def test_elements_of_products_and_sums() -> None:
    axes = Axes()
    a, b = Dim(2), Dim(3)
    offset = {id(a): 0, id(b): 10}
    assert axes.elements(Axis(((a, b), (a,))), offset).tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 1],
        [10, 11, 12, 10, 11, 12, -1, -1],
    ]
    assert axes.elements(Axis.of(b, Axis(((), (a,)))), offset).tolist() == [
        [10, 10, 10, 11, 11, 11, 12, 12, 12],
        [-1, 0, 1] * 3,
    ]
    assert axes.elements(axes.fresh(1), {}).shape == (0, 1)


# --- anything together ------------------------------------------------------------------------------------------------

_KINDS = ("join", "join", "factor", "split", "concat", "merge")
Step: TypeAlias = tuple[str, int, int, int]


class Pool:
    """Axes that meet in any order. `same` are pairs that were said to be the same; this must hold for ever after."""

    def __init__(self, size: int) -> None:
        self.axes = Axes()
        self.pool = [self.axes.fresh(size) for _ in range(4)]
        self.same: list[tuple[Axis, Axis]] = []

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            with contextlib.suppress(Incompatible):
                self.take(step)
        self.check()

    def take(self, step: Step) -> None:
        kind, first, second, number = step
        left, right = (self.pool[place % len(self.pool)] for place in (first, second))
        size = self.size(left)
        if kind == "join":
            if size == self.size(right) and self.axes.join(left, right) is None:
                self.same.append((left, right))
        elif kind == "factor":
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            inner = divisors[number % len(divisors)]
            parts = self.axes.factor(left, [size // inner, inner])
            assert [self.size(part) for part in parts] == [size // inner, inner]
            self.same.append((left, self.axes.merge(parts)))
            self.pool += [*parts, self.axes.merge(parts[::-1])]
        elif kind == "split" and size > 1:
            low = 1 + number % (size - 1)
            parts = self.axes.split(left, [low, size - low])
            assert [self.size(part) for part in parts] == [low, size - low]
            self.same.append((left, self.axes.concat(parts)))
            self.pool += [*parts, self.axes.concat(parts[::-1])]
        elif kind == "concat" and size + self.size(right) <= 120:
            self.pool.append(self.axes.concat([left, right]))
        elif kind == "merge" and size * self.size(right) <= 240:
            self.pool.append(self.axes.merge([left, right]))

    def size(self, axis: Axis) -> int:
        return self.axes.size(axis) or 0

    def check(self) -> None:
        found = hangs_on(self.axes, *self.pool, *(axis for pair in self.same for axis in pair))
        pairs = found[len(self.pool) :]
        for left, right in zip(pairs[::2], pairs[1::2], strict=True):
            assert left == right


_STEP = st.tuples(st.sampled_from(_KINDS), st.integers(0, 30), st.integers(0, 30), st.integers(0, 1000))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from([12, 24, 48, 60]), st.lists(_STEP, min_size=4, max_size=12))
def test_what_is_joined_hangs_on_the_same_elements(size: int, steps: list[Step]) -> None:
    """After any joins, splits and factorisations, each axis keeps its size, and what was joined agrees everywhere."""
    Pool(size).run(steps)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(st.sampled_from([12, 24, 48, 60, 64]), st.lists(_STEP, min_size=4, max_size=16))
def test_what_is_joined_hangs_on_the_same_elements_always(size: int, steps: list[Step]) -> None:
    """The same with other steps in every run."""
    Pool(size).run(steps)
