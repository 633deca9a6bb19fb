"""What the packed arrays of a form must look like, as data: sizes, and what integers that kernels index with may be.

A model is not trusted, and a wrong index is an access out of bounds on the GPU. `runtime/c/gpu_check.c` refuses what
breaks these rules when a session is made; `check` is the same in numpy, for tests of forms.

    blocks of 32 x 32:
      Array("offsets", "int32", (Extent(rows=32, plus=1),), Offsets(Extent(count="blocks")))
      Array("columns", "uint16", (Extent(count="blocks"),), Below(Extent(columns=32)))
      Array("order", "int32", (Extent(rows=1),), Permutation(Extent(rows=1)))
      Array("values", "uint16", (Extent(count="blocks"), Extent(1024)))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_ARRAYS, MAX_RANK, MAX_COUNTS = 12, 3, 4  # of the C side: runtime/c/gpu.h
DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "float16", "float32")


@dataclass(frozen=True)
class Extent:
    """times x ceil(n / rows) x ceil(k / columns) x count + plus, for a weight [n, k]; what is 0 or empty is no factor.

    A count is a size that n and k do not give, such as the number of blocks. The first array with it says how large it
    is, in one axis; all others must agree.
    """

    times: int = 1
    rows: int = 0
    columns: int = 0
    count: str = ""
    plus: int = 0

    def size(self, n: int, k: int, counts: Mapping[str, int]) -> int:
        """For a weight [n, k]; KeyError where the count is not known."""
        return self.factors(n, k) * (counts[self.count] if self.count else 1) + self.plus

    def factors(self, n: int, k: int) -> int:
        """Without the count and `plus`."""
        return self.times * (-(-n // self.rows) if self.rows else 1) * (-(-k // self.columns) if self.columns else 1)


@dataclass(frozen=True)
class Below:
    """0 <= (v >> shift) & mask < bound for every element v; a mask of 0 takes v as it is."""

    bound: Extent
    shift: int = 0
    mask: int = 0


@dataclass(frozen=True)
class Offsets:
    """From 0 to `bound`, and none is smaller than the one before."""

    bound: Extent


@dataclass(frozen=True)
class Permutation:
    """0 .. bound - 1, each once."""

    bound: Extent


Check = Below | Offsets | Permutation


@dataclass(frozen=True)
class Array:
    """One packed array: numpy's name of its type, the extent of each axis, what its integers may be if that matters."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    check: Check | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or not 1 <= len(self.shape) <= MAX_RANK:
            raise ValueError(
                f"{self.name}: an array is of one of {', '.join(DTYPES)}, and of 1 to {MAX_RANK} dimensions"
            )


def counts_of(rules: Sequence[Array]) -> tuple[str, ...]:
    """Their counts, in the order in which arrays say how large they are.

    Raises:
        ValueError: a bound has a count that no array's size has, or there are too many arrays or counts.
    """
    counts = tuple(dict.fromkeys(extent.count for rule in rules for extent in rule.shape if extent.count))
    for rule in rules:
        if rule.check and rule.check.bound.count not in ("", *counts):
            raise ValueError(f"{rule.name}: no array has the size {rule.check.bound.count!r}")
    if len(rules) > MAX_ARRAYS or len(counts) > MAX_COUNTS:
        raise ValueError(f"at most {MAX_ARRAYS} arrays and {MAX_COUNTS} counts")
    return counts


def check(rules: Sequence[Array], arrays: Mapping[str, NDArray[Any]], n: int, k: int) -> None:
    """Compares `arrays` of a weight [n, k] with the rules.

    Raises:
        ValueError: they break one; the message names the array.
    """
    counts: dict[str, int] = {}
    if list(arrays) != [rule.name for rule in rules]:
        raise ValueError(f"the arrays are {', '.join(arrays)}, the rules are for {', '.join(r.name for r in rules)}")
    for rule in rules:
        array = arrays[rule.name]
        if array.dtype != rule.dtype or array.ndim != len(rule.shape):
            raise ValueError(f"{rule.name} must be {rule.dtype} of {len(rule.shape)} dimensions")
        for axis, extent in enumerate(rule.shape):
            each, rest = extent.factors(n, k), array.shape[axis] - extent.plus
            if extent.count and extent.count not in counts:
                if rest < 0 or rest % each:
                    raise ValueError(f"{rule.name} has {array.shape[axis]} on axis {axis}, no multiple of {each}")
                counts[extent.count] = rest // each
            if array.shape[axis] != extent.size(n, k, counts):
                raise ValueError(
                    f"{rule.name} must have {extent.size(n, k, counts)} on axis {axis}, not {array.shape[axis]}"
                )
    for rule in rules:
        if rule.check:
            _check_values(rule.name, rule.check, arrays[rule.name].reshape(-1).astype(np.int64), n, k, counts)


def _check_values(name: str, rule: Check, values: NDArray[np.int64], n: int, k: int, counts: Mapping[str, int]) -> None:
    bound = rule.bound.size(n, k, counts)
    if isinstance(rule, Offsets):
        if not values.size or values[0] != 0 or values[-1] != bound or (np.diff(values) < 0).any():
            raise ValueError(f"{name} must run from 0 to {bound} and not decrease")
    elif isinstance(rule, Permutation):
        if not np.array_equal(np.sort(values), np.arange(bound)):
            raise ValueError(f"{name} must be a permutation of {bound}")
    else:
        seen = (values >> rule.shift) & rule.mask if rule.mask else values
        if values.size and (seen.min() < 0 or seen.max() >= bound):
            raise ValueError(f"{name} must be from 0 to {bound - 1}")
