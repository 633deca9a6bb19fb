"""Budgets on groups made by hand: counts, order, floors, steps, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.analysis import Group, Member
from spa_compiler.passes import budget
from spa_compiler.passes.budget import Removed, choose, field, last_of_their_kind, ranks


def group(number: int, *places: list[int], granularity: str = "channel") -> Group:
    """A group whose Dims hold the given units, one parameter each; -1 is pinned."""
    members = [Member(f"W{number}.{i}", 0, True, (np.array(own),)) for i, own in enumerate(places)]
    size = 1 + max(map(max, places))
    return Group(number, size, granularity, 0, 0, tuple(members), tuple(map(np.array, places)), np.arange(size))


def plain(number: int, size: int, granularity: str = "channel") -> Group:
    return group(number, list(range(size)), granularity=granularity)


def units(*sizes: int) -> budget.Cost:
    return lambda removed: 1 - sum(map(len, removed.values())) / sum(sizes)


def told(removed: Removed) -> dict[int, list[int]]:
    return {number: own.tolist() for number, own in removed.items()}


def free(one: Group, values: list[float], least: float = 0) -> budget.Field:
    return field(one, np.array(values, float), least=least, lanes=16, round_to=1)


def test_units_of_all_groups_compete() -> None:
    fields = [free(plain(0, 4), [1, 4, 2, 8]), free(plain(3, 2), [3, 9])]
    assert told(choose(fields, 0.5, units(6), {})) == {0: [0, 2], 3: [0]}


def test_ties_go_by_group_then_unit() -> None:
    fields = [free(plain(0, 3), [1, 1, 1]), free(plain(1, 3), [1, 1, 1])]
    assert told(choose(fields, 0.5, units(6), {})) == {0: [0, 1], 1: [0]}


def test_never_more_than_asked_where_that_can_be() -> None:
    for asked in (0.99, 0.9, 0.51, 0.5, 0.3):
        removed = choose([free(plain(0, 10), list(range(10)))], asked, units(10), {})
        assert 10 - len(removed[0]) == int(asked * 10 + 1e-9)
    assert choose([free(plain(0, 10), list(range(10)))], 1, units(10), {}) == {}


def test_one_unit_of_each_dim_stays_whatever_is_asked() -> None:
    assert told(choose([free(plain(0, 4), [1, 4, 2, 8])], 0.0001, units(4), {})) == {0: [0, 1, 2]}
    # The first Dim has units 0 and 1 alone, the best of which is 1; that is one of the second Dim's, too.
    two = group(0, [0, 1], [0, 1, 2, 3])
    assert told(choose([free(two, [1, 2, 3, 4])], 0.0001, units(4), {})) == {0: [0, 2, 3]}
    # What is pinned stays anyway.
    pinned = group(0, [-1, -1, 0, 1], [0, 1, 2, 3])
    assert told(choose([free(pinned, [1, 2, 3, 4])], 0.0001, units(4), {})) == {0: [0, 1, 2]}
    assert told(choose([free(pinned, [1, 2, 3, 4], least=0.75)], 0.0001, units(4), {})) == {0: [0]}


def test_a_unit_may_have_several_elements_of_a_dim() -> None:
    both = group(0, [0, 1, 2, 0, 1, 2])
    assert told(choose([free(both, [1, 2, 3], least=4)], 0.0001, units(3), {})) == {0: [0]}


def test_the_least_is_a_share_or_a_count() -> None:
    values = [float(i) for i in range(10)]
    assert len(choose([free(plain(0, 10), values, least=0.25)], 0.01, units(10), {})[0]) == 7
    assert len(choose([free(plain(0, 10), values, least=4)], 0.01, units(10), {})[0]) == 6
    assert choose([free(plain(0, 10), values, least=40)], 0.01, units(10), {}) == {}


@pytest.mark.parametrize(
    ("size", "round_to", "granularity", "counts"),
    [
        (512, 0, "channel", set(range(16, 513, 16))),
        (24, 0, "channel", {4, 8, 12, 16, 24}),
        (12, 0, "channel", {4, 8, 12}),
        (6, 0, "channel", {4, 6}),
        (4, 0, "channel", {1, 2, 3, 4}),
        (64, 0, "head", set(range(1, 65))),
        (50, 10, "head dimension", {10, 20, 30, 40, 50}),
        (5, 10, "channel", {5}),
        (40, 10, "head, channel", set(range(1, 41))),
        (5, 1, "channel", {1, 2, 3, 4, 5}),
    ],
)
def test_counts_that_kernels_like(size: int, round_to: int, granularity: str, counts: set[int]) -> None:
    one = field(plain(0, size, granularity), np.ones(size), least=0, lanes=16, round_to=round_to)
    assert set(one.allowed[0].tolist()) == counts


def test_blocks_are_units_on_the_same_axes_and_each_is_rounded() -> None:
    # Units 0-15 lie on both axes, 16-47 on the second one alone: 4, 8, 12 or 16, and 16 or 32 stay.
    wide = group(0, list(range(16)), list(range(48)))
    one = field(wide, np.arange(48.0), least=0, lanes=16, round_to=0)
    assert one.block.tolist() in ([0] * 16 + [1] * 32, [1] * 16 + [0] * 32)
    gone = choose([one], 0.6, units(48), {})[0]
    assert int((gone < 16).sum()) % 4 == 0
    assert int((gone >= 16).sum()) % 16 == 0
    assert 48 - len(gone) <= 0.6 * 48


def test_what_rounding_took_too_much_comes_back() -> None:
    # Both would be rounded from 9 to 8, which is 16 of 32; asked are 20.
    fields = [field(plain(n, 16), np.arange(16.0), least=0, lanes=16, round_to=4) for n in range(2)]
    kept = 32 - sum(map(len, choose(fields, 20 / 32, units(32), {}).values()))
    assert kept == 20


def test_ranks_remove_the_same_share_of_every_group() -> None:
    values = [np.arange(20.0), np.arange(40.0) * 1000]
    fields = [field(plain(n, v.size), ranks(v), least=0, lanes=16, round_to=1) for n, v in enumerate(values)]
    assert {n: len(own) for n, own in choose(fields, 0.5, units(60), {}).items()} == {0: 10, 1: 20}
    assert ranks(np.array([2.0, 1, 1, 3])).tolist() == [0.625, 0.125, 0.375, 0.875]


def test_what_earlier_steps_took_goes_first() -> None:
    fields = [free(plain(0, 4), [1, 2, 3, 4], least=1)]
    assert told(choose(fields, 0.5, units(4), {0: [2]})) == {0: [0, 2]}
    rounded = [field(plain(0, 16), np.arange(16.0), least=0, lanes=16, round_to=4)]
    assert 16 - len(choose(rounded, 0.75, units(16), {0: [3]})[0]) == 12


def test_a_cost_that_nothing_lowers_removes_all_that_may_go() -> None:
    assert told(choose([free(plain(0, 3), [1, 2, 3])], 0.5, lambda removed: 0.9, {})) == {0: [0, 1]}


def test_no_groups() -> None:
    assert choose([], 0.5, lambda removed: 1.0, {}) == {}


def test_what_must_come_back() -> None:
    two = group(0, [0, 1], [2, 3])
    assert last_of_their_kind(two, [0, 2]) == []
    assert last_of_their_kind(two, [0, 1, 2, 3]) == [0, 2]
    assert last_of_their_kind(group(0, [0, 1], [-1, 2, 3]), [0, 2, 3]) == []


def test_the_order_of_members_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(48)
    one = group(0, list(range(16)), list(range(48)))
    other = group(0, list(range(48)), list(range(16)))
    picked = [
        choose([field(g, values, least=0.1, lanes=16, round_to=0)], 0.4, units(48), {})[0].tolist()
        for g in (one, other)
    ]
    assert picked[0] == picked[1]
