"""Grids of 16 values that are found in the values alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels.cuda.form import Dtype, holds, rounded
from spa_compiler.kernels.cuda.grids import find

DTYPES = st.sampled_from(["fp16", "bf16"])


def values(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return ((codes.astype(np.float32) - zero[..., None]) * scale[..., None]).astype(np.float32)


def short(scale: np.ndarray) -> np.ndarray:
    """With 20 significant bits."""
    return (scale.astype(np.float32).view(np.uint32) & ~np.uint32(15)).view(np.float32)


@settings(max_examples=60, deadline=None)
@given(DTYPES, st.data())
def test_any_codes_are_found_again(dtype: Dtype, data: st.DataObject) -> None:
    """All codes or few of them, a zero point at an end or within, exact values or rounded ones, any sizes."""
    count, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    zero = rng.integers(0, 16, count)
    used = rng.integers(0, 16, (count, data.draw(st.integers(1, 16))))  # codes that a group has
    codes = np.take_along_axis(used, rng.integers(0, used.shape[1], (count, size)), axis=1)
    scale = short(np.exp(rng.uniform(-7, 3, count)))
    exact = values(codes, scale, zero)
    for given_ in (exact, rounded(exact, dtype)):
        q, s, z = find(given_, dtype)
        assert q.max() < 16
        assert z.max() < 16
        assert not (s.view(np.uint32) & 15).any()
        back = values(q, s, z)
        assert holds(back, given_, dtype)
        np.testing.assert_array_equal(back == 0, given_ == 0)


@settings(max_examples=25, deadline=None)
@given(DTYPES, st.integers(0, 1 << 30))
def test_other_values_are_refused(dtype: Dtype, seed: int) -> None:
    """One value between two steps, among all codes."""
    rng = np.random.default_rng(seed)
    zero = int(rng.integers(0, 16))
    exact = values(np.arange(16), short(np.exp(rng.uniform(-7, 3, 1)))[0], np.array(zero))
    assert find(exact[None], dtype)[2] == zero
    wrong = exact.copy()
    place = rng.integers(0, 16)
    wrong[place] += rng.choice([-0.4, 0.4]) * (exact[1] - exact[0])
    with pytest.raises(ValueError, match="4 bits"):
        find(wrong[None], dtype)


def test_seventeen_values_are_one_too_many() -> None:
    sixteen = np.arange(-7, 9, dtype=np.float32)[None]
    find(sixteen, "fp16")
    for more in (9, -8):
        with pytest.raises(ValueError, match="4 bits"):
            find(np.append(sixteen, [[more]], axis=1).astype(np.float32), "fp16")
    with pytest.raises(ValueError, match="4 bits"):  # 0 is on every grid
        find(np.arange(20, 36, dtype=np.float32)[None], "fp16")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="4 bits"):
        find(np.array([[1, 0, wrong]], np.float32), "fp16")


def test_special_groups() -> None:
    group = np.zeros((5, 8), np.float32)
    group[1] = 3.0  # a single value
    group[2, 5] = -1e-30  # rounds to 0, and stays what it is
    group[3] = [0, 6, 6, 0, 9, 0, -6, 3]  # multiples of three, of which 9 is the largest
    group[4] = 65504  # the largest number of fp16
    codes, scale, zero = find(group, "fp16")
    back = values(codes, scale, zero)
    np.testing.assert_array_equal(back[[0, 1, 3, 4]], group[[0, 1, 3, 4]])
    assert abs(back[2]).max() < 2e-30
    assert (scale > 0).all()


def test_where_no_scale_of_twenty_bits_fits_a_finer_step_does() -> None:
    scale = short(np.array([1.0 + 2.0**-19], np.float32))  # three of it have 21 bits
    exact = values(np.array([[0, 3, 6, 9, 12, 15]]), scale, np.array([0]))
    codes, found, zero = find(exact, "fp16")
    np.testing.assert_array_equal(rounded(values(codes, found, zero), "fp16"), rounded(exact, "fp16"))


def test_scales_of_other_tools_have_more_bits() -> None:
    """Theirs are any float32, ours are as near as rounding to 16 bits may be."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (4000, 32)), rng.uniform(0.01, 0.02, 4000).astype(np.float32)
    theirs = values(codes, scale, np.full(4000, 8))
    q, s, z = find(theirs, "fp16")
    np.testing.assert_allclose(values(q, s, z), theirs, rtol=2.0**-11)
