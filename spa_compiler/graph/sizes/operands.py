"""What operators are told by attributes in older opsets and by inputs in newer ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spa_compiler.graph.sizes.known import Op


def ints(values: Any) -> tuple[int, ...]:
    """The entries of an attribute or an input."""
    return tuple(int(value) for value in np.asarray(values).ravel())


def axes_of(op: Op, arrays: Sequence[Any], place: int = 1) -> tuple[int, ...] | None:
    """Axes as an attribute (older opsets) or as an input."""
    if len(arrays) > place and arrays[place] is not None:
        return ints(arrays[place])
    return ints(op.attr("axes")) if "axes" in op.attrs else None


def slices(op: Op, arrays: Sequence[Any], rank: int) -> list[slice]:
    """What a Slice takes of each axis, told by attributes (older opsets) or by inputs."""
    if len(arrays) > 1:
        starts, ends, axes = ints(arrays[1]), ints(arrays[2]), axes_of(op, arrays, 3)
    else:
        starts, ends, axes = ints(op.attr("starts")), ints(op.attr("ends")), axes_of(op, arrays)
    steps = ints(arrays[4]) if len(arrays) > 4 and arrays[4] is not None else (1,) * len(starts)
    cuts = [slice(None)] * rank
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        cuts[axis] = slice(start, end, step)
    return cuts
