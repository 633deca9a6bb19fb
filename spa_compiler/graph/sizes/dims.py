"""Arithmetic on sizes of which some are not known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from spa_compiler.graph.sizes.known import Dims, Misfit


def product(sizes: Iterable[int | None]) -> int | None:
    """None if any of them is."""
    known = list(sizes)
    return None if None in known else math.prod(size or 0 for size in known)


def total(sizes: Iterable[int | None]) -> int | None:
    """Their sum; None if any of them is."""
    known = list(sizes)
    return None if None in known else sum(size or 0 for size in known)


def part(size: int | None, count: int | None) -> int | None:
    """One of `count` equal parts."""
    return None if size is None or not count else size // count


def broadcast(left: Dims, right: Dims) -> Dims:
    """The common shape. Raises Misfit if there is none."""
    rank = max(len(left), len(right))
    result: list[int | None] = []
    for a, b in zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True):
        if a == b or b == 1:
            result.append(a)
        elif a == 1:
            result.append(b)
        elif a is None or b is None:
            result.append(b if a is None else a)
        else:
            raise Misfit(f"{left} and {right} do not fit")
    return tuple(result)


def multiplied(left: Dims, right: Dims) -> Dims:
    """The shape of a MatMul's result. Raises Misfit where the inner sizes differ."""
    a = left if len(left) > 1 else (1, *left)
    b = right if len(right) > 1 else (*right, 1)
    if None not in (a[-1], b[-2]) and a[-1] != b[-2]:
        raise Misfit(f"{left} and {right} do not fit")
    rows = a[-2:-1] if len(left) > 1 else ()
    columns = b[-1:] if len(right) > 1 else ()
    return (*broadcast(a[:-2], b[:-2]), *rows, *columns)


def reshaped(shape: Dims, target: Sequence[int], allowzero: bool) -> Dims:
    """The shape after Reshape. Raises Misfit where the counts differ."""
    zeros = [] if allowzero else [axis for axis, size in enumerate(target) if size == 0]
    if any(axis >= len(shape) for axis in zeros):
        raise Misfit("there is no such axis to copy")
    result: list[int | None] = [shape[axis] if axis in zeros else size for axis, size in enumerate(target)]
    # a copied axis cancels, known or not
    count = product(size for axis, size in enumerate(shape) if axis not in zeros)
    wanted = [size for axis, size in enumerate(target) if axis not in zeros]
    known = math.prod(size for size in wanted if size != -1)
    if -1 not in wanted:
        if count not in (None, known):
            raise Misfit(f"{shape} does not hold as much as {tuple(target)}")
        return tuple(result)
    if count is not None and (count % known if known else count):
        raise Misfit(f"{shape} does not divide into {tuple(target)}")
    result[result.index(-1)] = part(count, known)
    return tuple(result)
