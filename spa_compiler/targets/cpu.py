"""Processors: the levels that kernels are made for, and what this machine is.

A level is a set of instructions, as the x86-64 psABI defines it (x86-64-v3 has AVX2 and FMA, x86-64-v4 AVX-512 F, BW,
CD, DQ and VL). Kernels are made for a level, not for a CPU: the check at load stays short, the same artifact runs on
every CPU of the level, and LLVM's name of a level is the level itself.
"""

from __future__ import annotations

import functools
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import archspec.cpu

from spa_compiler.errors import EnvironmentFault

LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")
"""Every level runs what is made for those before it."""

AARCH64 = "aarch64"
"""The one level of 64-bit Arm, whose base has NEON: four floats a register, fused multiply-add."""

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class HostCpu:
    """The processor of this machine."""

    name: str
    """archspec's name of the microarchitecture: `icelake`, `zen4`."""
    level: str
    """The highest of `LEVELS` that it runs."""
    cores_physical: int
    """Physical cores that this process may use: affinity and container quotas count, hyper-threads do not."""
    model: str = ""
    """The maker's name of the product, as the kernel shows it; may be empty."""

    def runs(self, level: str) -> bool:
        """Whether code made for `level` (one of `LEVELS`, or AARCH64) runs here."""
        return level in LEVELS and LEVELS.index(level) <= LEVELS.index(self.level)


def level_number(level: str) -> int:
    """What the C side calls a level: 1 is the base of an architecture, which all of its processors run."""
    return LEVELS.index(level) + 1 if level in LEVELS else 1


def check_platform(system: str | None = None, machine: str | None = None) -> None:
    """Refuses every platform but Linux on x86-64; the arguments stand in for what `platform` says.

    Raises:
        EnvironmentFault: this is another platform.
    """
    system, machine = system or platform.system(), machine or platform.machine()
    if system != "Linux" or machine.lower() not in ("x86_64", "amd64"):
        raise EnvironmentFault(
            f"this is {system or 'an unknown system'} on {machine or 'an unknown processor'}, "
            "and spa-compiler works on Linux on x86-64 only",
            fix="Compile on a Linux x86-64 machine; portable.onnx of the artifact runs wherever ONNX Runtime does",
        )


@functools.cache
def host() -> HostCpu:
    """This machine's processor; asked once per process.

    Raises:
        EnvironmentFault: the platform is not Linux on x86-64.
    """
    check_platform()
    cpu = archspec.cpu.host()
    return HostCpu(cpu.name, _level(frozenset(cpu.features)), physical_cores(), _model())


def _level(features: frozenset[str]) -> str:
    """The highest level whose instructions are all among `features` (archspec's names)."""
    # By features and not by the CPU's ancestors: a virtual machine may hide some from a CPU that is known to have them.
    level = LEVELS[0]
    for candidate in LEVELS[1:]:
        if not archspec.cpu.TARGETS[candidate.replace("-", "_")].features <= features:
            break
        level = candidate
    return level


def physical_cores(topology: Path = _TOPOLOGY, quota: Path = _QUOTA) -> int:
    """Physical cores that this process may use, at least 1.

    Args:
        topology: the kernel's folder of CPUs. Where it is missing, every usable CPU counts as a core.
        quota: the cgroup v2 file `cpu.max` of a container: "200000 100000" is time for two cores.
    """
    usable = os.sched_getaffinity(0)
    cores: set[str] = set()
    for cpu in usable:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(f"cpu{cpu}")
    return max(1, min(len(cores), _cores_of_quota(quota)))


def _cores_of_quota(quota: Path) -> int:
    """Cores that a container's quota of CPU time comes to, rounded up; very many when there is none."""
    try:
        limit, period = (float(part) for part in quota.read_text().split())  # "max 100000": no number, no quota
        return math.ceil(limit / period)
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 30


def _model(cpuinfo: Path = _CPUINFO) -> str:
    """The product name that the kernel shows, or an empty string."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
