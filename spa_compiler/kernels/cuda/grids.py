"""Finds the grids of 16 values that a weight lies on: w = (q - z) s with q and z in 0 .. 15, in every group.

Nobody has to say that a weight was rounded to 4 bits, or how: whatever made its values, few of them are different. In a
group whose largest value is M steps from 0, all values are whole numbers of M-ths of it, to within what rounding to the
model's floats may have moved them. The M that the smallest gap between two values says is tried first, then each from 1
to 15; what passes is taken, with a step that fits all values at once. So a group may leave codes out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels.cuda.form import F32, Dtype, from_bits, holds, to_bits

CODES = 16
_LEAST = np.float32(2.0**-120)
"""A scale's: a GPU may take smaller products for 0."""
_FREE = np.uint32(15)
"""Bits of a scale that the zero point needs."""
_OFF = 0.125
"""Of a step: rounding moves 15 steps by less, in bfloat16 too."""

_F64 = NDArray[np.float64]


def find(groups: F32, dtype: Dtype) -> tuple[NDArray[np.uint8], F32, NDArray[np.uint8]]:
    """Codes `[..., group]`, scales and zero points `[...]` of `groups [..., group]`.

    The lowest 4 bits of a scale are 0. (q - z) s `holds` the values for `dtype`.

    Raises:
        ValueError: a group lies on no such grid.
    """
    shape = groups.shape[:-1]
    rows = np.ascontiguousarray(groups, np.float32).reshape(-1, groups.shape[-1])
    values = _distinct(rows)
    scale = _scales(values, dtype)
    steps = np.rint(values / scale[:, None])
    zero = -steps.min(-1)  # 0 is among the values
    if not holds(steps * scale[:, None], values, dtype):
        raise ValueError("the weight is not on a grid of 4 bits")
    codes = np.rint(rows / scale[:, None]) + zero[:, None]
    return (
        codes.astype(np.uint8).reshape(groups.shape),
        scale.reshape(shape),
        zero.astype(np.uint8).reshape(shape),
    )


def _distinct(rows: F32) -> F32:
    """The values of each row, each once, and zeros: `[rows, 17]`."""
    ordered = np.sort(rows, axis=1)
    place = np.zeros(rows.shape, np.uint8)
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=place[:, 1:])
    if not np.isfinite(ordered[:, [0, -1]]).all() or (place[:, -1] >= CODES).any():
        raise ValueError("the weight has too many values for a grid of 4 bits")
    values = np.zeros((len(rows), CODES + 1), np.float32)
    np.put_along_axis(values, place, ordered, axis=1)
    return values


def _scales(values: F32, dtype: Dtype) -> F32:
    """A scale for each row of values, 1 where there are zeros alone."""
    largest = np.abs(values).max(axis=1)
    scale: F32 = np.ones_like(largest)
    left = np.flatnonzero(largest > CODES * _LEAST)
    gaps = np.diff(np.sort(values[left], axis=1), axis=1)
    likely = np.rint(largest[left] / np.where(gaps > 0, gaps, np.inf).min(axis=1))
    for count in (likely, *range(1, CODES)):
        ratio = values[left] * (np.float32(1) / (largest[left] / count))[:, None]
        steps = np.rint(ratio)
        span = steps.max(axis=1) - steps.min(axis=1)
        near = np.flatnonzero((np.abs(ratio - steps) < _OFF).all(axis=1) & (span < CODES))
        found, fits = _fitted(values[left[near]].astype(np.float64), steps[near].astype(np.float64), dtype)
        scale[left[near[fits]]] = found[fits]
        left = np.delete(left, near[fits])
        if not len(left):
            return scale
    raise ValueError("the weight is not on a grid of 4 bits")


def _fitted(values: _F64, steps: _F64, dtype: Dtype) -> tuple[F32, NDArray[np.bool_]]:
    """Scales such that `steps` times them are `values`, and for which rows there is one: least squares among those."""
    slack = _half_unit(values.astype(np.float32), dtype)
    size, count = np.abs(values), np.abs(steps)
    some = count > 0
    divisor = np.where(some, count, 1.0)
    low = np.where(some, (size - slack) / divisor, 0.0).max(axis=1)
    high = np.where(some, (size + slack) / divisor, np.inf).min(axis=1)
    fits = (some | (size <= slack)).all(axis=1)
    least, most = _short(low, up=True), _short(np.minimum(high, np.finfo(np.float32).max), up=False)
    fits &= least <= most
    best = np.einsum("ij,ij->i", values, steps) / np.maximum(np.einsum("ij,ij->i", steps, steps), 1)
    scale: F32 = np.maximum(np.clip(_short(best), least, np.maximum(least, most)), _LEAST)
    return scale, fits


def _short(numbers: _F64, *, up: bool | None = None) -> F32:
    """Not negative float32 whose lowest 4 bits are 0: the nearest ones, or none smaller, or none larger."""
    near = numbers.astype(np.float32)
    bits = near.view(np.uint32)
    if up is None:
        bits = bits + np.uint32(8)
    elif up:
        bits = bits + (near < numbers) + _FREE
    else:
        bits = bits - ((near > numbers) & (bits > 0))
    short: F32 = (bits & ~_FREE).astype(np.uint32).view(np.float32)
    return short


def _half_unit(values: F32, dtype: Dtype) -> _F64:
    """Half the distance to the next larger number of `dtype`: what rounding may move a value by."""
    bits = to_bits(np.abs(values), dtype)
    return (from_bits(bits + bits.dtype.type(1), dtype).astype(np.float64) - from_bits(bits, dtype)) / 2
