"""What lanes hold in an mma, as NVIDIA's own library states it: the emulator and every packed array against that.

A layout of CUTLASS's CuTe gives, for (lane, register), the place of a number in a matrix whose first axis is the fast
one: sums of digit times stride. Those below are `MMA_Traits` of include/cute/atom/mma_traits_sm80.hpp; that of sparse
places is what `reorder_meta` of tools/util/include/cutlass/util/host_reorder.h makes of them, as ldmatrix hands it to
lanes (gemm/warp/mma_tensor_op_tile_iterator_sparse.h) and `id2` chooses (arch/mma_sparse_sm80.h). None of this comes
from this project's understanding of the manual.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spa_compiler.kernels.cuda import few, lowrank
from spa_compiler.kernels.cuda.blocks import Blocks
from spa_compiler.kernels.cuda.form import from_bits, to_bits
from spa_compiler.kernels.cuda.matvec import FourBit
from spa_compiler.kernels.cuda.two_four import TwoFour
from tests.cuda_emulator.emulator import call, compiled, guarded

Digits = tuple[tuple[int, int], ...]
"""(size, stride) of digits, the lowest first."""


def place(number: int, digits: Digits) -> int:
    """A number's place: its mixed-radix digits times their strides."""
    at = 0
    for size, stride in digits:
        at += number % size * stride
        number //= size
    return at


# (digits of the lane, digits of the number in the lane, rows of the matrix)
A16 = (((4, 32), (8, 1)), ((2, 16), (2, 8), (2, 128)), 16)  # m x k of m16n8k16
B16 = (((4, 16), (8, 1)), ((2, 8), (2, 64)), 8)  # n x k
A_TF32 = (((4, 16), (8, 1)), ((2, 8), (2, 64)), 16)  # of m16n8k8
B_TF32 = (((4, 8), (8, 1)), ((2, 32),), 8)
SUMS = (((4, 32), (8, 1)), ((2, 16), (2, 8)), 16)  # m x n


def held(matrix: NDArray[Any], layout: tuple[Digits, Digits, int]) -> NDArray[Any]:
    """[32 lanes, numbers] of a matrix that is as large as its layout."""
    lanes, numbers, rows = layout
    assert matrix.shape[0] == rows
    flat = matrix.T.reshape(-1)  # the first axis is the fast one
    count = flat.size // 32
    return np.stack([flat[[place(lane, lanes) + place(v, numbers) for v in range(count)]] for lane in range(32)])


def words(halves: NDArray[np.uint16]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(halves).view(np.uint32)


SOURCE = """
#define ONE(NAME, A, B) \\
  extern "C" __global__ void NAME(const uint* a, const uint* b, float* d) { \\
    spa_mma_##NAME(d + 4 * threadIdx.x, a + A * threadIdx.x, b + B * threadIdx.x); \\
  }
ONE(fp16, 4, 2)
ONE(bf16, 4, 2)
ONE(tf32, 4, 2)
extern "C" __global__ void sparse(const uint* a, const uint* b, float* d, const uint* places) {
  uint t = threadIdx.x;
  spa_mma_sparse_fp16_first(d + 4 * t, a + 4 * t, b + 4 * t, places[t]);
  spa_mma_sparse_fp16_second(d + 128 + 4 * t, a + 128 + 4 * t, b + 4 * t, places[t]);
}
"""


@functools.cache
def kernels() -> Any:
    return compiled(SOURCE + "".join(f"SPA_LAUNCHER({name})\n" for name in ("fp16", "bf16", "tf32", "sparse")))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32"])
def test_a_product_is_that_of_cutlass_s_layouts(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    k = 8 if dtype == "tf32" else 16
    m, n = rng.integers(-8, 9, (16, k)).astype(np.float32), rng.integers(-8, 9, (8, k)).astype(np.float32)
    if dtype == "tf32":
        a, b = held(m, A_TF32), held(n, B_TF32)
    else:
        a, b = words(held(to_bits(m, dtype), A16)), words(held(to_bits(n, dtype), B16))
    sums = guarded(np.zeros((32, 4), np.float32))
    call(kernels(), dtype, 32, 0, [guarded(a), guarded(b), sums], [])
    np.testing.assert_array_equal(sums, held(m @ n.T, SUMS))


def reordered(places: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Places [32 rows, 2 columns of 16 inputs] -> the word of each lane: rows 0..15 for selector 0, the others for 1."""
    moved = np.zeros((32, 2), np.uint16)
    for row in range(32):
        for column in range(2):
            to_row, to_column = row % 8 * 4 + row // 8, column
            if to_row % 2 == 0 and to_column == 1:
                to_row, to_column = to_row + 1, 0
            elif to_row % 2 == 1 and to_column == 0:
                to_row, to_column = to_row - 1, 1
            moved[to_row, to_column] = places[row, column]
    # Two columns interleaved: a row is a word. ldmatrix: lane 4 g + t has word t of line g, which is row 4 g + t.
    return words(moved).reshape(32)


def sparse_weight(rng: np.random.Generator, rows: int, columns: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(dense, kept numbers [rows, columns / 2], places: uint16 of 16 inputs each, the first four in the low nibble)."""
    kept = np.sort(rng.permuted(np.tile(np.arange(4), (rows, columns // 4, 1)), axis=2)[..., :2], axis=2)
    values = rng.integers(1, 9, kept.shape).astype(np.float32)
    dense = np.zeros((rows, columns // 4, 4), np.float32)
    np.put_along_axis(dense, kept, values, axis=2)
    nibbles = (kept[..., 0] | kept[..., 1] << 2).astype(np.uint16).reshape(rows, -1, 4)
    places = (nibbles << (4 * np.arange(4, dtype=np.uint16))).sum(axis=2).astype(np.uint16)
    return dense.reshape(rows, columns), values.reshape(rows, -1), places


def test_a_sparse_product_takes_places_as_cutlass_deals_them() -> None:
    """The fragments of a sparse product are those of m16n8k16 over kept numbers, and two of its B behind each other."""
    rng = np.random.default_rng(1)
    dense, values, places = sparse_weight(rng, 32, 32)
    x = rng.integers(-8, 9, (8, 32)).astype(np.float32)
    halves = to_bits(values, "fp16")
    a = np.stack([words(held(halves[16 * i : 16 * i + 16], A16)) for i in range(2)])
    b = np.concatenate([words(held(to_bits(x[:, 16 * i : 16 * i + 16], "fp16"), B16)) for i in range(2)], axis=1)
    sums = guarded(np.zeros((2, 32, 4), np.float32))
    call(kernels(), "sparse", 32, 0, [guarded(a), guarded(b), sums, guarded(reordered(places))], [])
    for i in range(2):
        np.testing.assert_array_equal(sums[i], held(dense[16 * i : 16 * i + 16] @ x.T, SUMS))


def test_what_two_four_packs_is_what_cutlass_deals() -> None:
    """A stage is two steps of 32 inputs: the second one's places lie where CUTLASS has those of the next 16 rows."""
    rng = np.random.default_rng(2)
    dense, values, places = sparse_weight(rng, 16, 64)
    packed = TwoFour().pack(dense, "fp16")
    np.testing.assert_array_equal(
        packed["places"].reshape(32), reordered(np.concatenate([places[:, :2], places[:, 2:]], axis=0))
    )
    halves = to_bits(values, "fp16")
    for step in range(2):
        mine = words(packed["values"].reshape(2, 32, 8)[step])
        np.testing.assert_array_equal(mine, words(held(halves[:, 16 * step : 16 * step + 16], A16)))


def dealt(weight: NDArray[np.float32], dtype: Any, own: int) -> NDArray[np.float32]:
    """[steps, 32 lanes, numbers] of A, where lane 4 g + q has columns own q .. own q + own - 1 of `weight` [16, 4 own].

    The order of columns in a sum is free: lanes take those of which they can read x in one piece.
    """
    layout, pair = (A_TF32, 1) if dtype == "fp32" else (A16, 2)
    steps = []
    for step in range(own // (2 * pair)):
        order = np.zeros(8 * pair, np.int64)
        for q in range(4):
            for i in range(2 * pair):  # numbers 2 t, 2 t + 1, then those 8 further on; of TF32, t and t + 4
                order[pair * q + i % pair + 4 * pair * (i // pair)] = own * q + 2 * pair * step + i
        steps.append(held(weight[:, order], layout))
    return np.stack(steps)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_scattered_and_low_rank_weights_are_fragments(dtype: Any) -> None:
    size = 4 if dtype == "fp32" else 2
    weight = np.random.default_rng(3).integers(1, 100, (16, 32)).astype(np.float32)
    tile = np.zeros(few.TILE // size, np.float32)
    tile[few.places_of(dtype)[:16, :32] // size] = weight
    want = dealt(weight, dtype, 8)
    np.testing.assert_array_equal(tile.reshape(-1, 2, *want.shape[1:])[: len(want), 0], want)
    weight = weight[:, : lowrank.columns(dtype)]
    words_ = lowrank.fragments(weight, dtype)[0, 0]
    want = dealt(weight, dtype, lowrank.columns(dtype) // 4)
    numbers = from_bits(words_.view(np.float32 if dtype == "fp32" else np.uint16), dtype)
    np.testing.assert_array_equal(numbers.reshape(want.shape), want)


def test_codes_of_four_bits_are_fragments() -> None:
    """Of fp16: each word's nibbles are the four pairs that a lane has of a row, as `spread` takes them out."""
    rng = np.random.default_rng(4)
    weight = rng.integers(0, 16, (16, 128)).astype(np.float32)
    weight[:, ::64], weight[:, 1::64] = 0, 15  # of every group: scale 1, zero point 0
    codes = FourBit(64).pack(weight, "fp16")["codes"].reshape(2, 32, 2, 2)  # half, lane, block of 32, row half
    for block in range(4):
        want = dealt(weight[:, 32 * block : 32 * block + 32], "fp16", 8)  # [step, lane, register and number]
        for step in range(2):
            for register in range(4):
                word, at = codes[block // 2, :, block % 2, register % 2], 8 * step + 4 * (register // 2)
                got = np.stack([word >> at & 15, word >> (at + 16) & 15], axis=1)
                np.testing.assert_array_equal(got, want[step, :, 2 * register : 2 * register + 2])


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_blocks_are_fragments(dtype: Any) -> None:
    layout, k = (A_TF32, 8) if dtype == "fp32" else (A16, 16)
    weight = np.random.default_rng(5).integers(1, 100, (16, 16)).astype(np.float32)
    values = from_bits(Blocks(16, 32).pack(weight, dtype)["values"], dtype).reshape(16 // k, 32, -1)
    for step in range(16 // k):
        want = held(weight[:, k * step : k * step + k], layout)
        np.testing.assert_array_equal(values[step], want)
