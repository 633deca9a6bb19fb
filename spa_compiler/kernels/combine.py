"""Images combined pixel by pixel: what stands between two convolutions and has no weight.

copy    act(a)
add     act(a + b)
mul     act(a b)
scale   act(a b[0]): one factor for all pixels, as squeeze and excitation has for each channel
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from spa_compiler.kernels import activation
from spa_compiler.kernels.vector import ANY, AVX512, ZMM, Isa, at, spread, store

F32 = NDArray[np.float32]
OPS = ("copy", "add", "mul", "scale")


def name(op: str, act: str) -> str:
    return f"spa_combine_{op}_{act}"


def reference(op: str, a: F32, b: F32, act: str = "none", low: float = 0.0, high: float = 0.0) -> NDArray[np.float64]:
    """What the kernel computes, in float64; `b` [1] for `scale`, not read for `copy`."""
    x = a.astype(np.float64)
    y = x if op == "copy" else x + b if op == "add" else x * b
    return activation.reference(y, act, low, high)


def _put(a, b, out, place, op, act, low, high, width, isa):
    value = a[at(place, width)]
    if op == "scale":
        value = value * spread(b[0], width)
    elif op != "copy":
        other = b[at(place, width)]
        value = value + other if op == "add" else value * other
    store(out, activation.emit(value, act, low, high, width, isa), place, width)


def kernel(op: str, act: str, isa: Isa = AVX512) -> tirx.PrimFunc:
    """void spa_combine_<op>_<act>(a, b, out, count, low, high): `count` registers of 16 floats; `out` is neither."""
    if op not in OPS:
        raise ValueError(f"images are not combined by {op!r}")
    width = isa.width

    @T.prim_func(s_tir=True)
    def combine(
        a_: T.handle("float32"),
        b_: T.handle("float32"),
        out_: T.handle("float32"),
        count: T.int32,
        low: T.float32,
        high: T.float32,
    ):
        T.func_attr({"global_symbol": name(op, act), "tirx.noalias": True})
        a = T.decl_buffer((ANY,), "float32", data=a_)
        b = T.decl_buffer((ANY,), "float32", data=b_)
        out = T.decl_buffer((ANY,), "float32", data=out_)
        for i in T.serial(count * (ZMM // width)):
            _put(a, b, out, i * width, op, act, low, high, width, isa)

    return combine
