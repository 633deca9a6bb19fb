"""Which x86-64 level a machine is, and what a library says to a machine or an ONNX Runtime that cannot run it."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import onnxruntime as ort
import pytest

from spa_compiler.runtime import link
from spa_compiler.targets import LEVELS, host
from tests.region_harness import case, library


def bits(*positions: int) -> int:
    return sum(1 << p for p in positions)


# CPUID as the psABI lists it
V2, LAHF = bits(0, 9, 13, 19, 20, 23), bits(0)
V3, LZCNT, V3_7, YMM = V2 | bits(12, 22, 27, 28, 29), LAHF | bits(5), bits(3, 5, 8), 0x07
V4_7, ZMM = V3_7 | bits(16, 17, 28, 30, 31), 0xE7
ALL = 2**32 - 1


@pytest.fixture(scope="module")
def isa(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("isa") / "isa.so"
    link.run_linker(["-O2", "-std=c11", "-fPIC", "-shared", str(link.C_FOLDER / "isa.c"), "-o", str(path)])
    library = ctypes.CDLL(str(path))
    library.spa_isa_level_of.argtypes = [ctypes.c_uint32] * 4
    return library


TABLE = [
    ("nothing", 0, 0, 0, 0, 1),
    ("x86-64-v2", V2, 0, LAHF, 0, 2),
    ("x86-64-v3", V3, V3_7, LZCNT, YMM, 3),
    ("x86-64-v4", V3, V4_7, LZCNT, ZMM, 4),
    ("every bit", ALL, ALL, ALL, ALL, 4),
    ("v4 without LAHF", V3, V4_7, bits(5), ZMM, 1),
    ("v4 without LZCNT", V3, V4_7, LAHF, ZMM, 2),
    ("the OS saves no xmm and ymm", V3, V4_7, LZCNT, 0x01, 2),
    ("the OS saves ymm, not zmm", V3, V4_7, LZCNT, YMM, 3),
    ("the OS saves no opmasks", V3, V4_7, LZCNT, ZMM & ~0x20, 3),
    ("the OS saves no upper zmm", V3, V4_7, LZCNT, ZMM & ~0x80, 3),
    *((f"v2 without bit {b}", V3 & ~bits(b), V4_7, LZCNT, ZMM, 1) for b in (0, 9, 13, 19, 20, 23)),
    *((f"v3 without bit {b} of leaf 1", V3 & ~bits(b), V4_7, LZCNT, ZMM, 2) for b in (12, 22, 27, 28, 29)),
    *((f"v3 without bit {b} of leaf 7", V3, V4_7 & ~bits(b), LZCNT, ZMM, 2) for b in (3, 5, 8)),
    *((f"v4 without bit {b} of leaf 7", V3, V4_7 & ~bits(b), LZCNT, ZMM, 3) for b in (16, 17, 28, 30, 31)),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_levels_from_register_values(isa: ctypes.CDLL, row: tuple[str, int, int, int, int, int]) -> None:
    assert isa.spa_isa_level_of(*row[1:5]) == row[5]


def test_the_c_side_and_python_see_the_same_machine(isa: ctypes.CDLL) -> None:
    assert isa.spa_isa_level() == LEVELS.index(host().level) + 1


@pytest.mark.parametrize(
    "levels, allowed, name",
    [
        (("x86-64-v4",), "3", "x86-64-v4 (AVX-512)"),
        (("x86-64-v3",), "2", "x86-64-v3 (AVX2)"),
        (("x86-64-v4", "x86-64-v3"), "1", "x86-64-v3 (AVX2)"),
    ],
)
def test_a_machine_below_the_level_is_refused_at_registration(
    levels: tuple[str, ...], allowed: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPA_ISA_LEVEL", allowed)
    link.link([case("single").spec], levels, tmp_path / "kernels.so")
    with pytest.raises(Exception) as raised:
        ort.SessionOptions().register_custom_ops_library(str(tmp_path / "kernels.so"))
    assert f"ai.spa: this kernels.so was compiled for {name}, which this machine does not run." in str(raised.value)
    assert "load portable.onnx, which runs anywhere" in str(raised.value)


class FakeRuntime:
    """An OrtApiBase that offers API versions up to `newest`, with CreateStatus alone."""

    def __init__(self, newest: int, version: bytes) -> None:
        self.messages: list[tuple[int, str]] = []
        self.asked: list[int] = []

        def create_status(code: int, text: bytes) -> int:
            self.messages.append((code, text.decode()))
            return 1

        def get_api(wanted: int) -> int | None:
            self.asked.append(wanted)
            return ctypes.addressof(self._table) if wanted <= newest else None

        create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(create_status)
        get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(get_api)
        text = ctypes.create_string_buffer(version)
        name = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
        self._alive = (create, get, name, text)
        self._table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
        self.base = (ctypes.c_void_p * 2)(ctypes.cast(get, ctypes.c_void_p), ctypes.cast(name, ctypes.c_void_p))

    def register(self, path: Path) -> int | None:
        function = ctypes.CDLL(str(path)).RegisterCustomOps
        function.restype = ctypes.c_void_p
        return function(None, ctypes.byref(self.base))


@pytest.fixture
def own_copy(tmp_path: Path) -> Path:
    """A library that no session of this process has loaded: registration sets its API table."""
    return Path(shutil.copy(library(), tmp_path / "kernels.so"))


@pytest.mark.parametrize("version", [b"1.17.3", b"1.8.0", b"1.17.0-dev+" + b"x" * 500])
def test_a_too_old_onnxruntime_is_refused_with_a_sentence(own_copy: Path, version: bytes) -> None:
    runtime = FakeRuntime(17, version)
    assert runtime.register(own_copy)
    assert runtime.asked == [18, 1]
    ((code, message),) = runtime.messages
    assert code == 9  # ORT_NOT_IMPLEMENTED
    assert message == (
        f"ai.spa: this kernels.so needs onnxruntime 1.18 or newer, this is {version.decode()[:32]}. "
        "Install a newer one, or load portable.onnx, which needs no library"
    )


def test_a_runtime_without_any_known_api_does_not_crash(own_copy: Path) -> None:
    assert FakeRuntime(0, b"0.1").register(own_copy) is None
