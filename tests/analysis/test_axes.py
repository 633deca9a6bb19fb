"""What rules do with axes: merged, cut, split, tied and named, in any order; all of it index by index."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.analysis.axes import Axes
from spa_compiler.analysis.terms import Axis
from spa_compiler.analysis.unify import Incompatible
from tests.analysis.forms import agree, form, hangs_on, product


def test_an_empty_axis_is_a_neighbour_like_any_other() -> None:
    axes = Axes()
    a, none = axes.fresh(6), axes.fresh(0)
    assert axes.join(a, axes.concat([none, a])) is None
    assert axes.join(none, axes.merge([none, a])) is None
    assert [axes.size(part) for part in axes.split(a, [2, 0, 4])] == [2, 0, 4]
    assert [axes.size(part) for part in axes.factor(none, [0, 3])] == [0, 3]
    assert axes.size(axes.concat([none, none])) == 0


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


# --- the second binding -----------------------------------------------------------------------------------------------


def test_an_axis_that_keeps_its_size_is_made_of_dims_that_do() -> None:
    axes = Axes()
    heads, width = axes.fresh(4), axes.fresh(6)
    both = axes.merge([heads, width])
    assert axes.second(both) is None
    axes.note_second(both, 24)
    assert [axes.second(axis) for axis in (heads, width, both)] == [4, 6, 24]
    assert [axes.second(part) for part in axes.factor(width, [2, 3])] == [2, 3]
    assert [axes.second(part) for part in axes.split(heads, [1, 3])] == [1, 3]


def test_the_rest_of_a_product_follows() -> None:
    axes = Axes()
    batch, width = axes.fresh(4), axes.fresh(6)
    both = axes.merge([batch, width])
    axes.note_second(both, 18)
    assert axes.second(batch) is None, "two of which nothing is known"
    axes.note_second(width, 6)
    axes.note_second(both, 20)
    assert axes.second(batch) is None, "no multiple of 6"
    axes.note_second(both, 18)
    assert axes.second(batch) == 3
    assert [axes.second(part) for part in axes.factor(batch, [2, 2])] == [None, None]


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_joined_has_one_size(turned: bool) -> None:
    axes = Axes()
    known, other = axes.fresh(4), axes.fresh(4)
    axes.note_second(known, 7)
    axes.join(*((other, known) if turned else (known, other)))
    assert axes.second(other) == axes.second(known) == 7


# --- anything together -------------------------------------------------------------------------------------------------

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
