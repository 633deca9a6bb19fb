"""NVIDIA GPUs: the architectures that a model can be compiled for, their limits, and what GPU is here."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass

from spa_compiler.errors import EnvironmentFault, UsageError

OLDEST = 50
"""sm_50, Maxwell: the oldest that ONNX Runtime's CUDA 12 builds run on."""

_ARCH = re.compile(r"sm_([0-9]{2,3})[af]?")


@dataclass(frozen=True)
class Architecture:
    """What kernels for `sm_XX` may use, and the rates of the product that most people run them on.

    Limits are those of the CUDA C++ Programming Guide, section "Compute Capabilities"; rates of memory and tensor cores
    (dense, float32 sums) are the vendor's, from the product's datasheet or the architecture's whitepaper.
    """

    name: str
    product: str
    shared_per_sm: int
    """Bytes."""
    shared_per_block: int
    """Bytes that a block may ask for; each block takes `shared_reserved` more."""
    threads_per_sm: int
    blocks_per_sm: int
    sms: int
    dram_gb_s: float
    l2_bytes: int
    l2_gb_s: float
    """From L2 to all multiprocessors, an estimate: some 64 bytes a clock and multiprocessor, less what is seen to be
    lost."""
    tensor_tflops: float
    """fp16 and bf16; TF32 has half."""
    fp32_tflops: float
    mma_share: float
    """Of the tensor cores' rate that `mma.sync` reaches. On Hopper 0.62 (Luo et al., Benchmarking and Dissecting the
    Nvidia Hopper GPU Architecture via Microbenchmarking, 2024: only wgmma reaches more); later data-centre chips are
    taken alike."""

    registers_per_sm: int = 65536
    registers_per_thread: int = 255
    shared_reserved: int = 1024

    @property
    def capability(self) -> int:
        """80 for sm_80, 90 for sm_90a."""
        found = _ARCH.fullmatch(self.name)
        return int(found[1]) if found else 0

    def tflops(self, dtype: str) -> float:
        """That `mma.sync` reaches for `fp16`, `bf16` or `fp32` (in TF32)."""
        return self.tensor_tflops * self.mma_share * (0.5 if dtype == "fp32" else 1.0)


_KB = 1024
_MB = 1024 * _KB
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", "A100", 164 * _KB, 163 * _KB, 2048, 32, 108, 2039, 40 * _MB, 4500, 312, 19.5, 0.9),
        Architecture("sm_86", "A10", 100 * _KB, 99 * _KB, 1536, 16, 72, 600, 6 * _MB, 2500, 125, 31.2, 0.9),
        Architecture("sm_89", "L40S", 100 * _KB, 99 * _KB, 1536, 24, 142, 864, 96 * _MB, 5000, 362, 91.6, 0.9),
        Architecture("sm_90", "H200", 228 * _KB, 227 * _KB, 2048, 32, 132, 4800, 50 * _MB, 5500, 989, 67, 0.62),
        Architecture("sm_100", "B200", 228 * _KB, 227 * _KB, 2048, 32, 148, 8000, 126 * _MB, 8000, 2250, 75, 0.3),
        Architecture("sm_120", "RTX 5090", 100 * _KB, 99 * _KB, 1536, 24, 170, 1792, 96 * _MB, 6500, 209, 104.8, 0.9),
    )
}
"""Those that kernels are made for: asynchronous copies and `mma.m16n8k16` came with sm_80."""


def architecture(name: str) -> Architecture:
    """The limits of `sm_XX`. One that is not listed gets those of the nearest older one: code for that runs on it.

    Raises:
        UsageError: it is older than any that kernels are made for.
    """
    found = _ARCH.fullmatch(name)
    capability = int(found[1]) if found else 0
    older = [a for a in ARCHITECTURES.values() if a.capability <= capability]
    if not older:
        raise UsageError(
            f"there are no kernels for {name}",
            where=f"cuda:{name}",
            fix="They need asynchronous copies, sm_80 or newer: " + ", ".join(ARCHITECTURES),
        )
    return max(older, key=lambda a: a.capability)


@dataclass(frozen=True)
class Device:
    """A GPU as its driver describes it."""

    name: str
    arch: str
    """`sm_90`"""
    sms: int
    memory_bytes: int
    l2_bytes: int
    driver: int
    """The newest CUDA that the driver runs: 13000 for 13.0."""


def device(index: int = 0, library: str = "libcuda.so.1") -> Device | None:
    """The GPU `index`; None where there is no driver or no such GPU. Makes no context, so it takes no memory there.

    Raises:
        EnvironmentFault: there is a driver, and it refuses to start.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    status = driver.cuInit(0)
    if status == _NO_DEVICE:
        return None
    if status:
        raise EnvironmentFault(
            f"NVIDIA's driver does not start: cuInit returned {status}",
            where=library,
            fix="nvidia-smi says what is wrong with it",
        )
    handle, count, version, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not 0 <= index < count.value:
        return None
    if driver.cuDeviceGet(ctypes.byref(handle), index):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    driver.cuDriverGetVersion(ctypes.byref(version))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    # Numbers of CUdevice_attribute in cuda.h
    arch = f"sm_{attribute(75)}{attribute(76)}"
    return Device(name.value.decode(), arch, attribute(16), memory.value, attribute(38), version.value)


_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def parse_architectures(text: str) -> str:
    """`sm_90,sm_80` -> `sm_80,sm_90`: sorted, without repetition, so that equal requests are spelled alike.

    Raises:
        UsageError: an entry is not an architecture, or older than sm_50.
    """
    asked: dict[str, int] = {}
    for part in text.split(","):
        found = _ARCH.fullmatch(part.strip())
        if found is None or int(found[1]) < OLDEST:
            raise UsageError(
                f"{part.strip()!r} is not a CUDA architecture", where=f"cuda:{text}", fix="Write cuda:sm_90, or a list"
            )
        asked[part.strip()] = int(found[1])
    return ",".join(sorted(asked, key=lambda arch: (asked[arch], arch)))


def runs(gpu: str, archs: Sequence[str]) -> bool:
    """Whether a GPU (`sm_90`) runs a library for `archs`: its own machine code, or the PTX of an older architecture.

    Code for `sm_90a` runs on sm_90 alone.
    """
    own = _ARCH.fullmatch(gpu)
    capability = int(own[1]) if own else 0
    return any(
        capability == int(found[1]) if arch.endswith("a") else capability >= int(found[1])
        for arch in archs
        if (found := _ARCH.fullmatch(arch))
    )
