"""What the kernels of products share: how sums begin, grow and end. Functions emit statements into a script."""

from __future__ import annotations

from spa_compiler.kernels import activation
from spa_compiler.kernels.vector import at, spread, store

ACCUMULATE, BIAS, RESIDUAL = 0, 1, 2  # modes: sums begin with the output so far, the bias, or residual + bias


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
