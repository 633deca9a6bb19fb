"""CUDA source -> machine code: by nvcc where there is one, else by NVRTC, its library form. No GPU is needed.

NVRTC comes as a wheel (`pip install nvidia-cuda-nvrtc`, or `nvidia-cuda-nvrtc-cu12` for drivers of CUDA 12) or with a
CUDA installation. What was compiled once is kept in the cache, by content.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from spa_compiler.errors import EnvironmentFault
from spa_compiler.targets.machine import cache_dir

_log = logging.getLogger(__name__)

WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
OPTIONS = ("--std=c++17", "--diag-suppress=177")  # 177: a function is not used

_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class Compiled(msgspec.Struct, frozen=True):
    """One translation unit with one kernel, for one architecture."""

    cubin: bytes
    ptx: str
    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of stores and loads of registers that did not fit."""
    stack: int
    """Bytes of local memory of each thread: an array that is not in registers."""
    log: str
    compiler: str


@dataclass(frozen=True)
class Compiler:
    """What there is to compile with."""

    path: str
    version: tuple[int, int]
    nvcc: bool

    def __str__(self) -> str:
        return f"{'nvcc' if self.nvcc else 'NVRTC'} {self.version[0]}.{self.version[1]}"


class _Refused(Exception):
    """What a compiler has to say about a source that it does not take."""


def compile_source(source: str, arch: str) -> Compiled:
    """`source`, which includes nothing and has one `extern "C"` kernel, for `arch` (`sm_90`).

    Raises:
        EnvironmentFault: there is no compiler, or it does not take the source or the architecture.
    """
    compiler = find()
    key = hashlib.sha256("\n".join([str(compiler), arch, *OPTIONS, source]).encode()).hexdigest()[:32]
    folder = cache_dir() / "cuda"
    path = folder / f"{key}.msgpack"
    if path.exists():
        return msgspec.msgpack.decode(path.read_bytes(), type=Compiled)
    try:
        cubin, ptx, log = (_with_nvcc if compiler.nvcc else _with_nvrtc)(compiler, source, arch)
    except _Refused as error:
        raise EnvironmentFault(
            f"{compiler} failed for {arch}: {error}",
            where=compiler.path,
            fix="An architecture that it does not know needs a newer one: pip install --upgrade nvidia-cuda-nvrtc",
        ) from None
    compiled = Compiled(
        cubin,
        ptx,
        registers=_largest(r"Used (\d+) registers", log),
        spilled=_largest(r"(\d+) bytes spill stores", log) + _largest(r"(\d+) bytes spill loads", log),
        stack=_largest(r"(\d+) bytes stack frame", log),
        log=log,
        compiler=str(compiler),
    )
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.msgpack.encode(compiled))
    Path(partial).replace(path)
    return compiled


def find() -> Compiler:
    """What `compile_source` uses: nvcc of SPA_NVCC, CUDA_HOME or PATH, else NVRTC from a wheel, else the system's.

    `SPA_NVCC=none` goes past nvcc.

    Raises:
        EnvironmentFault: there is neither.
    """
    asked = os.environ.get("SPA_NVCC", "").strip()
    return _find(asked, os.environ.get("CUDA_HOME", ""), os.environ.get("PATH", ""))


@functools.cache
def _find(asked: str, home: str, path: str) -> Compiler:
    if asked != "none":
        for nvcc in [asked] if asked else [home and str(Path(home) / "bin" / "nvcc"), shutil.which("nvcc", path=path)]:
            version = nvcc and _nvcc_version(nvcc)
            if nvcc and version:
                return Compiler(nvcc, version, nvcc=True)
        if asked:
            raise EnvironmentFault(
                "nvcc cannot be run", where=f"SPA_NVCC={asked}", fix="Name the program, or none to use NVRTC"
            )
    for library in _libraries(home):
        try:
            version = _nvrtc_version(library)
        except OSError:
            continue
        return Compiler(library, version, nvcc=False)
    raise EnvironmentFault(
        "there is nothing to compile CUDA kernels with, neither nvcc nor NVRTC",
        fix="Install NVRTC with `pip install nvidia-cuda-nvrtc` (58 MB; no GPU is needed), or a CUDA toolkit",
    )


def _libraries(home: str) -> Iterator[str]:
    for wheel in WHEELS:
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        yield from (str(file.locate()) for file in files if file.name in _SONAMES)
    for folder in (home and f"{home}/lib64", "/usr/local/cuda/lib64", ""):
        yield from (f"{folder}/{name}" if folder else name for name in _SONAMES)


def _with_nvrtc(compiler: Compiler, source: str, arch: str) -> tuple[bytes, str, str]:
    library = _load(compiler.path)
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"spa.cu", 0, None, None))
    try:
        options = [*OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), array)
        log = _text(library, program, "ProgramLog").decode(errors="replace").rstrip("\0")
        if status:
            raise _Refused(log.strip() or library.nvrtcGetErrorString(status).decode())
        ptx = _text(library, program, "PTX").decode().rstrip("\0")
        return _text(library, program, "CUBIN"), ptx, log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _with_nvcc(compiler: Compiler, source: str, arch: str) -> tuple[bytes, str, str]:
    with tempfile.TemporaryDirectory(prefix="spa-nvcc-") as folder:
        file, cubin = Path(folder) / "spa.cu", Path(folder) / "kernel.cubin"
        file.write_text(source)
        # What is kept on the way has the PTX.
        kept = ["--keep", "--keep-dir", folder, "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
        command = [compiler.path, *OPTIONS, f"-arch={arch}", str(file), *kept]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode:
            raise _Refused(log.strip())
        return cubin.read_bytes(), file.with_suffix(".ptx").read_text(), log


@functools.cache
def _load(path: str) -> ctypes.CDLL:
    # NVRTC opens this one by its bare name, which the loader knows only once it is there.
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")) if "/" in path else ():
        ctypes.CDLL(str(builtins))
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    for name in ("Log", "PTX", "CUBIN"):
        what = "ProgramLog" if name == "Log" else name
        for function in (f"nvrtcGet{what}Size", f"nvrtcGet{what}"):
            getattr(library, function).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.nvrtcCompileProgram.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return library


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(max(1, size.value))
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw[: size.value]


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise _Refused(library.nvrtcGetErrorString(status).decode())


def _nvrtc_version(path: str) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _load(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _nvcc_version(path: str) -> tuple[int, int] | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found and done.returncode == 0 else None


def _largest(pattern: str, text: str) -> int:
    return max((int(number) for number in re.findall(pattern, text)), default=0)
