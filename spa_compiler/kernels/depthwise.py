"""Depthwise convolution, one channel at a time: every output sums height x width inputs of its own channel.

A largest value of a window is the same with max in place of the sum, and padding that is below everything.

    buffer    the rows of the channel that a band of outputs reads, padded; `step` phases side by side, `plane` floats
              each, rows `pitch` floats apart: phase p holds the padded columns p, p + step, p + 2 step, ...

Rows of the image are copied in whole registers (`spa_pad`, for a step of 1 or 2; `spa_shift` of `kernels/window.py`
takes any step and reads nothing that lies behind the image). A tap (y, x) of all outputs of a row lies in one phase,
one float after the other, so no vector is gathered whatever the stride. The copy also takes care of the edges: the
sums have no cases. They run down strips of columns, several rows at a time, so that what is loaded once serves all
rows that see it.

Source: direct convolution with register tiles over rows, arXiv 1809.10170.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import activation
from spa_compiler.kernels.vector import ANY, AVX512, ZMM, Isa, at, const, spread, store
from spa_compiler.kernels.window import Window

F32 = NDArray[np.float32]
PAD = "spa_pad"
LOWEST = -3.4028234663852886e38  # what lies in the padding of a window whose largest value is taken


def rows_at_once(isa: Isa) -> int:
    """Sums that run side by side: enough to hide the latency of a multiply-add, few enough to stay in registers."""
    return 8 if isa.registers >= 32 else 4


def buffer_reference(x: F32, window: Window, first: int, height: int, pitch: int, fill: float = 0.0) -> F32:
    """`x` [H, W] -> what the outputs of rows first .. first + height read: [step, rows, pitch]."""
    step, rows = window.stride[1], (height - 1) * window.stride[0] + (window.size[0] - 1) * window.dilation[0] + 1
    buffer = np.full((step, rows, pitch), fill, np.float32)
    for phase in range(step):
        columns = np.arange(pitch) * step + phase - window.pads[1]
        inside = (columns >= 0) & (columns < x.shape[1])
        for i in range(rows):
            row = first * window.stride[0] - window.pads[0] + i
            if 0 <= row < x.shape[0]:
                buffer[phase, i, inside] = x[row, columns[inside]]
    return buffer


def largest_reference(x: F32, window: Window) -> F32:
    """The largest value that each output sees of `x` [channels, H, W]."""
    top, left, bottom, right = window.pads
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right)), constant_values=LOWEST)
    height, width = window.outputs(*x.shape[1:])
    y = np.full((len(x), height, width), LOWEST, np.float32)
    for tap_y, tap_x in np.ndindex(*window.size):
        seen = padded[:, tap_y * window.dilation[0] :, tap_x * window.dilation[1] :]
        y = np.maximum(y, seen[:, :: window.stride[0], :: window.stride[1]][:, :height, :width])
    return y


def reference(x: F32, weight: F32, bias: F32, window: Window) -> NDArray[np.float64]:
    """The convolution of `x` [channels, H, W], weight [channels, height x width], in float64."""
    top, left, bottom, right = window.pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right)))
    height, width = window.outputs(*x.shape[1:])
    y = np.repeat(bias.astype(np.float64), height * width).reshape(-1, height, width)
    for i, (tap_y, tap_x) in enumerate(np.ndindex(*window.size)):
        seen = padded[:, tap_y * window.dilation[0] :, tap_x * window.dilation[1] :]
        seen = seen[:, :: window.stride[0], :: window.stride[1]][:, :height, :width]
        y += weight[:, i, None, None].astype(np.float64) * seen
    return y


def padded_reference(x: F32, window: Window, pitch: int, fill: float = 0.0) -> F32:
    """All rows of `x` [H, W], as `spa_pad` lays them out: [step, H, pitch], `fill` left and right of them."""
    step, left = window.stride[1], window.pads[1]
    columns = np.arange(pitch * step) - left
    inside = (columns >= 0) & (columns < x.shape[1])
    rows = np.full((x.shape[0], pitch * step), fill, np.float32)
    rows[:, inside] = x[:, columns[inside]]
    return np.ascontiguousarray(rows.reshape(-1, pitch, step).transpose(2, 0, 1))


def name(window: Window, act: str) -> str:
    """One kernel for each form of a window: sizes and steps are constants in it, images and padding are not."""
    sizes = "_".join("x".join(map(str, pair)) for pair in (window.size, window.stride, window.dilation))
    return f"spa_depthwise_{sizes}_{act}"


def largest_name(window: Window) -> str:
    """Of the kernel that takes the largest value of a window."""
    return f"{name(window, 'none').replace('depthwise', 'largest').removesuffix('_none')}"


def parse(name: str) -> tuple[Window, str]:
    """The window, without channels and padding, and the activation of a name, `largest` for one of `largest_name`."""
    if name.startswith("spa_largest_"):
        name = f"{name.replace('largest', 'depthwise')}_largest"
    size, stride, dilation, act = name.removeprefix("spa_depthwise_").split("_", 3)
    return Window(1, _pair(size), _pair(stride), _pair(dilation)), act


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def _block(buffer, weight, regs, origin, plane, pitch, window, rows, width, largest):
    """Adds all taps to `rows` sums, or keeps the largest; `origin` is the place of the first output's first tap."""
    size, stride, dilation = window.size, window.stride, window.dilation
    for row in range((rows - 1) * stride[0] + (size[0] - 1) * dilation[0] + 1):
        uses = [
            (t, (row - t * stride[0]) // dilation[0])
            for t in range(rows)
            if 0 <= row - t * stride[0] <= (size[0] - 1) * dilation[0] and (row - t * stride[0]) % dilation[0] == 0
        ]
        for x in range(size[1] if uses else 0):
            phase, column = x * dilation[1] % stride[1], x * dilation[1] // stride[1]
            seen = T.bind(buffer[at(origin + phase * plane + row * pitch + column, width)])
            for t, y in uses:
                so_far = regs[at(t * width, width)]
                if largest:
                    store(regs, T.max(so_far, seen), t * width, width)
                else:
                    store(regs, so_far + spread(weight[y * size[1] + x], width) * seen, t * width, width)


def kernel(window: Window, act: str, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_depthwise_<size>_<stride>_<dilation>_<act>(buffer, weight, bias, out, height, width, plane, pitch,
    out_pitch, low, high)

    `act` may be `largest`: the kernel of `largest_name`, which reads neither weight nor bias.

    A band of `height` rows of `width` outputs of one channel, `out_pitch` floats from row to row. Vectors are whole:
    where `width` is no multiple of a register the last one of a row begins early, and where a row is shorter than a
    register it writes past the row's end, which the next row mends; behind the last row up to a register less one
    float is written. The buffer must hold what is read for that, and the rows of a whole block of `rows_at_once`.
    """
    width, rows = isa.width, rows_at_once(isa)
    step, largest = window.stride[0], act == "largest"
    called, act = (largest_name(window), "none") if largest else (name(window, act), act)

    @T.prim_func(s_tir=True)
    def depthwise(
        buffer_: T.handle("float32"),
        weight_: T.handle("float32"),
        bias_: T.handle("float32"),
        out_: T.handle("float32"),
        height: T.int32,
        columns: T.int32,
        plane: T.int32,
        pitch: T.int32,
        out_pitch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": called, "tirx.noalias": True})
        buffer = T.decl_buffer((ANY,), "float32", data=buffer_)
        weight = T.decl_buffer((ANY,), "float32", data=weight_)
        bias = T.decl_buffer((ANY,), "float32", data=bias_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for block in T.serial(T.truncdiv(height + rows - 1, rows)):
            for strip in T.serial(T.truncdiv(columns + width - 1, width)):
                first: T.let[T.int32] = T.max(T.min(strip * width, columns - width), 0)
                regs = T.alloc_buffer((rows * width,), "float32", scope="local")
                if largest:
                    for t in T.unroll(rows):
                        store(regs, const(LOWEST, width), t * width, width)
                else:
                    for t in T.unroll(rows):
                        store(regs, spread(bias[0], width), t * width, width)
                origin: T.let[T.int32] = block * (rows * step) * pitch + first
                _block(buffer, weight, regs, origin, plane, pitch, window, rows, width, largest)
                for t in T.unroll(rows):
                    if block * rows + t < height:
                        store(
                            out,
                            activation.emit(regs[at(t * width, width)], act, low, high, width, isa),
                            (block * rows + t) * out_pitch + first,
                            width,
                        )

    return depthwise


def _split(x, begin, buffer, even, odd):
    """32 floats: those at even places to place `even` of the buffer, the others to `odd`."""
    pair = [T.bind(x[at(begin + i * ZMM, ZMM)]) for i in range(2)]
    for first, place in ((0, even), (1, odd)):
        store(buffer, tirx.Shuffle(pair, [tirx.IntImm("int32", first + 2 * i) for i in range(ZMM)]), place, ZMM)


def pad_kernel() -> tirx.PrimFunc:
    """void spa_pad(x, buffer, top, rows, bottom, width, left, plane, pitch, step, fill): rows of an image,
    padded.

    The buffer gets `top` rows of `fill`, `rows` of the image, `bottom` of `fill`. Registers are whole: up to 31 floats
    behind the rows of the image are read, and of each phase up to 15 behind where one more row would have its first
    column are written. A step of 2 makes two phases, `plane` floats apart; every other step is taken for 1.

    Args (of the kernel):
        left: columns of padding before the first of the image; what follows it up to the next row is `fill`, too.
    """

    @T.prim_func(s_tir=True)
    def pad(
        x_: T.handle("float32"),
        buffer_: T.handle("float32"),
        top: T.int32,
        rows: T.int32,
        bottom: T.int32,
        width: T.int32,
        left: T.int32,
        plane: T.int32,
        pitch: T.int32,
        step: T.int32,
        fill: T.float32,
    ):
        T.func_attr({"global_symbol": PAD, "tirx.noalias": True})
        x = T.decl_buffer((ANY,), "float32", data=x_)
        buffer = T.decl_buffer((ANY,), "float32", data=buffer_)
        if step == 2:
            half: T.let[T.int32] = T.truncdiv(width, 2)
            begin: T.let[T.int32] = T.truncdiv(left, 2)
            even: T.let[T.int32] = T.truncmod(left, 2) * plane + begin
            odd: T.let[T.int32] = (1 - T.truncmod(left, 2)) * plane + begin + T.truncmod(left, 2)
            for i in T.serial(T.truncdiv(top * pitch + begin + ZMM, ZMM)):
                store(buffer, spread(fill, ZMM), i * ZMM, ZMM)
                store(buffer, spread(fill, ZMM), plane + i * ZMM, ZMM)
            for y in T.serial(rows):
                row: T.let[T.int32] = (top + y) * pitch
                for i in T.serial(T.truncdiv(width + 2 * ZMM - 1, 2 * ZMM)):
                    _split(x, y * width + i * (2 * ZMM), buffer, even + row + i * ZMM, odd + row + i * ZMM)
                for i in T.serial(T.truncdiv(pitch - width + half + ZMM - 1, ZMM)):
                    store(buffer, spread(fill, ZMM), even + row + width - half + i * ZMM, ZMM)
                for i in T.serial(T.truncdiv(pitch - half + ZMM - 1, ZMM)):
                    store(buffer, spread(fill, ZMM), odd + row + half + i * ZMM, ZMM)
            for i in T.serial(T.truncdiv(bottom * pitch + ZMM - 1, ZMM)):
                store(buffer, spread(fill, ZMM), (top + rows) * pitch + i * ZMM, ZMM)
                store(buffer, spread(fill, ZMM), plane + (top + rows) * pitch + i * ZMM, ZMM)
        else:
            for i in T.serial(T.truncdiv(top * pitch + left + ZMM - 1, ZMM)):
                store(buffer, spread(fill, ZMM), i * ZMM, ZMM)
            for y in T.serial(rows):
                place: T.let[T.int32] = (top + y) * pitch + left
                for i in T.serial(T.truncdiv(width + ZMM - 1, ZMM)):
                    store(buffer, x[at(y * width + i * ZMM, ZMM)], place + i * ZMM, ZMM)
                for i in T.serial(T.truncdiv(pitch - width + ZMM - 1, ZMM)):
                    store(buffer, spread(fill, ZMM), place + width + i * ZMM, ZMM)
            for i in T.serial(T.truncdiv(bottom * pitch + ZMM - 1, ZMM)):
                store(buffer, spread(fill, ZMM), (top + rows) * pitch + i * ZMM, ZMM)

    return pad
