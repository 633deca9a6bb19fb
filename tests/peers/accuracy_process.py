"""A command with the most memory that it and its children held at once."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
PERIOD = 0.5
"""Seconds between two looks; the peak of the process itself is the kernel's, so only sums over children are sampled."""


@dataclass(frozen=True)
class Done:
    """What a command that ended left."""

    status: int
    out: str
    errors: str
    memory: int


def watched(command: Sequence[str]) -> Done:
    """Runs to the end. `memory` is in bytes: pages that several processes share count once."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
        peak, over = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over))
        watcher.start()
        try:
            status = process.wait()
        finally:
            process.kill()
            over.set()
            watcher.join()
        out.seek(0)
        errors.seek(0)
        return Done(status, out.read(), errors.read(), peak[0])


def _watch(root: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(PERIOD):
        held = sum(_kilobytes(pid, "smaps_rollup", "Pss") for pid in _family(root))
        peak[0] = max(peak[0], 1024 * max(held, _kilobytes(root, "status", "VmHWM")))


def _family(root: int) -> list[int]:
    """The process and all below it."""
    found, new = [root], [root]
    while new:
        try:
            lists = [path.read_text() for path in (PROC / str(new.pop()) / "task").glob("*/children")]
        except OSError:  # it ended
            continue
        children = [int(pid) for text in lists for pid in text.split()]
        found += children
        new += children
    return found


def _kilobytes(pid: int, file: str, field: str) -> int:
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", (PROC / str(pid) / file).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0
