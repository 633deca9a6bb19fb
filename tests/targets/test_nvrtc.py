"""Compiling CUDA source: by NVRTC or nvcc, once for each content; what is missing or wrong is said."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from spa_compiler.errors import EnvironmentFault
from spa_compiler.targets import nvrtc

SOURCE = 'extern "C" __global__ void spa_%s(float* y) { y[threadIdx.x] = 2.f; }'


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPA_NVCC", "none")
    nvrtc._find.cache_clear()


def test_the_same_source_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPA_CACHE_DIR", str(tmp_path))
    first = nvrtc.compile_source(SOURCE % "once", "sm_80")
    monkeypatch.setattr(nvrtc, "_with_nvrtc", None)
    assert nvrtc.compile_source(SOURCE % "once", "sm_80") == first
    assert first.registers > 0
    assert ".target sm_80" in first.ptx
    with pytest.raises(TypeError):
        nvrtc.compile_source(SOURCE % "once", "sm_90")


def test_what_the_compiler_says_is_in_the_error() -> None:
    with pytest.raises(EnvironmentFault, match="undefined_name"):
        nvrtc.compile_source('extern "C" __global__ void spa_wrong() { undefined_name(); }', "sm_80")
    with pytest.raises(EnvironmentFault, match="sm_999"):
        nvrtc.compile_source(SOURCE % "new", "sm_999")


def test_without_a_compiler_the_error_names_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_libraries", lambda home: iter(["libnvrtc-that-is-not-there.so"]))
    with pytest.raises(EnvironmentFault, match="pip install nvidia-cuda-nvrtc") as error:
        nvrtc.compile_source(SOURCE % "none", "sm_80")
    assert error.value.exit_code == 6


def test_the_wheel_comes_before_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(nvrtc._libraries("/usr/local/somewhere"))
    assert names[0] == str(
        next(f.locate() for f in importlib.metadata.files("nvidia-cuda-nvrtc") or () if f.name == "libnvrtc.so.13")
    )
    assert names[-1] == "libnvrtc.so"
    assert "/usr/local/somewhere/lib64/libnvrtc.so.12" in names


def test_nvcc_is_called_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in that writes what it was asked for."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        """#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.1, V13.1.0"; exit; }
echo "$@" > "$(dirname "$0")/arguments"
for last; do :; done
printf cubin > "$last"
printf ptx > "$(dirname "$last")/spa.ptx"
echo "ptxas info    : Used 17 registers, 8 bytes spill stores, 4 bytes spill loads, 16 bytes stack frame" >&2
"""
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("SPA_NVCC", str(nvcc))
    monkeypatch.setenv("SPA_CACHE_DIR", str(tmp_path / "cache"))
    compiled = nvrtc.compile_source(SOURCE % "nvcc", "sm_90")
    assert (compiled.cubin, compiled.ptx, compiled.compiler) == (b"cubin", "ptx", "nvcc 13.1")
    assert (compiled.registers, compiled.spilled, compiled.stack) == (17, 12, 16)
    assert "-arch=sm_90" in (tmp_path / "arguments").read_text()


@pytest.mark.parametrize("text", ["exit 1", "echo nonsense"])
def test_a_named_nvcc_that_does_not_run_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{text}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("SPA_NVCC", str(nvcc))
    with pytest.raises(EnvironmentFault, match="SPA_NVCC"):
        nvrtc.find()
