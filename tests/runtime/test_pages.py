"""Weights move to large pages where the system has them."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.runtime.link import C_FOLDER, run_linker

MIB = 1 << 20
COLLAPSE = 25


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("pages") / "pages.so"
    run_linker([str(C_FOLDER / "pages.c"), "-O2", "-std=c11", "-fPIC", "-shared", "-o", str(library)])
    loaded = ctypes.CDLL(str(library))
    loaded.spa_use_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.spa_use_large_pages.restype = None
    return loaded


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def in_large_pages(start: int) -> int:
    """Bytes in large pages of the mapping that holds `start`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= start < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such mapping")


def filled() -> tuple[mmap.mmap, np.ndarray]:
    memory = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # filled page by page, then allowed
    values = np.frombuffer(memory, np.float32)
    values[:] = np.arange(len(values))
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, values


def offered() -> bool:
    """Whether this system moves memory to large pages when it is asked to."""
    memory, _ = filled()
    start = -(-address(memory) // (2 * MIB)) * 2 * MIB
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(2 * MIB), COLLAPSE) == 0


def test_weights_move_where_the_system_does_that_and_keep_their_values(pages: ctypes.CDLL) -> None:
    memory, values = filled()
    start = address(memory)
    assert in_large_pages(start) == 0
    pages.spa_use_large_pages(start + 5 * MIB, 3 * MIB)
    least = 4 * MIB if offered() else 0  # whole pages around the 3 MiB
    most = 6 * MIB if offered() else 0
    assert least <= in_large_pages(start) <= most
    np.testing.assert_array_equal(values, np.arange(len(values), dtype=np.float32))


def test_small_weights_stay(pages: ctypes.CDLL) -> None:
    memory, _ = filled()
    pages.spa_use_large_pages(address(memory) + 5 * MIB, 32 << 10)
    assert in_large_pages(address(memory)) == 0


@pytest.mark.parametrize("start, size", [(0, MIB), (0, 0), (4096, MIB)])
def test_memory_that_is_not_there_is_nobodys_business(pages: ctypes.CDLL, start: int, size: int) -> None:
    pages.spa_use_large_pages(start, size)
