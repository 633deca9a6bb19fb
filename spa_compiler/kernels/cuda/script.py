"""What scripts of several kernels say: calls of device.h, conversions, 16 bytes of each token."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T


def call(name, *arguments):
    """Emits a call of a function of device.h."""
    T.evaluate(T.call_extern("void", name, *arguments))


def syncwarp():
    call("spa_syncwarp")


def as_float(bits):
    return T.call_extern("float32", "spa_as_float", bits)


def as_uint(value):
    return T.call_extern("uint32", "spa_as_uint", value)


def load4(where):
    """A word at `where`, an element of a buffer of any type."""
    return T.call_extern("uint32", "spa_load4", T.address_of(where))


def act(name, value, low, high):
    """The activation of one value."""
    return T.call_extern("float32", f"spa_act_{name}", value, low, high)


def widened(dtype, value):
    """A number of the model's type as float32."""
    return value if dtype == "fp32" else T.call_extern("float32", f"spa_from_{dtype}", T.Cast("uint32", value))


def narrowed(dtype, value):
    """A float32 as the model's type."""
    return value if dtype == "fp32" else T.call_extern("uint16", f"spa_to_{dtype}", value)


def mma(dtype):
    """The function of device.h that multiplies numbers of `dtype`."""
    return "spa_mma_tf32" if dtype == "fp32" else f"spa_mma_{dtype}"


def word_type(dtype):
    """Of a buffer that holds numbers of `dtype`."""
    return "float32" if dtype == "fp32" else "uint16"


def load_tokens(xs, first, X, rows, count, column, k, size):
    """Loads 16 bytes, from `column` on, of each of `count` rows of x [tokens, k], which begin at `rows`, into registers
    `first` and following, 4 words a row.

    `size` is that of a number. Past the last column numbers of others are taken, or zeros: the weight has zeros there.
    """
    each = 16 // size
    with T.If(T.truncmod(k, each) == 0):
        with T.Then(), T.unroll(count) as t:
            where = X[rows[t] + T.min(column, k - each)]
            call("spa_load16", T.address_of(xs[first + t * 4]), T.address_of(where))
        with T.Else():
            valid = T.bind(T.max(0, T.min(k - column, each)) * size)
            with T.unroll(count) as t:
                where = X[rows[t] + T.min(column, k - 1)]
                call("spa_load16_part", T.address_of(xs[first + t * 4]), T.address_of(where), valid, size)
    if size == 4:
        with T.unroll(count * 4) as i:
            T.buffer_store(xs, T.call_extern("uint32", "spa_to_tf32", as_float(xs[first + i])), [first + i])


def add_up(S, total, warps, pitch, index):
    """Adds the sums number `index` of `warps` warps, `pitch` floats apart in shared bytes `S`, to total[0]."""
    with T.unroll(warps) as w:
        T.buffer_store(total, total[0] + as_float(load4(S[(w * pitch + index) * 4])), [tirx.IntImm("int32", 0)])


def store_result(Y, residual, total, index, dtype, epilogue, low, high):
    """Stores total[0], a sum with its bias, at `index` of y: the residual there is added, then comes the activation."""
    if epilogue.residual:
        T.buffer_store(total, total[0] + widened(dtype, residual[index]), [0])
    T.buffer_store(Y, narrowed(dtype, act(epilogue.act, total[0], low, high)), [index])
