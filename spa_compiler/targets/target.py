"""`Target`: what a model is compiled for, and how it is written."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from spa_compiler.errors import UsageError
from spa_compiler.targets.cpu import LEVELS, check_platform, host
from spa_compiler.targets.cuda import NATIVE, driver_present, parse_architectures

_CPU_SPELLINGS = {
    "x86-64-v4": "x86-64-v4",
    "x86-64-v3": "x86-64-v3",
    "x86-64": "x86-64",
    "avx512": "x86-64-v4",
    "avx2": "x86-64-v3",
}
SPELLINGS = ("cpu", *(f"cpu:{name}" for name in _CPU_SPELLINGS), "cpu:avx512,avx2", "cuda", "cuda:sm_90")
"""What `parse` takes; lists of what is there for CPUs, and for `cuda:` other architectures and lists of them."""


@dataclass(frozen=True)
class Target:
    """What a model is compiled for."""

    kind: Literal["cpu", "cuda"]
    arch: str
    """`x86-64-v4`, or a list `x86-64-v4,x86-64-v3`; for CUDA `sm_90`, a list, or `native` (the GPU at hand)."""
    mcpu: str
    """LLVM's name of the CPU that host code is generated for: the level, of several the highest that the machine runs
    which takes the times; the host's level for CUDA."""
    host_runs: bool
    """Whether that machine, this one or a remote one, runs the result, so that it can be measured and verified."""

    @property
    def archs(self) -> tuple[str, ...]:
        """`arch` as a list: more than one makes an artifact that picks at load. Levels of CPUs come highest first."""
        return tuple(self.arch.split(","))

    def __str__(self) -> str:
        """The spelling that `parse` turns into this target again."""
        return self.kind if self.arch == NATIVE else f"{self.kind}:{self.arch}"


def parse(text: str, level: str | None = None) -> Target:
    """The target that `text` names: `cpu` is what this machine has, `cpu:avx512` is `cpu:x86-64-v4`, and
    `cpu:avx512,avx2` has kernels for both.

    Args:
        level: the highest that the machine runs which takes the times, if that is not this machine.

    Raises:
        UsageError: there is no such target.
        EnvironmentFault: this machine is not Linux on x86-64.
    """
    check_platform()
    kind, colon, arch = text.strip().lower().partition(":")
    asked = [part.strip() for part in arch.split(",")]
    if kind == "cpu" and (not colon or all(part in _CPU_SPELLINGS for part in asked)):
        level = level or host().level
        return _of_levels({_CPU_SPELLINGS[part] for part in asked} if colon else {level}, level)
    if kind == "cuda":
        return Target("cuda", parse_architectures(arch) if colon else NATIVE, host().level, driver_present())
    close = difflib.get_close_matches(text.lower(), SPELLINGS, n=1)
    meant = f"Did you mean {close[0]}? " if close else ""
    raise UsageError(f"there is no target {text!r}", fix=f"{meant}There are: {', '.join(SPELLINGS)}")


def _of_levels(wanted: set[str], highest: str) -> Target:
    levels = sorted(wanted, key=LEVELS.index, reverse=True)
    running = [level for level in levels if LEVELS.index(level) <= LEVELS.index(highest)]
    return Target("cpu", ",".join(levels), (running or levels)[0], bool(running))
