"""Magnitude keeps the order of absolute values, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spa_compiler.criteria import magnitude


@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_order_and_ties_are_those_of_the_magnitudes(weight: np.ndarray) -> None:
    scores = magnitude(weight)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(
        np.argsort(scores, axis=None, kind="stable"), np.argsort(np.abs(weight), axis=None, kind="stable")
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_extremes_neither_underflow_nor_overflow(dtype: type) -> None:
    info = np.finfo(np.float32 if dtype is np.float64 else dtype)
    scores = magnitude(np.array([[info.smallest_subnormal, info.max, 0]], dtype))
    assert 0 < scores[0, 0] < scores[0, 1] < np.inf
    assert scores[0, 2] == 0
