"""What the kernels of products share: how sums begin, grow and end, and what they come to. All functions but
`reference` emit statements into a script."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import activation
from spa_compiler.kernels.vector import at, spread, store

F32 = NDArray[np.float32]

ACCUMULATE, BIAS, RESIDUAL = 0, 1, 2  # modes: sums begin with the output so far, the bias, or residual + bias


def reference(dense: F32, bias: F32, panel: F32, residual: F32 | None, act: str, low: float, high: float) -> F32:
    """What a product gives for a weight [n, k] on a panel tile [k, lanes], summed in float64: float32 [n, lanes].

    `bias` may be longer than n; `residual` [n, lanes] or None.
    """
    y = dense.astype(np.float64) @ panel.astype(np.float64) + bias[: len(dense), None]
    return activation.reference(y if residual is None else y + residual, act, low, high).astype(np.float32)


def start(regs, index, mode, bias, row, begin, position, width):
    """The first value of one sum; `begin` is what it begins with: the output so far, or a residual."""
    if mode == ACCUMULATE:
        store(regs, begin[at(position, width)], index, width)
    elif mode == RESIDUAL:
        store(regs, begin[at(position, width)] + spread(bias[row], width), index, width)
    else:
        store(regs, spread(bias[row], width), index, width)


def fma(regs, index, value, x, width):
    store(regs, regs[at(index, width)] + value * x, index, width)


def add(regs, index, other, width):
    store(regs, regs[at(index, width)] + regs[at(other, width)], index, width)


def activate_in_place(out, position, act, low, high, width, isa):
    store(out, activation.emit(out[at(position, width)], act, low, high, width, isa), position, width)


def _every_second(vectors, lanes, first):
    """Lanes first, first + 2, ... of one vector, or of two behind each other."""
    total = len(vectors) * lanes
    return tirx.Shuffle(vectors, [tirx.IntImm("int32", i) for i in range(first, total, 2)])


def _added_up(vectors, lanes, each):
    """Vectors of `lanes` lanes -> (vectors, their lanes): the sums of every `each` lanes, in order."""
    while each > 1:
        pairs = [vectors[i : i + 2] for i in range(0, len(vectors), 2)] if len(vectors) > 1 else [vectors]
        vectors = [T.bind(_every_second(pair, lanes, 0) + _every_second(pair, lanes, 1)) for pair in pairs]
        lanes = lanes * len(pairs[0]) // 2
        each //= 2
    return vectors, lanes


def finish(regs, count, width, each, out, row, mode, bias, base):
    """Stores the sums of rows: `count` registers, in which `each` lanes belong to a row."""
    vectors, lanes = _added_up([T.bind(regs[at(i * width, width)]) for i in range(count)], width, each)
    for i, total in enumerate(vectors):
        place = row + i * lanes
        if mode == ACCUMULATE:
            store(out, out[at(place, lanes)] + total, place, lanes)
        elif mode == RESIDUAL:
            store(out, base[at(place, lanes)] + bias[at(place, lanes)] + total, place, lanes)
        else:
            store(out, bias[at(place, lanes)] + total, place, lanes)
