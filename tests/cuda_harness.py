"""What tests of CUDA kernels have in common: weights with zeros, and machine code that fits a multiprocessor."""

from __future__ import annotations

import re

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


def products(compiled: nvrtc.Compiled, dtype: Dtype) -> int:
    """Instructions of tensor cores."""
    return len(re.findall(rf"mma.sync.aligned.*\.{NUMBERS[dtype]}\.", compiled.ptx))
