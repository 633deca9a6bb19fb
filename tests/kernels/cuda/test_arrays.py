"""Rules of packed arrays: what they accept, and each way to break one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spa_compiler.kernels.cuda.arrays import Array, Below, Extent, Offsets, Permutation, check, counts_of

N, K, BLOCKS = 70, 100, 7
RULES = (
    Array("offsets", "int32", (Extent(rows=32, plus=1),), Offsets(Extent(count="blocks"))),
    Array("columns", "uint16", (Extent(count="blocks"),), Below(Extent(columns=32))),
    Array("order", "int32", (Extent(rows=1),), Permutation(Extent(rows=1))),
    Array("words", "uint32", (Extent(2, count="blocks"), Extent(4)), Below(Extent(columns=1), shift=16, mask=0xFFFF)),
)
GOOD: dict[str, np.ndarray] = {
    "offsets": np.array([0, 3, 3, 7], np.int32),
    "columns": np.array([0, 1, 3, 2, 0, 3, 3], np.uint16),
    "order": np.arange(N, dtype=np.int32)[::-1].copy(),
    "words": np.full((2 * BLOCKS, 4), (99 << 16) + 65535, np.uint32),
}


def edited(name: str, index: Any, value: int) -> dict[str, np.ndarray]:
    array = GOOD[name].copy()
    array[index] = value
    return GOOD | {name: array}


def test_what_is_right_passes() -> None:
    check(RULES, GOOD, N, K)
    assert counts_of(RULES) == ("blocks",)


@pytest.mark.parametrize(
    "arrays, words",
    [
        (edited("offsets", 0, 1), "offsets must run from 0 to 7"),
        (edited("offsets", 1, 4) | {"offsets": np.array([0, 4, 3, 7], np.int32)}, "not decrease"),
        (edited("offsets", -1, 8), "offsets must run from 0 to 7"),
        (edited("columns", 2, 4), "columns must be from 0 to 3"),
        (edited("order", 2, 70), "order must be a permutation of 70"),
        (edited("order", 2, 0), "order must be a permutation of 70"),
        (edited("words", (0, 0), 100 << 16), "words must be from 0 to 99"),
        (GOOD | {"offsets": GOOD["offsets"].astype(np.int64)}, "offsets must be int32 of 1 dimensions"),
        (GOOD | {"words": GOOD["words"].ravel()}, "words must be uint32 of 2 dimensions"),
        (GOOD | {"words": GOOD["words"][:-1]}, "words must have 14 on axis 0, not 13"),
        (GOOD | {"columns": GOOD["columns"][:-1]}, "words must have 12 on axis 0, not 14"),
        (GOOD | {"offsets": GOOD["offsets"][:-1]}, "offsets must have 4 on axis 0, not 3"),
        ({name: GOOD[name] for name in reversed(GOOD)}, "the rules are for offsets, columns, order, words"),
    ],
)
def test_what_is_wrong_is_named(arrays: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(RULES, arrays, N, K)


def test_a_count_must_be_the_size_of_an_array() -> None:
    with pytest.raises(ValueError, match="no array has the size 'blocks'"):
        counts_of([Array("columns", "int32", (Extent(4),), Below(Extent(count="blocks")))])


def test_a_size_that_no_count_gives() -> None:
    rules = [Array("values", "uint16", (Extent(32, count="blocks", plus=1),))]
    check(rules, {"values": np.zeros(65, np.uint16)}, N, K)
    for size in (0, 64):
        with pytest.raises(ValueError, match="no multiple of 32"):
            check(rules, {"values": np.zeros(size, np.uint16)}, N, K)


@pytest.mark.parametrize("dtype, rank", [("float64", 1), ("int32", 0), ("int32", 4)])
def test_arrays_that_the_c_side_cannot_hold(dtype: str, rank: int) -> None:
    with pytest.raises(ValueError, match="an array is of one of"):
        Array("x", dtype, (Extent(),) * rank)
