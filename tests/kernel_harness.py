"""Calls of single kernels through ctypes, on memory whose last element borders on a page that cannot be touched."""

from __future__ import annotations

import ctypes
import functools
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spa_compiler.kernels import panel, rx1, sums
from spa_compiler.kernels.form import Packed
from spa_compiler.kernels.lower import build_object
from spa_compiler.kernels.vector import ISAS
from spa_compiler.runtime.link import kernel, run_linker
from spa_compiler.targets import AARCH64, host
from spa_compiler.targets.machine import cache_dir

F32 = NDArray[np.float32]
A = TypeVar("A", bound=np.ndarray)

X86 = tuple(level for level in ISAS if level != AARCH64)
LEVELS = tuple(level for level in X86 if host().runs(level))
_level = LEVELS[0]
_libc = ctypes.CDLL(None, use_errno=True)
_CANARY = np.float32(1234.5)


@contextmanager
def using(level: str) -> Iterator[None]:
    """Kernels that are called within are made for this level."""
    global _level
    before, _level = _level, level
    yield
    _level = before


@functools.cache
def library(names: tuple[str, ...], level: str) -> ctypes.CDLL:
    """The named kernels in one shared library. Objects come from the cache, the link is made once per test run."""
    objects = [str(build_object(name, kernel, level, cache_dir() / "objects")) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.so"
        run_linker(["-shared", "-O2", "-s", *objects, "-o", str(path)])
        return ctypes.CDLL(str(path))  # stays mapped without its file


def guarded(values: A, slack: int = 0) -> A:
    """A copy that ends `slack` elements before an unmapped page: an access past the end ends the process.

    The start is aligned to one element only, whatever the length happens to give.
    """
    values = np.ascontiguousarray(values)
    used = values.nbytes + slack * values.itemsize
    size = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy: Any = np.ndarray(values.shape, values.dtype, buffer=memory, offset=size - used)
    copy[...] = values
    return copy


def output(shape: tuple[int, ...], slack: int = 0) -> tuple[F32, F32]:
    """(array to write to, the canaries before it): `assert_untouched` checks the latter."""
    rows = np.full((int(np.prod(shape)) + 64,), _CANARY, np.float32)
    whole = guarded(rows, slack)
    return whole[64:].reshape(shape), whole[:64]


def assert_untouched(canaries: F32) -> None:
    assert (canaries == _CANARY).all(), "written before the start of the output"


def level_in_use() -> str:
    """The level that `using` named last, or the best of this machine."""
    return _level


def call(names: Iterable[str], name: str, *arguments: Any) -> None:
    """Calls one kernel of `library(names)` at the level in use: arrays as pointers, int as int32_t, float as float."""
    function = getattr(library(tuple(names), _level), name)
    function.restype = None
    function(*(_argument(a) for a in arguments))


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_int32(int(value)) if isinstance(value, int | np.integer) else ctypes.c_float(value)


def run_packed(
    names: Iterable[str],
    packed: Packed,
    tile: F32,
    act: str = "none",
    low: float = 0.0,
    high: float = 0.0,
    residual: F32 | None = None,
    slack: int = 0,
) -> F32:
    """What `steps.c` does with one token tile [k, lanes]: all chunks and blocks -> [n, lanes]."""
    form, lanes = packed.form, tile.shape[1]
    assert form.chunk
    assert form.k_block
    indptr, order, columns, values, bias = (guarded(a, slack) for a in packed.arrays.values())
    groups, per_chunk = len(bias) // form.rows, form.chunk // form.rows
    blocks, entry = -(-packed.k // form.k_block), 0
    name = form.kernel(lanes, act, False)
    x = guarded(tile, slack)
    base = None
    if residual is not None:
        padded = np.zeros((len(bias), lanes), np.float32)
        padded[: packed.n] = residual
        base = guarded(padded, slack)
    out, canaries = output((len(bias), lanes), slack)
    for first in range(0, groups, per_chunk):
        count, row = min(per_chunk, groups - first), first * form.rows
        for b in range(blocks):
            mode = sums.ACCUMULATE if b else sums.BIAS if base is None else sums.RESIDUAL
            call(
                names,
                name,
                x[b * form.k_block :],
                np.zeros(0, np.int32),
                indptr[entry:],
                order[entry:],
                columns,
                values,
                bias[row:],
                out[row:] if base is None else base[row:],
                out[row:],
                count,
                mode,
                int(b == blocks - 1),
                0,
                0,
                low,
                high,
            )
            entry += count
    assert_untouched(canaries)
    return np.array(out[: packed.n])


def sparse(rng: np.random.Generator, n: int, k: int, rows: int, density: float, cols: int = 1) -> F32:
    """A weight [n, k] whose zeros come in `rows` x `cols` blocks; the last ones may be short."""
    keep = rng.random((-(-n // rows), -(-k // cols))) < density
    keep = np.repeat(np.repeat(keep, rows, axis=0)[:n], cols, axis=1)[:, :k]
    return (rng.standard_normal((n, k)) * keep).astype(np.float32)


def n_of_m(rng: np.random.Generator, n: int, k: int, kept: int, of: int) -> F32:
    """A weight [n, k] with `kept` nonzeros in `of` inputs."""
    rank = rng.random((n, k // of, of)).argsort(axis=2)
    return (rng.standard_normal((n, k)) * (rank < kept).reshape(n, k)).astype(np.float32)


def rx1_names(acts_of: dict[tuple[int, int], tuple[str, ...]]) -> tuple[str, ...]:
    """{(rows, lanes): activations} -> kernel names."""
    return tuple(rx1.name(rows, lanes, act) for (rows, lanes), acts in acts_of.items() for act in acts)


def assert_close(got: F32, want: NDArray[Any], scale: float, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of `scale`, the magnitude of the sums that were rounded."""
    error = float(np.abs(got.astype(np.float64) - want).max(initial=0.0))
    assert error <= tolerance * max(scale, 1e-30), f"{error:.3g} off at a magnitude of {scale:.3g}"


ALL_LANES = panel.LANE_COUNTS
