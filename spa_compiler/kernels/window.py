"""Convolution with a window as a sparse product: an output pixel reads k = channels x height x width inputs.

    planes    one copy of the image for each x of the window, shifted so that what a row of outputs reads through that
              x is a row of the copy; `pitch` floats a row, zeros where the window hangs over the edge

              copy x, channel c:   row 0 of the padded image | row s | row 2 s | ...    s = vertical stride
                                   row 1                     | row s + 1 | ...

    offsets   int32 [k]    where column (c, y, x) of the weight begins in the planes

With the rows of a stride side by side, outputs that follow each other are read from floats that follow each other:
output pixel (y, x) is number q = y pitch + x, and reads planes[offsets[column] + q] whatever the stride, the dilation
and the padding. A tile is 16 to 64 such pixels, all columns of the weight meet it as R x 1 blocks
(`kernels/rx1_products.py`, `window=True`), and what was computed for q past the width of a row is dropped on the way
out. Rows of a copy begin at multiples of 8 floats, so that two of three loads touch one cache line only, or all of them
do.

Source: the shifted-row form of direct convolution in arXiv 1911.09723 and 1608.01409, with strides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels.vector import ANY, ZMM, at, spread, store

F32 = NDArray[np.float32]

PITCH_STEP = 8  # floats
SHIFT, CROP = "spa_shift", "spa_crop"
RUN = 3  # int32 of a run: lane, length, place in the plane


@dataclass(frozen=True)
class Window:
    """How a convolution looks at its input: [height, width] each, `pads` = top, left, bottom, right.

    One of a single axis (`axes` = 1, input [images, channels, width]) is a window of height 1 over a height of 1.
    """

    channels: int
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    axes: int = 2

    @property
    def k(self) -> int:
        """Columns of the weight: (channel, y, x)."""
        return self.channels * self.size[0] * self.size[1]

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """[height, width] of the output; 0 where the padded image is smaller than the window."""
        sizes = []
        for axis, size in enumerate((height, width)):
            room = size + self.pads[axis] + self.pads[axis + 2] - (self.size[axis] - 1) * self.dilation[axis] - 1
            sizes.append(room // self.stride[axis] + 1 if room >= 0 else 0)
        return sizes[0], sizes[1]


def pitch_of(width: int) -> int:
    """Floats of a row of the planes, for `width` outputs."""
    return -(-width // PITCH_STEP) * PITCH_STEP


def rows_of(window: Window, height: int) -> int:
    """Rows of each copy of a channel, for `height` rows of outputs: a multiple of the vertical stride."""
    step = window.stride[0]
    return -(-((height - 1) * step + (window.size[0] - 1) * window.dilation[0] + 1) // step) * step


def offsets_reference(window: Window, height: int, width: int) -> NDArray[np.int32]:
    """[k]: where every column begins, for `height` rows of `width` outputs."""
    step, rows, pitch = window.stride[0], rows_of(window, height), pitch_of(width)
    c, y, x = np.indices((window.channels, *window.size))
    row = y * window.dilation[0]
    place = (x * window.channels + c) * rows + row % step * (rows // step) + row // step
    return np.asarray(place * pitch, np.int32).reshape(-1)


def planes_reference(x: F32, window: Window, first: int, height: int, width: int) -> F32:
    """`x` [channels, H, W] -> the planes [window width, channels, rows, pitch].

    Args:
        first, height: the output rows that they are for.
        width: of the outputs.
    """
    step, rows, pitch = window.stride[0], rows_of(window, height), pitch_of(width)
    planes = np.zeros((window.size[1], window.channels, rows, pitch), np.float32)
    for i in range(rows):
        row = first * step - window.pads[0] + i % (rows // step) * step + i // (rows // step)
        for kx in range(window.size[1]):
            columns = np.arange(width) * window.stride[1] + kx * window.dilation[1] - window.pads[1]
            inside = (columns >= 0) & (columns < x.shape[2])
            if 0 <= row < x.shape[1]:
                planes[kx, :, i, :width][:, inside] = x[:, row, columns[inside]]
    return planes


def reference(x: F32, weight: F32, bias: F32, window: Window) -> NDArray[np.float64]:
    """The convolution of `x` [channels, H, W] with `weight` [n, k] in float64: [n, height, width]."""
    height, width = window.outputs(*x.shape[1:])
    rows, pitch = rows_of(window, height), pitch_of(width)
    planes = planes_reference(x, window, 0, height, width).astype(np.float64).reshape(-1)
    planes = np.concatenate([planes, np.zeros(rows * pitch)])  # what a tile reads past the last row
    q = (np.arange(height)[:, None] * pitch + np.arange(width)).reshape(-1)
    panel = planes[offsets_reference(window, height, width)[:, None] + q]
    return (weight.astype(np.float64) @ panel + bias[:, None]).reshape(-1, height, width)


def runs_reference(first: int, lanes: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """What of the tile at pixel `first` is kept: (lane, length, place in the plane [height, width]) of each run."""
    pitch, runs = pitch_of(width), []
    for y in range(first // pitch, min(height, -(-(first + lanes) // pitch))):
        low, high = max(first, y * pitch), min(first + lanes, y * pitch + width)
        if low < high:
            runs.append((low - first, high - low, y * width + low - y * pitch))
    return runs


def _copy_vector(to, place, source, begin, width):
    store(to, source[at(begin, width)], place, width)


def _every_second(source, begin, width):
    """`width` floats, of every second one."""
    pair = [T.bind(source[at(begin + i * width, width)]) for i in range(2)]
    return tirx.Shuffle(pair, [tirx.IntImm("int32", 2 * i) for i in range(width)])


def _columns(to, place, source, begin, step, keep, fill, width):
    """The part of a row that a register holds; padding where it sees none."""
    found = source[at(begin, width)] if step == 1 else _every_second(source, begin, width)
    store(to, tirx.Select(keep, found, spread(fill, width)), place, width)


def _seen(first, low, high, width):
    """Which lanes of a register see a column: its outputs begin with `first`."""
    lanes = T.Ramp(first, 1, width)
    return tirx.And(lanes >= spread(low, width), lanes < spread(high, width))


def _padding(to, place, fill):
    store(to, spread(fill, PITCH_STEP), place, PITCH_STEP)


def _within(value, low, high):
    return T.max(T.min(value, high), low)


def shift_kernel() -> tirx.PrimFunc:
    """void spa_shift(x, to, top, rows, phases, height, width, pitch, low, high, left, step, before, behind, fill): one
    channel of one copy.

    Args (of the kernel):
        x: the channel [height, width].
        to: its part of the copy, [phases x rows, pitch].
        top: the row of x that comes first; may be negative, the padding.
        rows, phases: rows of each phase, and how many there are: the vertical stride.
        low, high: outputs of a row that see a column of x; the others see padding.
        left: the column that output 0 sees; negative in the padding.
        step: the horizontal stride.
        before, behind: floats that may be read in front of x, and from its first one on: whole registers are read, and
            what does not belong to a row is dropped.
        fill: what the padding holds.
    """

    @T.prim_func(s_tir=True)
    def shift(
        x_: T.handle("float32"),
        to_: T.handle("float32"),
        top: T.int32,
        rows: T.int32,
        phases: T.int32,
        height: T.int32,
        width: T.int32,
        pitch: T.int32,
        low: T.int32,
        high: T.int32,
        left: T.int32,
        step: T.int32,
        before: T.int32,
        behind: T.int32,
        fill: T.float32,
    ):
        T.func_attr({"global_symbol": SHIFT, "tirx.noalias": True})
        X = T.decl_buffer((ANY,), "float32", data=x_)
        to = T.decl_buffer((ANY,), "float32", data=to_)
        for phase in T.serial(phases):
            plane: T.let[T.int32] = phase * rows * pitch
            # Rows are padding, then unsafe to read in whole registers, then safe, unsafe and padding again.
            upper: T.let[T.int32] = _within(T.floordiv(phases - 1 - top - phase, phases), 0, rows)
            under: T.let[T.int32] = _within(T.floordiv(height + phases - 1 - top - phase, phases), upper, rows)
            early: T.let[T.int32] = T.floordiv(width - 1 - left - before, width)
            late: T.let[T.int32] = T.floordiv(behind - left - pitch * step, width)
            begin: T.let[T.int32] = _within(T.floordiv(early + phases - 1 - top - phase, phases), upper, under)
            end: T.let[T.int32] = _within(T.floordiv(late + phases - top - phase, phases), begin, under)
            for i in T.serial(T.truncdiv(upper * pitch, PITCH_STEP)):
                _padding(to, plane + i * PITCH_STEP, fill)
            for i in T.serial(T.truncdiv((rows - under) * pitch, PITCH_STEP)):
                _padding(to, plane + under * pitch + i * PITCH_STEP, fill)
            safe: T.let[T.int32] = T.if_then_else(step <= 2, begin, under)
            again: T.let[T.int32] = T.if_then_else(step <= 2, end, under)
            # The vectors of a column of registers have their padding in common.
            row: T.let[T.int32] = (top + phase + begin * phases) * width + left
            place: T.let[T.int32] = plane + begin * pitch
            if step == 1:
                for i in T.serial(T.truncdiv(pitch, ZMM)):
                    for y in T.serial(end - begin):
                        _columns(
                            to,
                            place + y * pitch + i * ZMM,
                            X,
                            row + y * phases * width + i * ZMM,
                            1,
                            _seen(i * ZMM, low, high, ZMM),
                            fill,
                            ZMM,
                        )
                if T.truncmod(pitch, ZMM) != 0:
                    for y in T.serial(end - begin):
                        _columns(
                            to,
                            place + y * pitch + pitch - 8,
                            X,
                            row + y * phases * width + pitch - 8,
                            1,
                            _seen(pitch - 8, low, high, 8),
                            fill,
                            8,
                        )
            elif step == 2:
                for i in T.serial(T.truncdiv(pitch, 8)):
                    for y in T.serial(end - begin):
                        _columns(
                            to,
                            place + y * pitch + i * 8,
                            X,
                            row + y * phases * width + i * 16,
                            2,
                            _seen(i * 8, low, high, 8),
                            fill,
                            8,
                        )
            for part in T.serial(2):
                first: T.let[T.int32] = T.if_then_else(part == 0, upper, again)
                for y in T.serial(T.if_then_else(part == 0, safe, under) - first):
                    source: T.let[T.int32] = (top + phase + (first + y) * phases) * width + left
                    target: T.let[T.int32] = plane + (first + y) * pitch
                    for i in T.serial(low):
                        to[target + i] = fill
                    for i in T.serial(high - low):
                        to[target + low + i] = X[source + (low + i) * step]
                    for i in T.serial(pitch - high):
                        to[target + high + i] = fill

    return shift


def crop_kernel() -> tirx.PrimFunc:
    """void spa_crop(tile, plane, runs, count): the runs of one feature of a tile, to its plane of the output.

    `runs` is int32 [count, 3]: lane, length, place in the plane.
    """

    @T.prim_func(s_tir=True)
    def crop(tile_: T.handle("float32"), plane_: T.handle("float32"), runs_: T.handle("int32"), count: T.int32):
        T.func_attr({"global_symbol": CROP, "tirx.noalias": True})
        tile = T.decl_buffer((ANY,), "float32", data=tile_)
        plane = T.decl_buffer((ANY,), "float32", data=plane_)
        runs = T.decl_buffer((ANY,), "int32", data=runs_)
        for r in T.serial(count):
            lane: T.let[T.int32] = runs[r * RUN]
            length: T.let[T.int32] = runs[r * RUN + 1]
            place: T.let[T.int32] = runs[r * RUN + 2]
            for i in T.serial(T.truncdiv(length, ZMM)):
                _copy_vector(plane, place + i * ZMM, tile, lane + i * ZMM, ZMM)
            rest: T.let[T.int32] = T.truncmod(length, ZMM)
            done: T.let[T.int32] = length - rest
            if rest >= 8:
                _copy_vector(plane, place + done, tile, lane + done, 8)
            for i in T.serial(T.truncmod(rest, 8)):
                plane[place + length - 1 - i] = tile[lane + length - 1 - i]

    return crop
