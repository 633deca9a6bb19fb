"""Constant fan-in, by hand and against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.patterns import FanIn


@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
def test_every_output_keeps_its_highest(rows: int, inputs: int, sparsity: float, seed: int) -> None:
    importance = np.random.default_rng(seed).integers(0, 6, (rows, inputs)).astype(float)
    mask = FanIn().choose(importance, sparsity)
    kept = max(1, round((1 - sparsity) * inputs))
    for row, stays in zip(importance, mask, strict=True):
        order = np.argsort(row, kind="stable")
        np.testing.assert_array_equal(np.flatnonzero(stays), sorted(order[inputs - kept :]))


@pytest.mark.parametrize("sparsity, kept", [(0.0, 10), (0.5, 5), (0.74, 3), (0.9, 1), (0.99, 1)])
def test_the_count_is_rounded_and_never_zero(sparsity: float, kept: int) -> None:
    importance = np.arange(30.0).reshape(3, 10)
    np.testing.assert_array_equal(FanIn().choose(importance, sparsity).sum(axis=1), kept)


def test_fits_and_fill() -> None:
    even = np.array([[1, 0, 2, 0], [0, 3, 0, 4]], np.float32)
    uneven = np.array([[1, 0, 2, 5], [0, 3, 0, 0]], np.float32)
    assert FanIn().fits(even)
    assert FanIn().fill(even) == 1.0
    assert not FanIn().fits(uneven)
    assert FanIn().fill(uneven) == 4 / 6
    assert FanIn().fits(np.zeros((2, 3)))
    assert FanIn().fill(np.zeros((2, 3))) == 1.0
