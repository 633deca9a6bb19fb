"""N:M, by hand and against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.patterns import NofM


def test_two_of_four_by_hand() -> None:
    importance = np.array([[4, 3, 2, 1, 1, 2, 3, 4], [1, 1, 1, 1, 2, 1, 2, 1]], float)
    wanted = [[1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 1, 0]]
    np.testing.assert_array_equal(NofM(2, 4).choose(importance, 0.5), np.array(wanted, bool))


@pytest.mark.parametrize("inputs, kept", [(4, 2), (5, 3), (6, 4), (7, 4), (8, 4), (1, 1), (3, 2)])
def test_a_short_last_group_keeps_as_many(inputs: int, kept: int) -> None:
    mask = NofM(2, 4).choose(np.ones((3, inputs)), 0.5)
    np.testing.assert_array_equal(mask.sum(axis=1), kept)


@given(st.integers(1, 10), st.integers(1, 6), st.integers(1, 40), st.data())
def test_every_group_keeps_its_highest(m: int, rows: int, inputs: int, data: st.DataObject) -> None:
    pattern = NofM(data.draw(st.integers(1, m)), m)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Few levels, so that there are ties, and both signs.
    importance = rng.integers(-2, 3, (rows, inputs)).astype(float)
    mask = pattern.choose(importance, data.draw(st.floats(0, 0.99)))
    for row, kept in zip(importance, mask, strict=True):
        for at in range(0, inputs, m):
            order = np.argsort(row[at : at + m], kind="stable")
            wanted = sorted(order[max(0, len(order) - pattern.kept) :])
            np.testing.assert_array_equal(np.flatnonzero(kept[at : at + m]), wanted)


def test_fits_looks_at_aligned_groups() -> None:
    weight = np.array([[0, 0, 1, 1, 1, 1, 0, 0, 1]], np.float32)
    assert NofM(2, 4).fits(weight)
    assert not NofM(2, 4).fits(weight[:, 2:])
    assert NofM(2, 4).fits(np.zeros((2, 6)))


def test_fill_counts_the_places_of_every_group() -> None:
    weight = np.zeros((2, 9), np.float32)
    weight[0, 0] = weight[0, 8] = weight[1, 4] = 1
    # Two rows of 2 + 2 + 1 places.
    assert NofM(2, 4).fill(weight) == 3 / 10
    assert NofM(2, 4).fill(np.zeros((1, 4))) == 0.0
    # Groups of more than N hold what they hold.
    assert NofM(2, 4).fill(np.ones((2, 9))) == 1.0


@pytest.mark.parametrize("m", [1, 2, 64])
def test_n_equal_to_m_is_dense(m: int) -> None:
    assert NofM(m, m).sparsity == 0
    assert NofM(m, m).choose(np.zeros((2, 70)), 0.9).all()
