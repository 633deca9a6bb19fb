"""A Dim never loses all of its elements, whatever is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.analysis.choose import random_units, spare
from spa_compiler.analysis.groups import Group
from tests.analysis import nets
from tests.analysis.told import analysis_of


def group(size: int, *dims: list[int]) -> Group:
    return Group(0, size, "channel", 1, 1, (), tuple(np.array(dim) for dim in dims), np.arange(size))


def test_one_stays() -> None:
    assert spare(group(4, [0, 1, 2, 3]), [2, 0, 3, 1]) == [2, 0, 3]


def test_a_pinned_element_is_enough() -> None:
    assert spare(group(3, [0, 1, -1, 2]), [2, 0, 1]) == [2, 0, 1]


def test_every_dim_keeps_one() -> None:
    """The third unit would empty the second Dim; later ones may still go."""
    assert spare(group(5, [0, 1, 2, 3, 4], [0, 2]), [0, 4, 2, 1]) == [0, 4, 1]


def test_a_unit_with_several_elements_of_a_dim() -> None:
    assert spare(group(2, [0, 0, 1, 1]), [0, 1]) == [0]
    assert spare(group(2, [0, 0, 0]), [0, 1]) == [1], "unit 1 lies on no Dim that is here"


def test_the_order_decides() -> None:
    assert spare(group(3, [0, 1], [1, 2]), [1, 0, 2]) == [1]
    assert spare(group(3, [0, 1], [1, 2]), [0, 2, 1]) == [0, 2]


def test_nothing_asked() -> None:
    assert spare(group(3, [0, 1, 2]), []) == []


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", nets.ALL)
def test_random_units(name: str, ratio: float) -> None:
    analysis = analysis_of(nets.ALL[name])
    removed = random_units(analysis, ratio, np.random.default_rng(1))
    assert removed, "at least one unit of each group, where it has more than one"
    for number, units in removed.items():
        own = analysis.groups[number]
        assert units == sorted(set(units))
        assert 0 < len(units) <= max(1, ratio * own.size)
        for dim in own.dims:
            assert not np.isin(dim, units).all(), "a Dim is empty"
