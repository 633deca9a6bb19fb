"""What a weighted operator reads, as rows, and the moments of those rows, streamed.

    rows [positions, k]:   MatMul, Gemm    the input with its leading axes merged
                           Conv            im2col: one row per output position, columns in the order (C, kh, kw), as a
                                           flattened weight has them

    count = positions      mean = E[x]      gram = E[x x^T]

Products are taken in float32, sums are kept in float64, so the result does not depend on how the samples are batched
beyond float32 rounding of each batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.graph.operators import WeightedOp

Array = np.ndarray[Any, Any]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass
class Moments:
    """Sums over rows of two inputs that belong together: `x` as the layer gets it now, `z` as it got it first.

    Each is `[groups, ...]`: one set for every group of a grouped convolution, one in all else. `cross` is E[x z^T];
    `extra` is E[x t^T] with a target `t [n]` besides.

    `half` has `mean` and `gram` of every second feed alone, from which one can tell what is chance in them; None where
    nobody kept it.
    """

    groups: int
    k: int
    count: int = 0
    half: Moments | None = None
    _rest: Moments | None = None
    _sums: dict[str, Array] = field(default_factory=dict)

    def add(self, x: F32, z: F32 | None = None, target: F32 | None = None) -> None:
        """Adds rows `[groups, positions, k]`, and targets `[groups, positions, n]`. `z` may be `x` itself."""
        self.count += x.shape[1]
        mean, gram = x.sum(axis=1, dtype=np.float64), x.transpose(0, 2, 1) @ x  # numpy knows it to be symmetric
        self._add("mean", mean)
        self._add("gram", gram)
        if z is not None:
            self._add("dense_mean", mean if z is x else z.sum(axis=1, dtype=np.float64))
            self._add("cross", gram if z is x else x.transpose(0, 2, 1) @ z)
        if target is not None:
            self._add("target_mean", target.sum(axis=1, dtype=np.float64))
            self._add("extra", x.transpose(0, 2, 1) @ target)

    def merge(self, other: Moments, *, into_half: bool = False) -> None:
        """Adds what another counted; into the half, too, if it is asked for."""
        self.count += other.count
        for name, value in other._sums.items():
            self._add(name, value)
        if into_half:
            self.half = self.half or Moments(self.groups, self.k)
            self.half.count += other.count
            for name in ("mean", "gram"):
                self.half._add(name, other._sums[name])
        self._rest = None

    def without_half(self) -> Moments:
        """`mean` and `gram` of what is not in the half; made once."""
        assert self.half is not None
        if self._rest is None:
            rest = Moments(self.groups, self.k, self.count - self.half.count)
            rest._sums = {
                name: np.subtract(self._sums[name], value, dtype=np.float64) for name, value in self.half._sums.items()
            }
            self._rest = rest
        return self._rest

    def _add(self, name: str, value: Array) -> None:
        held = self._sums.get(name)
        if held is None:
            self._sums[name] = value if value.dtype == np.float32 else value.copy()  # float32 is never added into
        elif held.dtype == np.float32:
            self._sums[name] = np.add(held, value, dtype=np.float64)
        else:
            held += value

    def get(self, name: str) -> F64:
        """A mean over positions: `mean`, `gram`, `dense_mean`, `cross`, `target_mean`, `extra`."""
        return np.divide(self._sums[name], max(1, self.count), dtype=np.float64)

    @property
    def finite(self) -> bool:
        """Whether no sum has a NaN or an infinity."""
        return all(bool(np.isfinite(held).all()) for held in self._sums.values())

    def __contains__(self, name: str) -> bool:
        return name in self._sums


@dataclass(frozen=True)
class Geometry:
    """How an operator turns its input into rows; operators with equal geometry on one input share their moments."""

    kind: str
    group: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"

    @staticmethod
    def of(op: WeightedOp) -> Geometry:
        if op.kind != "Conv":
            return Geometry("rows")
        rank, attrs = len(op.kernel), op.node.attrs
        return Geometry(
            "Conv",
            op.group,
            op.kernel,
            tuple(attrs.get("strides") or [1] * rank),
            tuple(attrs.get("pads") or [0] * 2 * rank),
            tuple(attrs.get("dilations") or [1] * rank),
            str(attrs.get("auto_pad", "NOTSET")),
        )

    def view(self, x: Array) -> Array:
        """`x` with one row for each index of its leading axes: `[positions, k]`, or `[N, out..., C, kernel...]`.

        It shares memory with `x`, or with its padded copy.
        """
        if self.kind == "rows":
            return x.reshape(-1, x.shape[-1])
        padding = self._padding(x.shape[2:])
        padded = np.pad(x, ((0, 0), (0, 0), *padding)) if any(map(any, padding)) else x
        spans = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, x.ndim)))
        steps = tuple(slice(None, None, stride) for stride in self.strides)
        inner = tuple(slice(None, None, step) for step in self.dilations)
        return np.moveaxis(windows[(slice(None), slice(None), *steps, *inner)], 1, x.ndim - 1)

    def positions(self, view: Array) -> int:
        """How many rows a view has."""
        return prod(view.shape[: self._leading])

    def rows(self, view: Array, which: NDArray[np.int64] | None = None) -> F32:
        """`[groups, positions, k]` in float32; `which` picks positions, in row-major order of (sample, position)."""
        leading = self._leading
        if which is None:
            taken = view
        elif leading == 1:
            taken = view[which]
        else:
            taken = view[np.unravel_index(which, view.shape[:leading])]
        count = self.positions(view) if which is None else len(which)
        k = prod(view.shape[leading:]) // self.group  # not -1: there may be no positions
        return np.ascontiguousarray(taken.reshape(count, self.group, k).transpose(1, 0, 2), np.float32)

    def at(self, y: Array, which: NDArray[np.int64] | None, group: int) -> F32:
        """The operator's result, or what is shaped like it, as `[groups, positions, n / groups]`."""
        flat = y.reshape(-1, y.shape[-1]) if self.kind == "rows" else np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])
        flat = flat if which is None else flat[which]
        n = flat.shape[1] // group
        return np.ascontiguousarray(flat.reshape(len(flat), group, n).transpose(1, 0, 2), np.float32)

    @property
    def _leading(self) -> int:
        """Axes of a view that count positions."""
        return 1 + len(self.kernel)

    def _padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        rank = len(self.kernel)
        if self.auto_pad in ("NOTSET", ""):
            return [(self.pads[i], self.pads[i + rank]) for i in range(rank)]
        if self.auto_pad == "VALID":
            return [(0, 0)] * rank
        padding = []
        for size, kernel, stride, step in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            needed = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * step + 1 - size)
            small, large = needed // 2, needed - needed // 2
            padding.append((small, large) if self.auto_pad == "SAME_UPPER" else (large, small))
        return padding
