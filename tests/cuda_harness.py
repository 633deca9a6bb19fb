"""What tests of CUDA kernels have in common: weights with zeros, and machine code that fits a multiprocessor."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.kernels.cuda.form import F32, Dtype, Kernel
from spa_compiler.kernels.cuda.source import source
from spa_compiler.targets import nvrtc
from spa_compiler.targets.cuda import ARCHITECTURES

NUMBERS: dict[Dtype, str] = {"fp16": "f16", "bf16": "bf16", "fp32": "tf32"}
"""What PTX calls them as operands of tensor cores."""


def sparse(seed: int | np.random.Generator, n: int, k: int, density: float, empty: float = 0.1) -> F32:
    """Unstructured zeros; a share `empty` of the rows has nothing else."""
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((n, k)) < density, rng.standard_normal((n, k)), 0).astype(np.float32)
    weight[rng.random(n) < empty] = 0
    return weight


def machine_code(kernel: Kernel, arch: str) -> nvrtc.Compiled:
    """A kernel compiled by NVRTC: without spills, and with registers for as many thread blocks as it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPA_NVCC", "none")
        compiled = nvrtc.compile_source(source(kernel), arch)
    assert compiled.spilled == compiled.stack == 0
    assert compiled.registers * kernel.threads * kernel.min_blocks <= ARCHITECTURES[arch].registers_per_sm
    return compiled


def disassembled(kernel: Kernel, arch: str, folder: Path) -> str:
    """A kernel's instructions, as the GPU gets them."""
    file = folder / "kernel.cubin"
    file.write_bytes(machine_code(kernel, arch).cubin)
    tool = next(f for f in metadata.files("nvidia-cuda-nvdisasm") or () if f.name == "nvdisasm")
    return subprocess.run([str(tool.locate()), "-c", str(file)], capture_output=True, text=True, check=True).stdout


def product(dtype: Dtype) -> str:
    """The instruction of tensor cores, in PTX."""
    return f"mma.sync.aligned.m16n8k{8 if dtype == 'fp32' else 16}.row.col.f32.{NUMBERS[dtype]}"


def products(compiled: nvrtc.Compiled, dtype: Dtype) -> int:
    """How many instructions of tensor cores there are."""
    return compiled.ptx.count(product(dtype))
