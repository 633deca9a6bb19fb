"""Arrays that regions must be refused with, and the words that say why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.region_harness import Case, case


def edited(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


def swapped(array: np.ndarray) -> np.ndarray:
    """An increasing array in which one step decreases."""
    copy, step = array.copy(), int(np.argmax(np.diff(array) > 0))
    copy[step + 1] = copy[-1] + 1
    return copy


BAD: dict[str, tuple[str, Any, str]] = {
    "column past its block": ("columns0", lambda a: edited(a, 3, 60000), "column 60000 is out of range"),
    "column past a short last block": ("columns0", lambda a: edited(a, -1, 23), "out of range, the block has 16"),
    "indptr not from 0": ("indptr0", lambda a: edited(a, 0, 1), "indptr must run from 0"),
    "indptr starts negative": ("indptr0", lambda a: edited(a, 0, -1), "indptr must run from 0"),
    "indptr ends early": ("indptr0", lambda a: edited(a, -1, a[-1] - 1), "indptr must run from 0"),
    "indptr ends late": ("indptr0", lambda a: edited(a, -1, a[-1] + 1), "indptr must run from 0"),
    "indptr decreases": ("indptr0", swapped, "indptr must not decrease"),
    "indptr negative inside": ("indptr0", lambda a: edited(a, 5, -7), "indptr must not decrease"),
    "indptr too large inside": ("indptr0", lambda a: edited(a, 5, 2**31 - 1), "indptr must not decrease"),
    "indptr too short": ("indptr0", lambda a: a[:-1], "indptr must have 112 elements, it has 111"),
    "indptr too long": ("indptr0", lambda a: np.append(a, a[-1]), "indptr must have 112 elements, it has 113"),
    "indptr empty": ("indptr0", lambda a: a[:0], "indptr must have 112 elements, it has 0"),
    "order repeats a group": ("order0", lambda a: edited(a, 0, a[1]), "order is not a permutation"),
    "order past the tile": ("order0", lambda a: edited(a, -1, 5), "order is not a permutation of 5 groups"),
    "order negative": ("order0", lambda a: edited(a, 2, -1), "order is not a permutation"),
    "order far out": ("order0", lambda a: edited(a, 2, -(2**31)), "order is not a permutation"),
    "order too short": ("order0", lambda a: a[1:], "order must have 111 elements, it has 110"),
    "too few values": ("values0", lambda a: a[:-1], "rows of values"),
    "values of another R": ("values0", lambda a: np.repeat(a, 4, axis=1), "values must be [entries, 1]"),
    "values of rank 1": ("values0", lambda a: a.ravel(), "values must have 2 dimensions, it has 1"),
    "values of rank 3": ("values0", lambda a: a[None], "values must have 2 dimensions, it has 3"),
    "columns of rank 2": ("columns0", lambda a: a[:, None], "columns must have 1 dimensions, it has 2"),
    "order of rank 0": ("order0", lambda a: np.array(0, a.dtype), "order must have 1 dimensions, it has 0"),
    "bias too short": ("bias0", lambda a: a[:-1], "bias must have 37 elements, it has 36"),
    "bias too long": ("bias0", lambda a: np.append(a, a[:1]), "bias must have 37 elements, it has 38"),
    "not an initializer": ("values0", lambda a: None, "(values) must be an initializer"),
    "indptr is an input": ("indptr0", lambda a: None, "(indptr) must be an initializer"),
}

BAD |= {
    "slices: column past its block": ("columns0", lambda a: edited(a, (3, 15), 48), "column 48 is out of range"),
    "slices: column past the last block": ("columns0", lambda a: edited(a, -1, 4), "out of range, the block has 4"),
    "slices: indptr too large": ("indptr0", lambda a: edited(a, 5, 2**31 - 1), "indptr must not decrease"),
    "slices: order repeats a row": (
        "order0",
        lambda a: edited(a, (0, 0), a[0, 1]),
        "order is not a permutation of 208",
    ),
    "slices: order past the tile": ("order0", lambda a: edited(a, (-1, -1), 192), "not a permutation of 192 rows"),
    "slices: order negative": ("order0", lambda a: edited(a, (2, 7), -1), "order is not a permutation"),
    "slices: order of groups": ("order0", lambda a: a[:, :1], "order must be [entries, 16]"),
    "slices: order too short": ("order0", lambda a: a[1:], "order must have 75 elements, it has 74"),
    "slices: columns of blocks": ("columns0", lambda a: a[:, 0], "columns must have 2 dimensions, it has 1"),
    "slices: columns of fewer rows": ("columns0", lambda a: a[:, :8], "columns must be [entries, 16]"),
    "slices: too few values": ("values0", lambda a: a[:-1], "rows of values"),
}

BAD |= {
    "blocks: column whose block ends past the tile": (
        "columns0",
        lambda a: edited(a, 3, 45),
        "column 45 is out of range, the block has 48",
    ),
    "blocks: column past the last tile": ("columns0", lambda a: edited(a, -1, 1), "out of range, the block has 4"),
    "blocks: column near 65535": ("columns0", lambda a: edited(a, 3, 65535), "column 65535 is out of range"),
    "blocks: values of columns": ("values0", lambda a: a[:, :4], "values must be [entries, 16]"),
    "blocks: too few values": ("values0", lambda a: a[:-1], "rows of values"),
    "blocks: indptr ends late": ("indptr0", lambda a: edited(a, -1, a[-1] + 1), "indptr must run from 0"),
    "blocks: order repeats a group": (
        "order0",
        lambda a: edited(a, 0, a[1]),
        "order is not a permutation of 16 groups",
    ),
    "blocks: bias too short": ("bias0", lambda a: a[:-1], "bias must have 392 elements, it has 391"),
}

BAD |= {
    "groups: a group of fewer steps": ("indptr0", lambda a: edited(a, 1, 1), "a group has 1 steps, not 2"),
    "groups: a group of more steps": ("indptr0", lambda a: edited(a, 1, 3), "a group has 3 steps, not 2"),
    "groups: a last group of fewer steps": (
        "indptr0",
        lambda a: edited(a, -2, a[-1]),
        "a group has 2 steps, not 1",
    ),
    "groups: indptr decreases": ("indptr0", lambda a: edited(a, 1, -2), "indptr must not decrease"),
    "groups: order repeats a group": ("order0", lambda a: edited(a, 0, a[1]), "order is not a permutation of 16"),
    "groups: codes of columns": ("columns0", lambda a: a[:, 0], "columns must have 2 dimensions, it has 1"),
    "groups: fewer codes": ("columns0", lambda a: a[:, :7], "columns must be [entries, 8]"),
    "groups: codes of fewer steps": ("columns0", lambda a: a[:-1], "rows of values"),
    "groups: fewer values": ("values0", lambda a: a[:, :63], "values must be [entries, 64]"),
    # The first slice gives its slots to the second one: nothing else is wrong with it.
    "windows: a slice with too few slots": (
        "indptr0",
        lambda a: edited(a, 1, 14),
        "a slice must have 15 slots, it has 14",
    ),
    "windows: a slice without slots": ("indptr0", lambda a: edited(a, 1, 0), "a slice must have 15 slots, it has 0"),
    "windows: column past the inputs": ("columns0", lambda a: edited(a, (0, 0), 140), "column 140 is out of range"),
}

CASE_OF = {"slices": "few", "blocks": "blocks", "groups": "grouped", "windows": "windows"}
"""The region of entries of BAD by what stands before the colon; else a single layer."""


def case_of(label: str) -> Case:
    """The region whose arrays an entry of BAD changes."""
    return case(CASE_OF.get(label.partition(":")[0], "single"))


def malformed() -> Iterator[tuple[str, bytes]]:
    """(label, model) of every entry of BAD."""
    for label, (array, change, _) in BAD.items():
        c = case_of(label)
        yield label, c.model(replace={array: change(c.arrays[array])})
