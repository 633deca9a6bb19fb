"""Input channels, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.errors import UsageError
from spa_compiler.patterns import Channel


def test_a_channel_is_all_outputs_by_its_kernel() -> None:
    importance = np.array([[1, 2, 9, 0, 5, 5], [3, 2, 9, 0, 5, 5]], float)
    channel = Channel().on(2)
    np.testing.assert_array_equal(channel.sizes(2, 6), [[4, 4, 4]])
    np.testing.assert_allclose(channel.scores(importance), [[2, 4.5, 5]])
    wanted = [[False, False, True, True, True, True]] * 2
    np.testing.assert_array_equal(channel.choose(importance, 1 / 3), wanted)
    np.testing.assert_array_equal(Channel().choose(importance, 1 / 6), [[True, True, True, False, True, True]] * 2)


def test_fits_and_fill() -> None:
    weight = np.array([[1, 0, 0, 4], [2, 3, 0, 0]], np.float32)
    assert not Channel().fits(weight)
    assert Channel().fill(weight) == 4 / 6
    assert Channel(2).fill(weight) == 4 / 8
    assert Channel(2).fits(np.array([[1, 2, 0, 0], [3, 4, 0, 0]]))
    assert not Channel(2).fits(np.array([[0, 1, 2, 0], [0, 3, 4, 0]]))


def test_a_channel_stays_at_least() -> None:
    np.testing.assert_array_equal(Channel().choose(np.ones((5, 3)), 0.99), [[False, False, True]] * 5)


def test_a_kernel_without_positions_is_refused() -> None:
    with pytest.raises(UsageError, match="0 columns"):
        Channel(0)
