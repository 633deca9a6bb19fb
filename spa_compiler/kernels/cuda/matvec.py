"""Weights of 4 bits in groups along k, for one token or a few.

A weight w of a group is (q - z) s: q is 0..15, the zero point z and the scale s are the group's, and z is a whole
number, so that zeros are exact. Other weights do not fit: who wants them rounded to such grids says so before (the pass
`quantize`). `grids.py` finds the grids in the values alone.

    strip    16 rows, step    128 columns of a strip: what a warp multiplies at a time

    codes    uint32 [steps of all strips, 2 halves x 32 lanes, 4]   half h of lane 4 g + q:
                                              rows g, g + 8 of columns 64 h + 8 q .. + 7, of 64 h + 32 + 8 q .. + 7
             word                             column c of its 8 in bits 16 (c % 2) + 4 (c / 2) and following
    scales   uint32 [steps of all strips, groups of a step x 8, 2]  of rows g, g + 8: s as float32, with z in place of
                                              its lowest 4 bits

A lane's words are its part of the fragments of an mma with 16 rows, once nibbles are spread to numbers of 16 bits:
pair i of a word is (word >> 4 i) & 0x000f000f; with the bits of 1024 (bf16: 128) above, that is the number 1024 + q,
and q - z is one subtraction away, exactly. Tensor cores multiply even a single token: sums are float32, and an mma of
which seven of eight columns are idle costs less than multiplications one by one. Scales come after the sum over a
group.

A weight takes 0.5 + 4 / group bytes, 3.8 times fewer than fp16 at 128. Zeros are stored as what they are, codes like
others. A bitmap and the nibbles of nonzeros alone would take 0.41 bytes at 50 % zeros, but in the time in which an
H200's memory brings those, a multiprocessor issues 2.5 instructions for each weight: what it takes to multiply alone,
without finding where a nonzero belongs.

Reference: Kim et al., Who Says Elephants Can't Run: Bringing Large Scale MoE Models into Cloud Scale Production, 2022,
arXiv 2211.10017, for numbers made of nibbles by their bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tvm.script import tirx as T

from spa_compiler.kernels.cuda import grids
from spa_compiler.kernels.cuda.arrays import Array, Extent
from spa_compiler.kernels.cuda.form import F32, Arrays, Dtype, Epilogue, Form, Kernel, Layout
from spa_compiler.kernels.cuda.roofline import microseconds
from spa_compiler.kernels.cuda.script import add_up, as_float, as_uint, call, load_tokens, mma, store_result
from spa_compiler.kernels.vector import ANY
from spa_compiler.targets.cuda import Architecture

ROWS = 16
STEP = 128
GROUPS = (32, 64, 128)
BINS = (8, 16)  # tokens of a thread block


@dataclass(frozen=True)
class FourBit:
    """The form: codes of 4 bits in groups of `group` columns."""

    group: int = 128

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"groups are of {', '.join(map(str, GROUPS))} columns")

    @property
    def name(self) -> str:
        """`4-bit in groups of 128`."""
        return f"4-bit in groups of {self.group}"

    @property
    def rather(self) -> Form | None:
        """Groups of twice the size: fewer scales."""
        return FourBit(2 * self.group) if 2 * self.group in GROUPS else None

    @property
    def arrays(self) -> Sequence[str]:
        """In the order of a kernel's arguments."""
        return ("codes", "scales")

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        """Sizes alone: a kernel indexes with nothing that it reads."""
        steps = Extent(rows=ROWS, columns=STEP)
        return (
            Array("codes", "uint32", (steps, Extent(64), Extent(4))),
            Array("scales", "uint32", (steps, Extent(8 * STEP // self.group), Extent(2))),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        """All of it, in 4 bits each, and the scales."""
        return (0.5 + 4 / self.group) / (4 if dtype == "fp32" else 2)

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        """`weight` [n, k] -> `codes`, `scales`.

        Raises:
            ValueError: the weight is on no grid of 4 bits, nearly always after a look at the first groups; or `dtype`
                is fp32.
        """
        if dtype == "fp32":
            raise ValueError("weights of 4 bits have no kernels for float32")
        n, k = weight.shape
        strips, steps = -(-n // ROWS), -(-k // STEP)
        codes = np.empty((strips, steps, 64, 4), np.uint32)
        scales = np.empty((strips, steps, 8 * STEP // self.group, 2), np.uint32)
        grids.find(_padded(weight[:ROWS, :STEP]).reshape(ROWS, -1, self.group), dtype)
        for strip in range(strips):
            rows = _padded(weight[strip * ROWS : (strip + 1) * ROWS])
            q, s, z = grids.find(rows.reshape(ROWS, -1, self.group), dtype)
            # [row half, g, step, half, block, lane q, pair, odd] -> [step, half, g, lane q, block, row half, pair, odd]
            nibbles = q.reshape(2, 8, steps, 2, 2, 4, 4, 2).transpose(2, 3, 1, 5, 4, 0, 6, 7).astype(np.uint32)
            shifts = np.arange(4, dtype=np.uint32)[:, None] * 4 + np.arange(2, dtype=np.uint32) * 16
            codes[strip] = np.bitwise_or.reduce(nibbles << shifts, axis=(-1, -2)).reshape(steps, 64, 4)
            words = s.view(np.uint32) | z
            scales[strip] = words.reshape(2, 8, steps, -1).transpose(2, 3, 1, 0).reshape(steps, -1, 2)
        return {"codes": codes.reshape(-1, 64, 4), "scales": scales.reshape(strips * steps, -1, 2)}

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        """The weight [n, k] again, not rounded to `dtype`: kernels scale sums, in float32."""
        strips, steps = -(-n // ROWS), -(-k // STEP)
        shifts = np.arange(4, dtype=np.uint32)[:, None] * 4 + np.arange(2, dtype=np.uint32) * 16
        words = arrays["codes"].reshape(strips, steps, 2, 8, 4, 2, 2)
        nibbles = words[..., None, None] >> shifts & 15
        q = nibbles.transpose(0, 6, 3, 1, 2, 5, 4, 7, 8).reshape(strips, 2, 8, steps, STEP // self.group, self.group)
        scales = arrays["scales"].reshape(strips, steps, STEP // self.group, 8, 2).transpose(0, 4, 3, 1, 2)[..., None]
        s, z = np.ascontiguousarray(scales & ~np.uint32(15)).view(np.float32), (scales & 15).astype(np.float32)
        weight: F32 = ((q - z) * s).astype(np.float32).reshape(strips * ROWS, steps * STEP)
        return weight[:n, :k]

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        """Of fp16 and bf16, in rows, for up to 16 tokens: blocks of several strips read x less often, where there are
        enough rows for that; where there are few, more warps share a strip."""
        if layout != "rows" or tokens > BINS[-1] or dtype == "fp32":
            return []
        tile = next(b for b in BINS if tokens <= b)
        made = [kernel(dtype, epilogue, self.group, tile, *shape) for shape in SHAPES[tile]]
        return [one for one in made if one.fits(arch)]

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        """Microseconds; of the instructions of a step, some 110 for a strip and 40 for 8 tokens, four start a cycle."""
        read = sum(array.nbytes for array in arrays.values())
        strips, tiles = kernel.tile_rows // ROWS, kernel.tile_tokens // 8
        cycles = -(-k // STEP) * (strips * (100 + 10 * tiles) + 40 * tiles) / 4
        return microseconds(arch, kernel.grid(n, tokens), read, min(tokens, kernel.tile_tokens) * k * 2, cycles)


def _padded(rows: F32) -> F32:
    """Whole strips and steps, with zeros."""
    whole = np.zeros((ROWS, -(-rows.shape[1] // STEP) * STEP), np.float32)
    whole[: len(rows), : rows.shape[1]] = rows
    return whole


SHAPES = {8: {(2, 8): 2, (1, 8): 3, (1, 16): 1}, 16: {(2, 8): 1, (1, 8): 2, (1, 16): 1}}
"""By the tokens of a block (strips, warps): blocks whose registers shall fit a multiprocessor."""


def kernel(dtype: Dtype, epilogue: Epilogue, group: int, tokens: int, strips: int, warps: int) -> Kernel:
    """For tiles of `tokens` (one of `BINS`) and of `strips`."""
    return Kernel(
        f"spa_four_bit_{dtype}_{group}_{tokens}_{strips}_{warps}_{epilogue}",
        lambda: _script(dtype, epilogue, group, tokens, strips, warps),
        threads=32 * warps,
        tile_rows=ROWS * strips,
        tile_tokens=tokens,
        shared_bytes=_shared(tokens, strips, warps),
        min_blocks=SHAPES[tokens][strips, warps],
    )


def _shared(tokens: int, strips: int, warps: int) -> int:
    return warps * 4 * tokens * (ROWS * strips + 1)


# Bits of two numbers each: with a nibble in the lowest bits `base` is B + q, and `minus` | z is -(B + z). Where nibbles
# are 4 bits higher it is B + 16 q, of which a 16th less B / 16 + z is wanted. In bf16 there is no room for that, so all
# nibbles come down.
_NUMBERS = {
    "fp16": {"base": 0x64006400, "one": 0x3C003C00, "minus": 0xE400E400, "part": 0x2C002C00, "minus_part": 0xD400D400},
    "bf16": {"base": 0x43004300, "one": 0x3F803F80, "minus": 0xC300C300, "part": 0, "minus_part": 0},
}


def _script(dtype, epilogue, group, tile, strips, warps):
    NT = tile // 8
    W = warps
    M = strips
    PITCH = ROWS * strips + 1  # floats of a token's row of sums
    GROUP = group
    PARTS = STEP // group
    SHARED = _shared(tile, strips, warps)
    numbers = {name: T.uint32(bits) for name, bits in _NUMBERS[dtype].items()}

    def load_step(codes, scales, into, words, m, step, lane, g):
        """A lane's words of a step of strip m: 8 of codes, 2 of each group's scales."""
        for half in range(2):
            where = T.address_of(codes[((step * 2 + half) * 32 + lane) * 4])
            call("spa_load16_once", T.address_of(into[m * 8 + half * 4]), where)
        for part in range(PARTS):
            where = T.address_of(scales[((step * PARTS + part) * 8 + g) * 2])
            call("spa_load8", T.address_of(words[(m * PARTS + part) * 2]), where)

    def spread(a, word, zero, row):
        """Fragments of row half `row`: the four pairs of a word, less the zero point, which is in both halves of
        `zero`."""
        for i in range(4):
            if dtype == "fp16":
                shifted = word if i < 2 else T.shift_right(word, T.uint32(8))
                mask, factor = (0x000F000F, "one") if i % 2 == 0 else (0x00F000F0, "part")
                minus = numbers["minus"] | zero
                if i % 2:
                    minus = numbers["minus_part"] | T.shift_left(zero, T.uint32(4))
            else:
                shifted = T.shift_right(word, T.uint32(4 * i)) if i else word
                mask, factor, minus = 0x000F000F, "one", numbers["minus"] | zero
            value = T.call_extern("uint32", "spa_and_or", shifted, T.uint32(mask), numbers["base"])
            number = T.call_extern("uint32", f"spa_fma_{dtype}x2", value, numbers[factor], minus)
            T.buffer_store(a, number, [i // 2 * 4 + i % 2 * 2 + row])

    def multiply(sums, m, part, words, codes, xs):
        """Adds a step of strip m, whose words are all in registers."""
        for block in range(STEP // 32):
            of = block * 32 // GROUP
            a = T.alloc_buffer((8,), "uint32", scope="local")
            if block * 32 % GROUP == 0:
                with T.unroll(4 * NT) as i:
                    T.buffer_store(part, T.float32(0), [i])
            for row in range(2):
                zero = T.bind((words[of * 2 + row] & T.uint32(15)) * T.uint32(0x10001))
                spread(a, codes[block * 2 + row], zero, row)
            with T.unroll(2) as step, T.unroll(NT) as t:
                b = xs[(block * NT + t) * 4 + step * 2]
                call(mma(dtype), T.address_of(part[t * 4]), T.address_of(a[step * 4]), T.address_of(b))
            if (block + 1) * 32 % GROUP == 0:
                for row in range(2):
                    scale = T.bind(as_float(words[of * 2 + row] & T.uint32(0xFFFFFFF0)))
                    with T.unroll(NT) as t, T.unroll(2) as j:
                        i = t * 4 + row * 2 + j
                        T.buffer_store(sums, sums[m * NT * 4 + i] + scale * part[i], [m * NT * 4 + i])

    @T.prim_func(s_tir=True)
    def four_bit(
        codes_: T.handle("uint32"),
        scales_: T.handle("uint32"),
        x_: T.handle("uint16"),
        bias_: T.handle("float32"),
        residual__: T.handle("uint16"),
        y_: T.handle("uint16"),
        n: T.int32,
        k: T.int32,
        tokens: T.int32,
        batch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": "four_bit", "tirx.noalias": True})
        codes = T.decl_buffer((ANY,), "uint32", data=codes_)
        scales = T.decl_buffer((ANY,), "uint32", data=scales_)
        X = T.decl_buffer((ANY,), "uint16", data=x_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        residual = T.decl_buffer((ANY,), "uint16", data=residual__)
        Y = T.decl_buffer((ANY,), "uint16", data=y_)
        column_of_grid = T.launch_thread("blockIdx.x", T.ceildiv(tokens, tile))
        tile_of_rows = T.launch_thread("blockIdx.y", T.ceildiv(n, ROWS * M))
        T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", 32 * W)
        S = T.alloc_buffer((SHARED,), "uint8", scope="shared.dyn")
        sums = T.alloc_buffer((4 * NT * M,), "float32", scope="local")
        part = T.alloc_buffer((4 * NT,), "float32", scope="local")
        xs = T.alloc_buffer((16 * NT,), "uint32", scope="local")
        rows = T.alloc_buffer((NT,), "int32", scope="local")
        these = T.alloc_buffer((8,), "uint32", scope="local")
        words = T.alloc_buffer((2 * PARTS,), "uint32", scope="local")
        coming = T.alloc_buffer((8 * M,), "uint32", scope="local")
        coming_words = T.alloc_buffer((2 * PARTS * M,), "uint32", scope="local")
        first: T.let[T.int32] = column_of_grid * tile
        warp: T.let[T.int32] = T.truncdiv(thread, 32)
        lane: T.let[T.int32] = T.truncmod(thread, 32)
        g: T.let[T.int32] = T.truncdiv(lane, 4)
        q: T.let[T.int32] = T.truncmod(lane, 4)
        steps: T.let[T.int32] = T.truncdiv(k + (STEP - 1), STEP)
        strip: T.let[T.int32] = tile_of_rows * M
        last: T.let[T.int32] = T.truncdiv(n + (ROWS - 1), ROWS) - 1  # strip; sums of those past it are not stored
        for i in T.unroll(4 * NT * M):
            sums[i] = T.float32(0)
        for t in T.unroll(NT):  # nor are those of tokens past the last one
            rows[t] = T.min(first + t * 8 + g, tokens - 1) * k
        if warp < steps:
            for m in T.unroll(M):
                load_step(codes, scales, coming, coming_words, m, T.min(strip + m, last) * steps + warp, lane, g)
        for i in T.serial(T.truncdiv(steps - warp + (W - 1), W)):
            step: T.let[T.int32] = warp + i * W
            for block in T.unroll(STEP // 32):
                load_tokens(xs, block * (4 * NT), X, rows, NT, step * STEP + block * 32 + q * 8, k, 2)
            for m in T.unroll(M):
                for j in T.unroll(8):
                    these[j] = coming[m * 8 + j]
                for j in T.unroll(2 * PARTS):
                    words[j] = coming_words[m * (2 * PARTS) + j]
                if step + W < steps:
                    load_step(
                        codes, scales, coming, coming_words, m, T.min(strip + m, last) * steps + step + W, lane, g
                    )
                multiply(sums, m, part, words, these, xs)
        for m in T.unroll(M):
            for t in T.unroll(NT):
                for j in T.unroll(4):
                    where: T.let[T.int32] = (
                        (warp * tile + t * 8 + q * 2 + j % 2) * PITCH + m * ROWS + T.truncdiv(j, 2) * 8 + g
                    )
                    call("spa_store4", T.address_of(S[where * 4]), as_uint(sums[(m * NT + t) * 4 + j]))
        T.tvm_storage_sync("shared.dyn")
        for i in T.serial(-(-ROWS * M * tile // (32 * W))):
            column: T.let[T.int32] = T.truncdiv(i * (32 * W) + thread, ROWS * M)
            row: T.let[T.int32] = T.truncmod(i * (32 * W) + thread, ROWS * M)
            if T.And(strip * ROWS + row < n, T.And(column < tile, first + column < tokens)):
                total = T.alloc_buffer((1,), "float32", scope="local")
                total[0] = bias[strip * ROWS + row]
                add_up(S, total, W, tile * PITCH, column * PITCH + row)
                store_result(Y, residual, total, (first + column) * n + strip * ROWS + row, dtype, epilogue, low, high)

    return four_bit
