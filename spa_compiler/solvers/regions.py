"""Where units compete: what stays is counted per group of inputs (N:M), per output (fan-in), else per weight.

Values of units `[u, v]` become `[regions, members]`, one row for each set in which a number of them stays.
"""

from __future__ import annotations

import numpy as np

from spa_compiler.patterns import FanIn, Pattern
from spa_compiler.solvers.problem import F64


def exchangeable(pattern: Pattern) -> bool:
    """Whether zeros can change places one input at a time: units are one input wide, or elements in groups (N:M)."""
    return pattern.cols == 1 or pattern.sparsity is not None


def split(pattern: Pattern, values: F64) -> F64:
    """Values `[u, v]` as `[regions, members]`; zeros complete the last group of each output of N:M."""
    if pattern.sparsity is not None:
        short = -values.shape[1] % pattern.cols
        padded = np.pad(values, ((0, 0), (0, short))) if short else values
        return padded.reshape(-1, pattern.cols)
    return values if isinstance(pattern, FanIn) else values.reshape(1, -1)


def join(pattern: Pattern, members: F64, shape: tuple[int, ...]) -> F64:
    """What `split` took apart, `[u, v]` = `shape`."""
    return members.reshape(shape[0], -1)[:, : shape[1]]


def spread(pattern: Pattern, values: F64, n: int, k: int) -> F64:
    """The value of each element's unit, `[n, k]` from `[u, v]`."""
    u, v = values.shape
    if u != n:
        values = np.repeat(values, min(pattern.rows, n), axis=0)[:n]
    return np.repeat(values, min(pattern.cols, k), axis=1)[:, :k] if v != k else values
