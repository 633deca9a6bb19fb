"""A form that is as plain as a form for GPUs can be: rows of columns and values, one thread for an output and a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm.script import tirx as T  # noqa: N812

from spa_compiler.kernels.cuda.arrays import Array, Below, Extent, Offsets
from spa_compiler.kernels.cuda.form import F32, Arrays, Dtype, Epilogue, Kernel, Layout, from_bits, to_bits
from spa_compiler.targets.cuda import Architecture

THREADS = 64


@dataclass(frozen=True)
class Rows:
    """`us` is what it says it takes, whatever the size; `most` is the most tokens of its first variant."""

    us: float = 0.1
    most: int = 16
    name: str = "unstructured rows"
    wrong: bool = False  # loses a weight

    arrays = ("offsets", "columns", "values")
    rather = None

    def rules(self, dtype: Dtype) -> Sequence[Array]:
        return (
            Array("offsets", "int32", (Extent(rows=1, plus=1),), Offsets(Extent(count="stored"))),
            Array("columns", "int32", (Extent(count="stored"),), Below(Extent(columns=1))),
            Array("values", "float32" if dtype == "fp32" else "uint16", (Extent(count="stored"),)),
        )

    def stored(self, weight: F32, dtype: Dtype) -> float:
        return float(np.count_nonzero(weight) / weight.size)

    def pack(self, weight: F32, dtype: Dtype) -> Arrays:
        if not np.any(weight):
            raise ValueError("there is nothing to hold")
        rows, columns = np.nonzero(weight)
        offsets = np.searchsorted(rows, np.arange(len(weight) + 1)).astype(np.int32)
        values = to_bits(weight[rows, columns], dtype)
        if self.wrong:
            values[0] += 1
        return {"offsets": offsets, "columns": columns.astype(np.int32), "values": values}

    def unpack(self, arrays: Arrays, n: int, k: int, dtype: Dtype) -> F32:
        weight = np.zeros((n, k), np.float32)
        rows = np.repeat(np.arange(n), np.diff(arrays["offsets"]))
        weight[rows, arrays["columns"]] = from_bits(arrays["values"], dtype)
        return weight

    def kernels(
        self, arch: Architecture, dtype: Dtype, layout: Layout, epilogue: Epilogue, tokens: int
    ) -> list[Kernel]:
        width = 1 if tokens <= self.most else 4
        name = f"spa_cuda_rows_{dtype}_{layout}_{epilogue}_{width}"
        made = Kernel(name, partial(script, dtype, layout, epilogue, width), THREADS, THREADS, width, 0)
        too_large = Kernel(f"{name}_large", made.make, THREADS, THREADS, width, 1 << 20)
        return [too_large, made]

    def cost(
        self, arch: Architecture, kernel: Kernel, arrays: Arrays, n: int, k: int, tokens: int, batch: int = 1
    ) -> float:
        return self.us


def script(dtype: Dtype, layout: Layout, epilogue: Epilogue, width: int) -> Any:
    kind = "float32" if dtype == "fp32" else "uint16"
    planes, residual_, act = layout == "planes", epilogue.residual, epilogue.act
    any_ = 1 << 30

    def wide(value: Any) -> Any:
        return value if dtype == "fp32" else T.call_extern("float32", f"spa_from_{dtype}", T.Cast("uint32", value))

    def narrow(value: Any) -> Any:
        return value if dtype == "fp32" else T.call_extern("uint16", f"spa_to_{dtype}", value)

    @T.prim_func(s_tir=True)
    def rows(
        offsets_: T.handle("int32"),
        columns_: T.handle("int32"),
        values_: T.handle(kind),
        x_: T.handle(kind),
        bias_: T.handle("float32"),
        residual__: T.handle(kind),
        y_: T.handle(kind),
        n: T.int32,
        k: T.int32,
        tokens: T.int32,
        batch: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": "rows", "tirx.noalias": True})
        offsets = T.decl_buffer((any_,), "int32", data=offsets_)
        columns = T.decl_buffer((any_,), "int32", data=columns_)
        values = T.decl_buffer((any_,), kind, data=values_)
        x = T.decl_buffer((any_,), kind, data=x_)
        bias = T.decl_buffer((any_,), "float32", data=bias_)
        residual = T.decl_buffer((any_,), kind, data=residual__)
        y = T.decl_buffer((any_,), kind, data=y_)
        tile = T.launch_thread("blockIdx.x", T.ceildiv(tokens, width))
        strip = T.launch_thread("blockIdx.y", T.ceildiv(n, THREADS))
        image = T.launch_thread("blockIdx.z", batch)
        thread = T.launch_thread("threadIdx.x", THREADS)
        total = T.alloc_buffer((1,), "float32", scope="local")
        row: T.let[T.int32] = strip * THREADS + thread
        for t in T.serial(width):
            token: T.let[T.int32] = tile * width + t
            if T.And(row < n, token < tokens):
                total[0] = bias[row]
                for i in T.serial(offsets[row + 1] - offsets[row]):
                    at: T.let[T.int32] = offsets[row] + i
                    column: T.let[T.int32] = columns[at]
                    where: T.let[T.int32] = (image * k + column) * tokens + token if planes else token * k + column
                    total[0] = total[0] + wide(values[at]) * wide(x[where])
                out: T.let[T.int32] = (image * n + row) * tokens + token if planes else token * n + row
                if residual_:
                    total[0] = total[0] + wide(residual[out])
                y[out] = narrow(T.call_extern("float32", f"spa_act_{act}", total[0], low, high))

    return rows
