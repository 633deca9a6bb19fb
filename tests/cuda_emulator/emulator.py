"""Launches of CUDA kernels on the CPU, by `threads.h` and `device.h` beside this file, called as the GPU's driver is."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels.cuda import form as contract
from spa_compiler.kernels.cuda.form import Arrays, Dtype, Epilogue, Form, Kernel, Layout, from_bits, to_bits
from spa_compiler.kernels.cuda.source import body
from spa_compiler.targets.machine import cache_dir

FOLDER = Path(__file__).parent
_FLAGS = (
    "-x",
    "c++",
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-nostdlib++",
    "-fno-exceptions",
    "-fno-rtti",
    "-w",
    "-fno-sanitize=all",
)
_libc = ctypes.CDLL(None, use_errno=True)


class LaunchError(AssertionError):
    """A kernel did what it may not do."""


@functools.cache
def library(kernels: tuple[Kernel, ...]) -> ctypes.CDLL:
    """Those kernels, compiled for this CPU: one translation unit, kept by content."""
    source = "".join(f"{body(kernel)}\nSPA_LAUNCHER({kernel.name})\n" for kernel in kernels)
    return compiled(source)


def compiled(source: str) -> ctypes.CDLL:
    """Kernels as CUDA C++, and for each `SPA_LAUNCHER(name)`."""
    source = f'#include "device.h"\n{source}'
    headers = "".join((FOLDER / name).read_text() for name in ("threads.h", "device.h"))
    key = hashlib.sha256(f"{headers}{source}{_FLAGS}".encode()).hexdigest()[:32]
    folder = cache_dir() / "cuda-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.so"
    if not path.exists():
        zig = str(cache_dir() / "zig")
        partial = folder / f"{key}.{os.getpid()}.so"
        done = subprocess.run(
            [sys.executable, "-m", "ziglang", "c++", *_FLAGS, f"-I{FOLDER}", "-", "-lm", "-o", str(partial)],
            input=source,
            env=os.environ | {"ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LaunchError(f"the kernel is no C++: {done.stderr[-3000:]}")
        partial.replace(path)
    return ctypes.CDLL(str(path))


def guarded(values: NDArray[Any]) -> NDArray[Any]:
    """A copy at a multiple of 16 that ends at a page that cannot be touched, up to 15 bytes of garbage."""
    values = np.ascontiguousarray(values)
    used = -(-max(values.nbytes, 1) // 16) * 16
    size = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memset(base, 0xFF, size)
    copy: NDArray[Any] = np.ndarray(values.shape, values.dtype, buffer=memory, offset=size - used)
    copy[...] = values
    return copy


def launch(
    kernel: Kernel,
    buffers: Sequence[NDArray[Any] | None],
    numbers: Sequence[int | float],
    grid: tuple[int, int, int],
    *,
    seed: int = 0,
    among: tuple[Kernel, ...] = (),
) -> None:
    """Runs `kernel`: its pointers (None: null), which lie as `guarded` puts them, then its numbers (int32 or float32).

    Args:
        seed: decides what a GPU leaves open.
        among: kernels to compile together with this one.
    """
    call(library(among or (kernel,)), kernel.name, kernel.threads, kernel.shared_bytes, buffers, numbers, grid, seed)


def call(
    functions: ctypes.CDLL,
    name: str,
    threads: int,
    shared_bytes: int,
    buffers: Sequence[NDArray[Any] | None],
    numbers: Sequence[int | float],
    grid: tuple[int, int, int] = (1, 1, 1),
    seed: int = 0,
) -> None:
    """`launch` of a kernel by its name."""
    function = getattr(functions, f"launch_{name}")
    function.restype = ctypes.c_char_p
    there = [b for b in buffers if b is not None]
    values: list[Any] = [ctypes.c_void_p(None if b is None else b.ctypes.data) for b in buffers]
    values += [ctypes.c_float(v) if isinstance(v, float) else ctypes.c_int32(v) for v in numbers]
    message = function(
        (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values)),
        (ctypes.c_int * 3)(*grid),
        threads,
        shared_bytes,
        ctypes.c_uint64(seed),
        (ctypes.c_void_p * len(there))(*(b.ctypes.data for b in there)),
        (ctypes.c_long * len(there))(*(b.nbytes for b in there)),
        len(there),
    )
    if message:
        raise LaunchError(f"{name}: {message.decode()}")


def run(
    form: Form,
    kernel: Kernel,
    arrays: Arrays,
    x: NDArray[np.float32],
    bias: NDArray[np.float32],
    residual: NDArray[np.float32] | None,
    dtype: Dtype,
    layout: Layout,
    *,
    low: float = 0.0,
    high: float = 0.0,
    seed: int = 0,
    among: tuple[Kernel, ...] = (),
) -> NDArray[np.float32]:
    """y of one launch; `x` and `residual` in `layout`, rounded to `dtype` on the way in."""
    n = len(bias)
    batch, tokens, k = (1, *x.shape) if layout == "rows" else (x.shape[0], x.shape[2], x.shape[1])
    shape = (tokens, n) if layout == "rows" else (batch, n, tokens)
    bits = to_bits(np.zeros(shape, np.float32), dtype)
    y = guarded(np.full_like(bits, np.nan if dtype == "fp32" else 0x7FFF))
    buffers: list[NDArray[Any] | None] = [guarded(arrays[name]) for name in form.arrays]
    buffers += [guarded(to_bits(x, dtype)), guarded(np.asarray(bias, np.float32))]
    buffers += [None if residual is None else guarded(to_bits(residual, dtype)), y]
    numbers = [n, k, tokens, batch, float(low), float(high)]
    launch(kernel, buffers, numbers, kernel.grid(n, tokens, batch), seed=seed, among=among)
    return from_bits(y.copy(), dtype)


def check(
    form: Form,
    kernel: Kernel,
    weight: NDArray[np.float32],
    tokens: int,
    dtype: Dtype,
    layout: Layout = "rows",
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - frozen
    *,
    batch: int = 1,
    seed: int = 0,
    among: tuple[Kernel, ...] = (),
) -> None:
    """Packs `weight` [n, k], draws what else it takes, launches, and compares with the reference in float64."""
    rng = np.random.default_rng(seed)
    n, k = weight.shape
    batch = 1 if layout == "rows" else batch
    x_shape, y_shape = ((tokens, k), (tokens, n)) if layout == "rows" else ((batch, k, tokens), (batch, n, tokens))
    rounded = lambda v: contract.rounded(np.asarray(v, np.float32), dtype)  # noqa: E731
    x, residual = (
        rounded(rng.standard_normal(x_shape)),
        rounded(rng.standard_normal(y_shape)) if epilogue.residual else None,
    )
    bias = rng.standard_normal(n).astype(np.float32)
    low, high = (-0.75, 0.5) if epilogue.act == "clip" else (0.2, 0.5)
    arrays = form.pack(weight, dtype)
    got = run(form, kernel, arrays, x, bias, residual, dtype, layout, low=low, high=high, seed=seed, among=among)
    stored = form.unpack(arrays, n, k, dtype)
    want = contract.reference(stored, x, bias, residual, epilogue.act, low, high, layout=layout)
    sizes = contract.reference(
        abs(stored), abs(x), abs(bias), None if residual is None else abs(residual), layout=layout
    )
    assert_close(got, want, sizes, dtype)


# What a result may be off: by rounding itself, and by the rounding of its products, relative to the sum of their sizes.
_OWN = {"fp16": 2**-10.9, "bf16": 2**-7.9, "fp32": 1e-6}
_PRODUCTS = {"fp16": 1e-6, "bf16": 1e-6, "fp32": 2**-9.9}


def assert_close(got: NDArray[np.float32], want: NDArray[np.float64], sizes: NDArray[np.float64], dtype: Dtype) -> None:
    """Every element within what rounding explains; `sizes` are the sums of the products' absolute values."""
    allowed = _OWN[dtype] * np.abs(want) + _PRODUCTS[dtype] * sizes + 2**-24
    off = np.abs(got - want)
    if not (off <= allowed).all():
        bad = ~(off <= allowed)
        where = np.argwhere(bad)
        first = tuple(where[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} are wrong, first {first}: {got[first]} for {want[first]}; last {tuple(where[-1])}; "
            f"{np.isnan(got).sum()} are NaN"
        )
