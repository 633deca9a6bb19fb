"""Vocabulary of the TVMScript kernels: constants, polynomials, register transposes, prefetches.

Functions here are called while TVM parses a script. Some return expressions, some emit statements; `T.bind`
emits an SSA value.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

ZMM = 16  # float32 lanes of a 512-bit register
AHEAD = 2048  # floats of values to prefetch ahead, 8 KiB: 4 to 16 KiB measured alike, 1 KiB is too little
ANY = 1 << 20  # extent of a flat buffer: extents are not checked at run time, pointers come from C

# 2^f on [-1/2, 1/2]: least largest relative error (1.1e-7, with rounding 1.9e-7) of those that are 1 at 0. Online
# softmax multiplies by 2^0 for every tile of keys that brings no new maximum, and what is a bit off there adds up.
EXP2 = (0.001326472731, 0.009671512991, 0.05550733581, 0.2402224243, 0.6931470037, 1.0)
LOG2_E = 1.4426950408889634
_WHOLE = 3 << 22  # 1.5 x 2^23: the sum with any |x| <= 2^22 is a whole number


@dataclass(frozen=True)
class Isa:
    """What a script has to know of the machine: floats of a register, how many registers, what instructions."""

    width: int
    registers: int
    estimates: bool = False  # of reciprocals, AVX-512's rcp14
    gathers: bool = False  # in one instruction, of a whole register

    def widths(self, lanes: int) -> tuple[int, int]:
        """(lanes of one register, registers) that hold `lanes` floats: full registers, or one narrower one."""
        return (self.width, lanes // self.width) if lanes >= self.width else (lanes, 1)

    def passes(self, rows: int, lanes: int) -> tuple[int, int, int]:
        """(lanes of one register, registers, passes): how `lanes` are cut so that accumulators stay in registers.

        A pass keeps `rows` sums for each of its registers of lanes, all factors of the one kind and one of the other.
        """
        width, total = self.widths(lanes)
        fits = (v for v in range(total, 0, -1) if total % v == 0 and rows * v + min(rows, v) + 1 < self.registers)
        each = next(fits, 1)
        return width, each, total // each


AVX512 = Isa(ZMM, 32, estimates=True, gathers=True)
ISAS = {
    "x86-64-v4": AVX512,
    "x86-64-v3": Isa(8, 16, gathers=True),
    "x86-64": Isa(4, 16),
    "aarch64": Isa(4, 32),
}
"""By the name of the level, as `targets` has them. x86-64 is SSE2, where a product and a sum are two instructions;
aarch64 is NEON."""


def isa_of(level: str) -> Isa:
    """What kernels for a level may use."""
    return ISAS[level]


def const(value, width):
    return T.float32(value) if width == 1 else T.Broadcast(T.float32(value), width)


def constants(values):
    """A vector of numbers."""
    return tirx.Shuffle([T.float32(v) for v in values], [tirx.IntImm("int32", i) for i in range(len(values))])


def spread(value, width):
    """A scalar expression in every lane."""
    return value if width == 1 else T.Broadcast(value, width)


def at(index, width):
    """Index of `width` consecutive elements."""
    return index if width == 1 else T.Ramp(index, 1, width)


def store(buffer, value, index, width):
    T.buffer_store(buffer, value, [at(index, width)])


def gather(buffer, index, width, isa):
    """`width` elements of `buffer` at the places in the vector `index`.

    One instruction where there is one for that width; else LLVM makes scalar loads of it.
    """
    if not isa.gathers or width != isa.width:
        return buffer[index]
    start = T.address_of(buffer[0])
    if width == ZMM:
        every = T.Broadcast(T.bool(True), width)
        intrinsic, scale = "llvm.x86.avx512.mask.gather.dps.512", T.int32(4)
    else:
        every = T.reinterpret(f"float32x{width}", T.Broadcast(T.int32(-1), width))
        intrinsic, scale = "llvm.x86.avx2.gather.d.ps.256", T.int8(4)
    return T.bind(T.call_llvm_intrin(f"float32x{width}", intrinsic, const(0.0, width), start, index, every, scale))


def pick(table, places):
    """16 lanes of the 512-bit registers in `table`, one, two or four, at `places`: of four, lanes 0 to 7 are in the
    first two and lanes 8 to 15 in the others."""
    if len(table) == 1:
        return T.bind(T.call_llvm_pure_intrin(f"float32x{ZMM}", "llvm.x86.avx512.permvar.sf.512", table[0], places))
    intrinsic = "llvm.x86.avx512.vpermi2var.ps.512"
    found = [
        T.bind(T.call_llvm_pure_intrin(f"float32x{ZMM}", intrinsic, table[i], places, table[i + 1]))
        for i in range(0, len(table), 2)
    ]
    half = ZMM // 2
    halves = [tirx.IntImm("int32", i if i < half else ZMM + i) for i in range(ZMM)]
    return found[0] if len(found) == 1 else T.bind(tirx.Shuffle(found, halves))


def horner(x, coefficients, width):
    result = const(coefficients[0], width)
    for c in coefficients[1:]:
        result = result * x + const(c, width)
    return result


def exp2(x, width):
    """2^x for |x| <= 126, relative error below 2e-7; the bounds' values beyond, NaN for NaN."""
    # max(a, b) is `a > b ? a : b`, which keeps NaN
    x = T.bind(T.max(const(-126.0, width), T.min(const(126.0, width), x)))
    # A float this large has no fraction, and its last bits are the whole number, with the exponent's bias. The way
    # through integers hides from TVM's simplifier that what is added is taken off again.
    integers, floats = ("int32", "float32") if width == 1 else (f"int32x{width}", f"float32x{width}")
    bits = T.bind(T.reinterpret(integers, x + const(_WHOLE + 127, width)))
    fraction = T.bind(x - (T.reinterpret(floats, bits) - const(_WHOLE + 127, width)))
    power = T.reinterpret(floats, T.shift_left(bits, spread(T.int32(23), width)))
    return T.bind(horner(fraction, EXP2, width) * power)


def reciprocal(x, width, isa):
    """1 / x for normal x, to the last bit or two: 14 bits from the instruction, the rest from one Newton step.

    A division of a 512-bit register takes 16 cycles on Intel, this takes 4. Scalars and machines without it divide.
    """
    if width < 4 or not isa.estimates:
        return const(1.0, width) / x
    x, bits = T.bind(x), 32 * width
    mask = T.int16(-1) if width == 16 else T.int8(-1)
    intrinsic = f"llvm.x86.avx512.rcp14.ps.{bits}"
    guess = T.bind(T.call_llvm_pure_intrin(f"float32x{width}", intrinsic, x, const(0.0, width), mask))
    return guess * (const(2.0, width) - x * guess)


def prefetch(buffer, index, lanes=1):
    """Fetches what a kernel for tiles of `lanes` tokens will read: weights come from memory once per run, and hardware
    prefetchers stop at the end of a page.

    Into L2 where a tile has whole registers: in L1 lines that wait would push out the panel, and the way from L2 costs
    next to nothing beside so many multiply-adds (20 % of the time with 16 lanes). With fewer tokens the kernel is as
    fast as the weights arrive, and they go to L1 at once.
    """
    locality = 2 if lanes >= ZMM else 3
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), 0, locality, 1))


def transpose(rows):
    """n vectors of n lanes, a power of two, transposed in butterfly steps; becomes shuffles of registers."""
    n, step = len(rows), 1
    while step < n:
        low = [i if not i & step else n + i - step for i in range(n)]
        high = [i + step if not i & step else n + i for i in range(n)]
        out = list(rows)
        for i in range(n):
            if not i & step:
                pair = [rows[i], rows[i + step]]
                for row, lanes in ((i, low), (i + step, high)):
                    out[row] = T.bind(tirx.Shuffle(pair, [tirx.IntImm("int32", lane) for lane in lanes]))
        rows, step = out, step * 2
    return rows


def emit_transpose(source, source_row, target, target_row, isa):
    """Transposes a 16 x 16 tile from memory to memory, in squares as wide as a register; the arguments map a row number
    to its first element."""
    n = isa.width
    for down in range(0, ZMM, n):
        for right in range(0, ZMM, n):
            rows = [T.bind(source[at(source_row(down + i) + right, n)]) for i in range(n)]
            for i, row in enumerate(transpose(rows)):
                store(target, row, target_row(right + i) + down, n)
