"""N:M: of every M inputs that follow each other, a row keeps N, and an index is a place among M.

    2:4       1 . . 4 | . 2 2 .      values [1, 4, 2, 2], codes [0, 3, 1, 2], of 2 bits each

    group     4 consecutive rows, in the order of the weight
    step      16 values of each row of a group; they come from the same SPAN = 16 M / N inputs in every row

    chunk, k_block, tile     as in `rx1.py`; SPAN divides k and k_block, so that all groups of a tile have as many steps

    indptr  int32  [groups of all tiles + 1]    where a group's steps begin
    order   int32  [groups of all tiles]        a group's place in its chunk: 0, 1, ...
    columns uint16 [steps, 4 WORDS]             row by row, the 16 codes of a row; the first in the lowest bits
    values  f32    [steps, 64]                  row by row; zero with code 0 where a row has fewer than N of M
    bias    f32    [rows, rounded up to 4]

A code has 2 bits where M is 4, else 4 bits, and WORDS is 2 or 4: 4.25 or 4.5 bytes a value, and none points outside of
its M inputs. With one token, codes are widened to places in a register and pick from activations that are in registers,
where unstructured weights have to gather them. With more, tokens fill the lanes, as in `rx1.py`.

Reference: Mishra et al., Accelerating Sparse Deep Neural Networks (2021), for the format.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels import sums
from spa_compiler.kernels.form import tiled
from spa_compiler.kernels.rx1 import ARRAYS, default_blocking, pad_bias

F32 = NDArray[np.float32]

ROWS = 4  # of a group: that many independent sums
STEP = 16  # values of a row
KINDS = ((2, 4), (4, 8), (8, 16), (1, 4), (2, 8), (4, 16))  # N:M that have kernels
_FULL = 0.95  # of the places have a value


@dataclass(frozen=True)
class Groups:
    """The form: N = `kept` of M = `of`, in tiles of `chunk` x `k_block`, where None is the usual size."""

    kept: int
    of: int
    chunk: int | None = None
    k_block: int | None = None
    rows: int = ROWS
    windowed: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """`2:4`; `2:4 in 128x768` with the tile."""
        return tiled(self.pattern, self.chunk, self.k_block)

    @property
    def pattern(self) -> str:
        """`N:M`."""
        return f"{self.kept}:{self.of}"

    @property
    def span(self) -> int:
        """Inputs of a step."""
        return STEP * self.of // self.kept

    @property
    def bits(self) -> int:
        """Of a code."""
        return 2 if self.of <= 4 else 4

    @property
    def words(self) -> int:
        """Of 16 bits, for the codes of a row in a step."""
        return STEP * self.bits // 16

    @property
    def info(self) -> dict[str, int]:
        """Of `LinearInfo` in region.h."""
        return {"cols": STEP, "span": self.span, "codes": ROWS * self.words}

    def kernel(self, lanes: int, act: str, window: bool) -> str:
        """The name of the kernel for tiles of `lanes` tokens."""
        return name(self.kept, self.of, lanes, act)

    def stored(self, weight: F32) -> int:
        """Floats that `pack` would store."""
        n, k = weight.shape
        return int(-(-n // ROWS) * ROWS * k * self.kept // self.of)

    def cut(self, chunk: int | None, k_block: int | None) -> Groups:
        """The same in other tiles."""
        return Groups(self.kept, self.of, chunk, k_block)

    def pack(self, weight: F32) -> Packed:
        """`weight` [n, k], without a bias."""
        return pack(weight, None, self.kept, self.of, self.chunk, self.k_block)

    def takes(self, weight: F32) -> bool:
        """Whether a weight [n, k] has these zeros, and next to no others."""
        n, k = weight.shape
        most = n * k * self.kept // self.of
        if k % self.span or not _FULL * most <= np.count_nonzero(weight) <= most:
            return False
        return bool(((weight != 0).reshape(-1, self.of).sum(axis=1) <= self.kept).all())


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] in this format."""

    n: int
    k: int
    kept: int
    of: int
    chunk: int
    k_block: int
    indptr: NDArray[np.int32]
    order: NDArray[np.int32]
    columns: NDArray[np.uint16]
    values: F32
    bias: F32

    @property
    def form(self) -> Groups:
        """With its tile sizes."""
        return Groups(self.kept, self.of, self.chunk, self.k_block)

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """In the order in which a node takes them."""
        return {what: getattr(self, what) for what in ARRAYS}

    def with_bias(self, bias: F32 | None) -> Packed:
        """The same weight with `bias` [n]; None: zeros."""
        return dataclasses.replace(self, bias=pad_bias(bias, self.n, ROWS))


def pack(
    weight: F32, bias: F32 | None, kept: int, of: int, chunk: int | None = None, k_block: int | None = None
) -> Packed:
    """`weight` [n, k] and `bias` [n] (or None) -> Packed. Exact.

    Raises:
        ValueError: some M inputs of a row have more than N nonzeros, or SPAN does not divide k and k_block, or 4 chunk.
    """
    n, k = weight.shape
    form, groups = Groups(kept, of), -(-n // ROWS)
    default = default_blocking(n, k, ROWS)
    chunk, k_block = chunk or default[0], k_block or default[1]
    if k % form.span or k_block % form.span or chunk % ROWS:
        raise ValueError(f"tiles of {chunk} x {k_block} cut steps of {ROWS} x {form.span}")
    padded = np.zeros((groups * ROWS, k), np.float32)
    padded[:n] = weight
    each = padded.reshape(-1, of)
    counts = np.count_nonzero(each, axis=1)
    if counts.max(initial=0) > kept:
        raise ValueError(f"{counts.max()} nonzeros of {of}")
    first = np.argsort(each == 0, axis=1, kind="stable")[:, :kept]  # nonzeros come first, in their order
    value = np.take_along_axis(each, first, axis=1)
    code = np.where(value != 0, first, 0)
    steps = k // form.span

    def arranged(items: NDArray[np.generic]) -> NDArray[np.generic]:
        """[rows, places of a row] -> [steps of all tiles, 4, 16], tile by tile."""
        grouped = items.reshape(groups, ROWS, steps, STEP).transpose(0, 2, 1, 3)
        per_chunk, per_block = chunk // ROWS, k_block // form.span
        tiles = [
            grouped[g : g + per_chunk, s : s + per_block].reshape(-1, ROWS, STEP)
            for g in range(0, groups, per_chunk)
            for s in range(0, steps, per_block)
        ]
        return np.concatenate(tiles)

    codes = arranged(code).reshape(-1, ROWS, form.words, STEP // form.words).astype(np.uint32)
    bits = np.arange(STEP // form.words, dtype=np.uint32) * np.uint32(form.bits)
    sizes = [
        (min(chunk // ROWS, groups - g), min(k_block, k - k0) // form.span)
        for g in range(0, groups, chunk // ROWS)
        for k0 in range(0, k, k_block)
    ]
    lengths = np.concatenate([np.full(count, length) for count, length in sizes])
    return Packed(
        n,
        k,
        kept,
        of,
        chunk,
        k_block,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        np.concatenate([np.arange(count) for count, _ in sizes]).astype(np.int32),
        (codes << bits).sum(axis=3).astype(np.uint16).reshape(-1, ROWS * form.words),
        np.ascontiguousarray(arranged(value).reshape(-1, ROWS * STEP), np.float32),
        pad_bias(bias, n, ROWS),
    )


def unpack(packed: Packed) -> F32:
    """The dense weight [n, k]."""
    dense = np.zeros((len(packed.bias), packed.k), np.float32)
    form, entry = packed.form, 0
    place = np.arange(STEP) // packed.kept * packed.of
    bits, per_word = form.bits, STEP // form.words
    for first in range(0, len(dense), packed.chunk):
        for k0 in range(0, packed.k, packed.k_block):
            for _ in range(min(packed.chunk, len(dense) - first) // ROWS):
                row = first + int(packed.order[entry]) * ROWS
                for j, step in enumerate(range(packed.indptr[entry], packed.indptr[entry + 1])):
                    for r in range(ROWS):
                        words = packed.columns[step, r * form.words : (r + 1) * form.words].astype(np.int64)
                        code = np.array(
                            [words[i // per_word] >> i % per_word * bits & (packed.of - 1) for i in range(STEP)]
                        )
                        column = k0 + j * form.span + place + code
                        np.add.at(dense[row + r], column, packed.values[step, r * STEP : (r + 1) * STEP])
                entry += 1
    return dense[: packed.n]


def reference(
    panel: F32, packed: Packed, residual: F32 | None = None, act: str = "none", low: float = 0.0, high: float = 0.0
) -> F32:
    """What the kernel computes on a panel tile [k, lanes], in float64: [n, lanes]."""
    return sums.reference(unpack(packed), packed.bias, panel, residual, act, low, high)


def name(kept: int, of: int, lanes: int, act: str) -> str:
    return f"spa_grouped_{kept}of{of}_{lanes}_{act}"
