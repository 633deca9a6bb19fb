"""`Target`: what a model is compiled for, and how it is written."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from spa_compiler.errors import UsageError
from spa_compiler.targets import cuda
from spa_compiler.targets.cpu import AARCH64, check_platform, host, level_number

_CPU_SPELLINGS = {
    "x86-64-v4": "x86-64-v4",
    "x86-64-v3": "x86-64-v3",
    "x86-64-v2": "x86-64",  # has nothing more that a kernel would use: no wider registers, no fused multiply-add
    "x86-64": "x86-64",
    "avx512": "x86-64-v4",
    "avx2": "x86-64-v3",
    AARCH64: AARCH64,
    "neon": AARCH64,
}
SPELLINGS = (
    *("cpu", *(f"cpu:{name}" for name in _CPU_SPELLINGS), "cpu:avx512,avx2,x86-64"),
    *("cuda", "cuda:sm_90", "cuda:sm_80,sm_90"),
)
"""What `parse` takes; lists of what is there for CPUs, and for `cuda:` other architectures and lists of them."""


@dataclass(frozen=True)
class Target:
    """What a model is compiled for."""

    kind: Literal["cpu", "cuda"]
    arch: str
    """`x86-64-v4`, a list `x86-64-v4,x86-64-v3`, `aarch64`; for CUDA `sm_90` or a list."""
    mcpu: str
    """The level that host code is generated for, of several the highest that the machine runs which takes the times;
    the host's for CUDA."""
    host_runs: bool
    """Whether that machine, this one or a remote one, runs the result, so that it can be measured and verified."""

    @property
    def archs(self) -> tuple[str, ...]:
        """`arch` as a list: more than one makes an artifact that picks at load. Levels of CPUs come highest first."""
        return tuple(self.arch.split(","))

    @property
    def isa(self) -> str:
        """What every machine must have to load a library for this target that holds no kernels."""
        return AARCH64 if self.arch == AARCH64 else "x86-64"

    def __str__(self) -> str:
        """The spelling that `parse` turns into this target again."""
        return f"{self.kind}:{self.arch}"


def parse(text: str, level: str | None = None, gpu: str | None = None) -> Target:
    """The target that `text` names: `cpu` is what this machine has, `cpu:avx512` is `cpu:x86-64-v4`, and
    `cpu:avx512,avx2` has kernels for both. `cuda` is the GPU of this machine.

    Another architecture than that of the machine can be named, too; nothing can be measured for it then.

    Args:
        level: the highest that the machine runs which takes the times, if that is not this machine.
        gpu: the architecture of that machine's GPU, empty if it has none; None: this machine takes the times.

    Raises:
        UsageError: there is no such target.
        EnvironmentFault: this machine is not Linux on x86-64.
    """
    check_platform()
    kind, colon, arch = text.strip().lower().partition(":")
    asked = [part.strip() for part in arch.split(",")]
    if kind == "cpu" and (not colon or all(part in _CPU_SPELLINGS for part in asked)):
        level = _CPU_SPELLINGS[level or host().level]
        return _of_levels({_CPU_SPELLINGS[part] for part in asked} if colon else {level}, level)
    if kind == "cuda":
        return _of_gpus(cuda.parse_architectures(arch) if colon else "", gpu)
    close = difflib.get_close_matches(text.lower(), SPELLINGS, n=1)
    meant = f"Did you mean {close[0]}? " if close else ""
    raise UsageError(f"there is no target {text!r}", fix=f"{meant}There are: {', '.join(SPELLINGS)}")


def _host_level() -> str:
    """The best level for this machine that kernels are made for."""
    return _CPU_SPELLINGS[host().level]


def _of_gpus(archs: str, gpu: str | None) -> Target:
    """`archs` empty: those of the GPU at hand."""
    if gpu is None:
        device = cuda.device()
        gpu = device.arch if device else ""
    if not archs and not gpu:
        raise UsageError(
            "there is no NVIDIA GPU to compile for",
            where="--target cuda",
            fix="Name an architecture, which needs no GPU: cuda:sm_80 (A100), cuda:sm_89 (L4, L40S), cuda:sm_90 (H100, "
            "H200), or a list of them",
        )
    archs = archs or gpu
    for name in archs.split(","):
        cuda.architecture(name)  # there are kernels for it
    return Target("cuda", archs, _host_level(), bool(gpu) and cuda.runs(gpu, archs.split(",")))


def _of_levels(wanted: set[str], highest: str) -> Target:
    if AARCH64 in wanted and len(wanted) > 1:
        raise UsageError(
            "a library is for x86-64 or for aarch64, not for both",
            where=f"cpu:{','.join(sorted(wanted))}",
            fix="Compile twice, into two folders",
        )
    levels = sorted(wanted, key=level_number, reverse=True)
    running = [v for v in levels if v != AARCH64 and level_number(v) <= level_number(highest)]
    return Target("cpu", ",".join(levels), (running or levels)[0], bool(running))
