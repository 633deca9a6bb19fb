"""NVIDIA GPUs: the architectures that a model can be compiled for."""

from __future__ import annotations

import re
from pathlib import Path

from spa_compiler.errors import UsageError

NATIVE = "native"
"""Stands for the GPU of the machine at hand, where the user named no architecture."""

OLDEST = 50
"""sm_50, Maxwell: the oldest that ONNX Runtime's CUDA 12 builds run on."""

_ARCH = re.compile(r"sm_([0-9]{2,3})[af]?")
_DRIVER = Path("/proc/driver/nvidia/version")


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


def driver_present(driver: Path = _DRIVER) -> bool:
    """Whether the kernel has NVIDIA's driver loaded. No CUDA call: those would take memory on the GPU."""
    return driver.exists()
