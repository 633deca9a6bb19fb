"""Scores of slabs: sums over everything but one axis, in any layout, type and size."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from spa_compiler.criteria import along, chance, l1, l2


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_sums_over_everything_else(axis: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(along, "_BLOCK", block)
    weight = np.random.default_rng(axis).normal(size=(3, 4, 2, 5)).astype(np.float32)
    others = tuple(other for other in range(4) if other != axis)
    wide = weight.astype(np.float64)
    np.testing.assert_allclose(l1(weight, axis), np.abs(wide).sum(axis=others), rtol=1e-12)
    np.testing.assert_allclose(l2(weight, axis), np.square(wide).sum(axis=others), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_all_float_types_in_float64(dtype: type) -> None:
    weight = np.full((2, 300), 200, dtype)
    assert l2(weight, 0).dtype == np.float64
    np.testing.assert_array_equal(l2(weight, 0), [300 * 200.0**2] * 2)  # more than float16 holds
    np.testing.assert_array_equal(l1(weight, 0), [300 * 200.0] * 2)


def test_a_vector_and_an_empty_slab() -> None:
    np.testing.assert_array_equal(l1(np.array([1, -2], np.float32), 0), [1, 2])
    np.testing.assert_array_equal(l2(np.zeros((2, 0), np.float32), 0), [0, 0])


def test_chance_repeats_for_a_seed() -> None:
    one, other = (chance(5, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert len(set(one)) == 5
