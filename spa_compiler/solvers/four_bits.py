"""Weights of 4 bits: every group of inputs of an output has a grid of 16 values, and each weight becomes one of them.

    w[i, j] = (q[i, j] - z[i, g]) s[i, g]        q and z in 0 .. 15, g = j div `group`; the last group may be short

The zero point z is a whole number, so 0 is on every grid and zeros stay zeros. A scale s is a float32 with 20
significant bits: products with q - z are exact in float32 then, and the kernels keep z in the 4 bits that are left.

What the grid of a group is, is searched for: the range from its least to its largest value (and 0), and parts of it,
which round the bulk finer and cut what is outermost; the least squared error is taken, in which each input has a
weight. A group that is on a grid already keeps it. Nearest values come next, as they are (`rtn`) or with `gptq`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spa_compiler.solvers.problem import F64, Problem

CODES = 16
_LEAST = 2.0**-100
"""A scale's: below it float32 would soon have fewer bits."""
_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_TOGETHER = 1 << 22
"""Elements whose grids are searched for at a time: what bounds memory."""


@dataclass(frozen=True)
class Grid:
    """`group` inputs share a scale and a zero point; `symmetric`: the zero point is 8 everywhere."""

    group: int
    symmetric: bool = False


@dataclass(frozen=True)
class Steps:
    """A grid for every group: `scale` and `zero` `[n, groups]`."""

    scale: F64
    zero: F64

    def nearest(self, values: F64, group: int) -> F64:
        """What `values [n]` of the group become."""
        scale, zero = self.scale[:, group], self.zero[:, group]
        return np.asarray(np.clip(np.rint(values / scale), -zero, CODES - 1 - zero) * scale + 0.0)  # no -0.0


def fit(weight: F64, grid: Grid, importance: F64) -> Steps:
    """The grids of `weight [n, k]`.

    Args:
        importance: of the squared error of each input, `[k]`, not negative.
    """
    n, k = weight.shape
    groups = -(-k // grid.group)
    counts = np.zeros(groups * grid.group)
    counts[:k] = importance
    counts = counts.reshape(groups, grid.group)
    scale, zero = np.empty((n, groups)), np.empty((n, groups))
    height = max(1, _TOGETHER // max(1, groups * grid.group))
    for start in range(0, n, height):
        part = weight[start : start + height]
        values = np.zeros((len(part), groups * grid.group))
        values[:, :k] = part
        found = _search(values.reshape(len(part), groups, grid.group), counts, grid.symmetric)
        scale[start : start + height], zero[start : start + height] = found
    return Steps(scale, zero)


def nearest(weight: F64, grid: Grid, importance: F64 | None = None) -> F64:
    """The nearest weight `[n, k]` on the grids that leave the least error; zeros stay.

    Args:
        importance: as in `fit`; None: all inputs count alike.
    """
    steps = fit(weight, grid, np.ones(weight.shape[1]) if importance is None else importance)
    out = np.empty_like(weight)
    for j in range(weight.shape[1]):
        out[:, j] = steps.nearest(weight[:, j], j // grid.group)
    return out


def rtn(problem: Problem, grid: Grid) -> F64:
    """`nearest` with the mean squares of the inputs as what their errors count, where anything is known of them."""
    energy = np.square(problem.norms)
    return nearest(problem.weight, grid, energy if energy.any() else None)


def _search(values: F64, importance: F64, symmetric: bool) -> tuple[F64, F64]:
    """Scale and zero point of groups `[n, groups, group]`."""
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    whole = np.maximum(-low / 8, high / 7) if symmetric else (high - low) / (CODES - 1)
    zero = np.full_like(whole, 8)
    if not symmetric:
        zero = np.clip(np.rint(-low / np.maximum(whole, _LEAST)), 0, CODES - 1)
    least, best = -zero[..., None], np.full(low.shape, np.inf)
    scale = np.ones_like(whole)
    for part in _PARTS:
        tried = _short(part * whole)[..., None]
        off = np.clip(np.rint(values / tried), least, least + (CODES - 1)) * tried - values
        error = np.einsum("...i,...i,...i->...", off, off, importance)
        better = error < best
        best[better], scale[better] = error[better], tried[..., 0][better]
    few = np.count_nonzero(np.diff(np.sort(values, axis=-1)), axis=-1) < CODES
    if few.any():
        scale[few], zero[few] = _kept(values[few], scale[few], zero[few], symmetric)
    return scale, zero


def _kept(values: F64, scale: F64, zero: F64, symmetric: bool) -> tuple[F64, F64]:
    """Scale and zero point of groups `[groups, group]` of few values: their own, if one grid has them all."""
    scale, zero = scale.copy(), zero.copy()
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    left = np.flatnonzero(high > low)
    for count in range(1, CODES):  # steps from the least value to the largest
        tried = _short((high[left] - low[left]) / count)
        least = np.full(len(left), 8.0) if symmetric else np.rint(-low[left] / tried)
        codes = np.rint(values[left] / tried[:, None]) + least[:, None]
        same = (codes - least[:, None]) * tried[:, None] == values[left]
        fits = (same & (codes >= 0) & (codes < CODES)).all(axis=-1)
        scale[left[fits]], zero[left[fits]] = tried[fits], least[fits]
        left = left[~fits]
    return scale, zero


def _short(scale: F64) -> F64:
    """The nearest number of 20 significant bits; 1 for groups of zeros."""
    bits = np.where(scale >= _LEAST, scale, 1.0).astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(8)) & ~np.uint32(15)
    return np.asarray(rounded.view(np.float32), np.float64)
